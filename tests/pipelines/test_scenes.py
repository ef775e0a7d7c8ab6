"""Timelines: what is read, the arithmetic of blocks against a table by hand, prompts and cuts in a
stream against switching by hand.
"""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from rcm.core.errors import ConfigError
from rcm.diffusion.blocks import BlockPattern
from rcm.pipelines.scenes import Segment, Timeline, blended, parse_timeline, play, read_timeline
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamSpec
from rcm.rollout.eviction.infinity_rope import InfinityRope
from rcm.rollout.recipe import SamplingRecipe
from tests.support.tiny_nets import HEIGHT, WIDTH, condition, tiny_config

READ = {
    "a cat": [("a cat", 0, False)],
    " a cat [5s] ": [("a cat", 5, False)],
    "a cat[2.5]": [("a cat", 2.5, False)],
    "[wide shot] a cat": [("[wide shot] a cat", 0, False)],
    "[wide shot] a cat[.5s]": [("[wide shot] a cat", 0.5, False)],
    "a cat | a dog": [("a cat | a dog", 0, False)],
    "a cat[5s]|a dog [ 3 s # ] barks | rain": [("a cat", 5, False), ("a dog  barks", 3, True), ("rain", 0, False)],
    "a cat[0]|a dog[2#]": [("a cat", 0, False), ("a dog", 2, True)],
    "": [("", 0, False)],
}


