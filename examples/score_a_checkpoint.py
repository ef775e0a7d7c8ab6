"""Score a checkpoint of the toy world: exact arithmetic on pixels, against the captions it was
asked for.
"""

from __future__ import annotations

import rcm
from rcm.worlds.toy_scores import ToyScorer
from rcm.worlds.toy_world import ToyWorld, ToyWorldConfig

model = rcm.load()
world = ToyWorld(ToyWorldConfig.at_size(*model.loaded.pixel_size))
prompts = world.prompts() * 2  # every caption twice: diversity looks inside a caption
video, _ = model.generate(prompts, seed=1)
scores = ToyScorer(world).score(video.clamp(-1, 1), prompts)
print(
    f"score {scores.score:.1f} of 100; colour, shape and direction as asked for in"
    f" {scores.joint:.0%} of {len(prompts)} videos"
)