@pytest.mark.parametrize("text", READ)
def test_what_is_read(text):
    assert [(s.prompt, s.seconds, s.cut) for s in parse_timeline(text).segments] == READ[text]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a[xs] | b[-2s]", "[-2s] in segment 2 is no duration"),
        ("a[1.2.3] | b", "[1.2.3] in segment 1"),
        ("a[nan] | b[2]", "[nan] in segment 1"),
        ("a[inf s] | b[2]", "[inf s] in segment 1"),
        ("a[] | b[2]", "[] in segment 1"),
        ("a[#] | b[2]", "[#] in segment 1"),
        ("a[2s] |  [3s]", "segment 2 of the timeline has no prompt"),
        ("a[2s] | ", "segment 2 of the timeline has no prompt"),
        ("a[0s] | b[0]", "no segment of the timeline lasts longer than 0 s"),
        ("a[100000s] | b", "a duration in segment 1 is more than a day"),
    ],
)
def test_what_is_refused(text, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        parse_timeline(text)


def test_files(tmp_path):
    path = tmp_path / "scenes.txt"
    path.write_text("\ufeffa cat | and a dog[5s]\n\nrain[2s#]\r\n", encoding="utf-8")
    assert read_timeline(path).segments == (Segment("a cat | and a dog", 5.0), Segment("rain", 2.0, True))
    for content, sentence in (("\n \n", "no segments"), ("a\nb\n", "has a duration"), ("a[2s]\n[3s]\n", f"line 2 of {path}")):
        path.write_text(content)
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            read_timeline(path)
    path.write_bytes(b"caf\xe9[2s]")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_timeline(path)


BLOCKS = [
    # pattern, timeline, pixel frames, first block of each segment
    ("c3-3", "a[5s]", 81, (0,)),  # 80 frames -> 20 latents -> 21
    # 160 -> 40 -> 42 latents, 14 blocks; 20 latents: 1 + ceil(17 / 3)
    ("c3-3", "a[5s] | b[5s]", 165, (0, 7)),
    ("c1-1", "a[1s] | b[0.5s]", 21, (0, 4)),  # 24 -> 6 latents; 4 + 2
    # 48 -> 12 -> 13 latents, 4 blocks: 1 + ceil(3 / 4), 1, the rest
    ("c1-4", "a[1s] | b[1s#] | c[1s]", 49, (0, 2, 3)),
    # fewer seconds than segments: a block each
    ("c3-3", "a[0.1s] | b[0.1s] | c[0.1s]", 33, (0, 1, 2)),
    ("c3-3", "a[0.1s] | b[9s]", 153, (0, 1)),
    # 36 latents, 12 blocks: two are kept for the others
    ("c3-3", "a[9s] | b | c", 141, (0, 10, 11)),
    ("c2-3", "a[0s] | b[0.7s]", 17, (0, 1)),  # 11 -> 3 latents -> 5; round(2.8) = 3 latents
]


@pytest.mark.parametrize(("pattern", "text", "frames", "starts"), BLOCKS)
def test_blocks_by_hand(pattern, text, frames, starts):
    timeline, shape = parse_timeline(text), BlockPattern.parse(pattern)
    assert (timeline.num_frames(shape), timeline.first_blocks(shape)) == (frames, starts)
    assert timeline.cuts(shape) == frozenset(s for s, x in zip(starts[1:], timeline.segments[1:], strict=True) if x.cut)


def test_a_cut_of_the_first_segment_means_nothing():
    timeline = parse_timeline("a[1s#] | b[1s#]")
    assert timeline.cuts(BlockPattern.parse("c1-1")) == {timeline.first_blocks(BlockPattern.parse("c1-1"))[1]}


RECIPE = SamplingRecipe("few_step", "c1-1", mids=((0.5,),))


def opened(denoiser, cond, policy) -> Session:
    return Session(denoiser, None, cond, StreamSpec(RECIPE, (4, HEIGHT, WIDTH), batch=2, num_frames=8, policy=policy))


@pytest.mark.parametrize("mode", ["keep", "recache"])
@pytest.mark.parametrize("blend", [0, 2])
def test_playing_equals_switching_by_hand(denoiser, mode, blend):
    """Segments of 3, 3 and 2 blocks; the last begins with a cut."""
    conds = {name: condition(tiny_config(), seed=i, length=4 + i) for i, name in enumerate("abc")}
    timeline = Timeline((Segment("a", 0.75), Segment("b", 0.75), Segment("c", 0.5, cut=True)))
    assert timeline.first_blocks(RECIPE.blocks) == (0, 3, 6)
    policy = InfinityRope(3, 1, 8, cut_delta=4, cuts=timeline.cuts(RECIPE.blocks))
    prepared = []

    def prepare(cond):
        prepared.append(cond)
        return denoiser.prepare(cond)

    played = list(play(opened(denoiser, conds["a"], policy), timeline, conds.get, mode=mode, blend=blend, prepare=prepare))
    assert [chunk.block for chunk in played] == list(range(8))
    by_hand, session = [], opened(denoiser, conds["a"], policy)
    third = [blended(conds["a"], conds["b"], 1 / 3), blended(conds["a"], conds["b"], 2 / 3), conds["b"]]
    last = [blended(conds["b"], conds["c"], 1 / 3), blended(conds["b"], conds["c"], 2 / 3)]
    plan = {3: third, 6: last} if blend else {3: [conds["b"]], 6: [conds["c"]]}
    changes = {start + i: cond for start, conds in plan.items() for i, cond in enumerate(conds)}
    for block in range(8):
        if block in changes:
            session.set_condition(denoiser.prepare(changes[block]), mode=mode)
        by_hand.append(session.step().latents)
    assert torch.equal(torch.cat([c.latents for c in played], dim=2), torch.cat(by_hand, dim=2))
    assert len(prepared) == len(changes)
    first, later = (opened(denoiser, conds["a"], policy) for _ in range(2))
    options = {"mode": mode, "blend": blend, "prepare": prepare}
    list(itertools.islice(play(first, timeline, conds.get, **options), 4))
    later.restore(first.snapshot())  # under way from a to b, where they blend
    rest = [chunk.latents for chunk in play(later, timeline, conds.get, **options)]
    assert all(torch.equal(a, b.latents) for a, b in zip(rest, played[4:], strict=True))


def test_blends_pad_the_shorter_prompt():
    short, long = condition(tiny_config(), length=3), condition(tiny_config(), length=5, seed=7)
    middle = blended(short, long, 0.5)
    torch.testing.assert_close(middle.text[:, :3], (short.text + long.text[:, :3]) / 2)
    torch.testing.assert_close(middle.text[:, 3:], long.text[:, 3:] / 2)


def test_a_session_that_works_ahead_is_refused(denoiser):
    spec = StreamSpec(RECIPE, (4, HEIGHT, WIDTH), batch=2, num_frames=8, look_ahead=True)
    cond = condition(tiny_config())
    with pytest.raises(ConfigError, match="look_ahead=False"):
        next(play(Session(denoiser, None, cond, spec), parse_timeline("a[1s]|b[1s]"), lambda _: cond))
    assert len(list(itertools.islice(play(Session(denoiser, None, cond, spec), parse_timeline("a"), lambda _: cond), 9))) == 8
