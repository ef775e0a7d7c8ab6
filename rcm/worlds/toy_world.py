"""Procedural videos of moving coloured shapes, with captions and per-frame actions, and their exact
ground truth.

A scene is a handful of factors (colour, shape, start, directions); caption, actions, trajectory and
pixels follow from them. Scene number i of seed s is a pure function of (s, i), so a data set can be
built in any order, in pieces, and again. Shape legend: N videos, S shapes per video, F pixel
frames, H W pixel size, G segments of constant direction. Coordinates are pixels, x right, y down.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.core.records import Record, within

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "magenta": (1, 0, 1),
    "cyan": (0, 1, 1),
}
SHAPES = ("square", "circle", "triangle", "cross")
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "northwest": (-1, -1),
    "northeast": (1, -1),
    "southwest": (-1, 1),
    "southeast": (1, 1),
}
_OBJECT = re.compile(r"a (\w+) (\w+) moving (\w+(?: then \w+)*)")
# 64-bit random words reserved for one scene; a multiple of 4, the block of the counter-based
# generator
_WORDS_PER_SCENE = 64
_RENDER_ELEMENTS = 1 << 20  # pixels rendered at a time: stays in cache


@dataclass(frozen=True)
class ToyWorldConfig(Record):
    """A world. The defaults are the easiest one that still has shape, colour, motion and caption
    control.

    `height`, `width` pixels; `num_frames` pixel frames; `shapes`, `colours`, `directions` names to
    draw from; `num_shapes` per video (of distinct colours); `turns` changes of direction, at equal
    intervals; `speed` pixels per frame; `radius` pixels, of the circle whose area all shapes have;
    `boundary` "wrap" (a torus: motion is stationary) or "bounce"; `start_grid` spacing of start
    positions in pixels (0: anywhere); `background` and `contrast` in [-1, 1], pixel values of the
    ground and of the channels a colour has; the channels it has not are `tint` above the
    background.

    What makes it easy to learn, in order: every shape is brighter than the ground in every channel
    (`tint`), so that noisy pixels tell where it is before they tell its colour; few pixels; a start
    grid of one token, so that one picture of a shape recurs everywhere.
    """

    height: int = within(8, least=1)
    width: int = within(8, least=1)
    num_frames: int = within(17, least=2)
    shapes: tuple[str, ...] = ("square", "cross", "triangle")
    colours: tuple[str, ...] = ("red", "green", "blue", "yellow")
    directions: tuple[str, ...] = ("left", "right", "up", "down")
    num_shapes: int = within(1, least=1)
    turns: int = within(0, least=0)
    speed: float = within(1.0, above=0)
    radius: float = within(8 / math.sqrt(4 * math.pi), above=0)
    boundary: Literal["wrap", "bounce"] = "wrap"
    start_grid: float = within(2.0, least=0)
    background: float = within(-0.9, least=-1, most=1)
    contrast: float = within(0.9, least=-1, most=1)
    tint: float = 0.5

    @classmethod
    def at_size(cls, height: int, width: int, *, num_frames: int = 17) -> ToyWorldConfig:
        """The default picture at another size: radius, speed and start grid grow with it."""
        unit = min(height, width) / 8
        return cls(
            height=height,
            width=width,
            num_frames=num_frames,
            speed=unit,
            radius=unit * cls.radius,
            start_grid=unit * cls.start_grid,
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        for field_name, known in (
            ("shapes", SHAPES),
            ("colours", COLOURS),
            ("directions", DIRECTIONS),
        ):
            chosen = getattr(self, field_name)
            unknown = [name for name in chosen if name not in known]
            if unknown or not chosen or len(set(chosen)) != len(chosen):
                raise ConfigError(
                    f"toy world {field_name}={chosen}: choose distinct names from"
                    f" {', '.join(known)}"
                )
        if self.num_shapes > len(self.colours):
            raise ConfigError(
                f"num_shapes={self.num_shapes} needs as many distinct colours, colours has"
                f" {len(self.colours)}"
            )
        if self.turns >= self.num_frames - 1:
            raise ConfigError(
                f"turns={self.turns} do not fit between num_frames={self.num_frames} frames"
            )
        if min(self.height, self.width) < 3.2 * self.radius:
            raise ConfigError(
                f"frame {self.height}x{self.width} is smaller than 3.2 *"
                f" radius={3.2 * self.radius:g}; shrink radius"
            )
        if self.num_shapes * (4 + self.turns) + len(self.colours) > _WORDS_PER_SCENE:
            raise ConfigError(
                f"num_shapes={self.num_shapes} with turns={self.turns} needs more than"
                f" {_WORDS_PER_SCENE} random words per scene"
            )


@dataclass(frozen=True)
class Scenes:
    """Ground truth of N videos: `colour`, `shape` int64 [N, S]; `start` float32 [N, S, 2], (x, y)
    of the centre in frame 0; `direction` int64 [N, S, G].

    The integers index the world's own `colours`, `shapes` and `directions`.
    """

    colour: Tensor
    shape: Tensor
    start: Tensor
    direction: Tensor

    def __len__(self) -> int:
        return self.colour.shape[0]

    def __getitem__(self, index: slice | Tensor) -> Scenes:
        return Scenes(
            self.colour[index], self.shape[index], self.start[index], self.direction[index]
        )


class ToyWorld:
    """Scenes, captions, actions, trajectories and pixels of one `ToyWorldConfig`."""

    def __init__(self, config: ToyWorldConfig | None = None) -> None:
        self.config = config or ToyWorldConfig()
        c = self.config
        has = torch.tensor([COLOURS[name] for name in c.colours], dtype=torch.bool)
        self.palette = torch.where(has, c.contrast, c.background + c.tint)
        self.velocity = (
            torch.tensor([DIRECTIONS[name] for name in c.directions], dtype=torch.float32) * c.speed
        )

    def scenes(self, num: int, *, seed: int, first: int = 0) -> Scenes:
        """Scenes number `first` .. `first + num - 1` of `seed`, each a function of its number."""
        c, count = self.config, self.config.num_shapes
        key = int.from_bytes(hashlib.sha256(f"toy world {seed}".encode()).digest()[:16], "little")
        bits = np.random.Philox(key=key)
        bits.advance(first * _WORDS_PER_SCENE // 4)
        raw = bits.random_raw(num * _WORDS_PER_SCENE).reshape(num, _WORDS_PER_SCENE)
        u = torch.from_numpy((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53)
        colour_keys, rest = u[:, : len(c.colours)], u[:, len(c.colours) :].unflatten(1, (-1,))
        per_shape = rest[:, : count * (4 + c.turns)].unflatten(1, (count, 4 + c.turns))
        colour = colour_keys.argsort(dim=1)[:, :count]
        shape = (per_shape[..., 0] * len(c.shapes)).long()
        low, span = self.start_range()
        start = low + per_shape[..., 1:3] * span
        if self.config.start_grid:
            start = low + ((start - low) / self.config.start_grid).floor() * self.config.start_grid
        start = start.float()
        direction = (per_shape[..., 3:] * len(c.directions)).long()
        return Scenes(colour, shape, start, self._force_turns(direction))

    def start_range(self) -> tuple[Tensor, Tensor]:
        """Lowest centre (x, y) and extent of centres, float64, so that shapes stay inside."""
        size = torch.tensor([self.config.width, self.config.height], dtype=torch.float64)
        margin = 0.0 if self.config.boundary == "wrap" else 1.6 * self.config.radius
        return torch.full_like(size, margin), size - 2 * margin

    def _force_turns(self, direction: Tensor) -> Tensor:
        """A turn into the same direction is no turn: take the next one."""
        direction = direction.clone()
        for g in range(1, direction.shape[2] if len(self.config.directions) > 1 else 1):
            same = direction[..., g] == direction[..., g - 1]
            direction[..., g] = (direction[..., g] + same) % len(self.config.directions)
        return direction

    def actions(self, scenes: Scenes, *, num_frames: int | None = None) -> Tensor:
        """Directions int64 [N, S, F - 1] taken from frame i to i + 1; the last goes on."""
        steps = self._frames(num_frames) - 1
        segment = torch.arange(steps) * (self.config.turns + 1) // (self.config.num_frames - 1)
        return scenes.direction[..., segment.clamp(max=self.config.turns)]

    def _frames(self, given: int | None) -> int:
        if given is not None and given < 1:
            raise ConfigError(f"num_frames={given} must be at least 1")
        return self.config.num_frames if given is None else given

    def unfolded(self, start: Tensor, actions: Tensor) -> Tensor:
        """Centres [N, S, F, 2] without a boundary: `start` plus summed velocities of `actions`."""
        steps = self.velocity.to(start)[actions]
        return start.unsqueeze(2) + torch.cat(
            [torch.zeros_like(start).unsqueeze(2), steps.cumsum(2)], dim=2
        )

    def fold(self, centres: Tensor) -> Tensor:
        """Apply the boundary to centres [..., 2]: modulo the frame, or reflection at the walls."""
        low, span = (part.to(centres) for part in self.start_range())
        if self.config.boundary == "wrap":
            return centres % span
        return low + span - (((centres - low) % (2 * span)) - span).abs()

    def trajectory(self, scenes: Scenes, *, num_frames: int | None = None) -> Tensor:
        """True centres float32 [N, S, F, 2], inside the frame."""
        return self.fold(self.unfolded(scenes.start, self.actions(scenes, num_frames=num_frames)))

    def coverage(self, centres: Tensor, shape: str) -> Tensor:
        """Mask [..., H, W] in [0, 1] of `shape` at centres [..., 2]; edges are one pixel wide."""
        c = self.config
        dx = torch.arange(c.width, dtype=centres.dtype) + 0.5 - centres[..., 0:1]
        dy = torch.arange(c.height, dtype=centres.dtype) + 0.5 - centres[..., 1:2]
        if c.boundary == "wrap":
            dx = (dx + c.width / 2) % c.width - c.width / 2
            dy = (dy + c.height / 2) % c.height - c.height / 2
        dx, dy = dx.unsqueeze(-2), dy.unsqueeze(-1)
        if shape == "circle":
            distance = torch.sqrt(dx * dx + dy * dy) - c.radius
        elif shape == "square":
            distance = torch.maximum(dx.abs(), dy.abs()) - c.radius * math.sqrt(math.pi) / 2
        elif shape == "cross":
            arm = c.radius * math.sqrt(math.pi / 5)  # a plus sign is five squares of this side
            distance = torch.minimum(
                torch.maximum(dx.abs() - 1.5 * arm, dy.abs() - 0.5 * arm),
                torch.maximum(dx.abs() - 0.5 * arm, dy.abs() - 1.5 * arm),
            )
        else:
            slope = math.sqrt(0.75) * dx.abs() - 0.5 * dy
            distance = torch.maximum(slope, dy) - c.radius * math.sqrt(math.pi / (3 * math.sqrt(3)))
        return (0.5 - distance).clamp_(0, 1)

    def render(self, scenes: Scenes, *, num_frames: int | None = None) -> Tensor:
        """Pixels float32 [N, 3, F, H, W] in [-1, 1]; later shapes cover earlier ones."""
        c, frames = self.config, self._frames(num_frames)
        centres = self.trajectory(scenes, num_frames=frames)
        video = torch.full((len(scenes), 3, frames, c.height, c.width), c.background)
        batch = max(1, _RENDER_ELEMENTS // (frames * c.height * c.width))
        for slot, kind in itertools.product(range(c.num_shapes), range(len(c.shapes))):
            for rows in torch.nonzero(scenes.shape[:, slot] == kind).flatten().split(batch):
                mask = self.coverage(centres[rows, slot], c.shapes[kind]).unsqueeze(1)
                paint = self.palette[scenes.colour[rows, slot]].view(-1, 3, 1, 1, 1)
                video[rows] = torch.lerp(video[rows], paint, mask)
        return video

    def captions(self, scenes: Scenes) -> list[str]:
        """Such as "a red circle moving left then up and a green cross moving down"."""
        c = self.config
        lists = zip(
            scenes.colour.tolist(), scenes.shape.tolist(), scenes.direction.tolist(), strict=True
        )
        return [
            " and ".join(
                f"a {c.colours[k]} {c.shapes[s]} moving {' then '.join(c.directions[g] for g in d)}"
                for k, s, d in zip(*row, strict=True)
            )
            for row in lists
        ]

    def parse(self, captions: list[str]) -> Scenes:
        """The factors that captions state, `start` zero; `ConfigError` for other sentences."""
        rows = [self._parse_one(caption) for caption in captions]
        colour, shape, direction = (
            torch.tensor([[entry[i] for entry in row] for row in rows]) for i in range(3)
        )
        return Scenes(colour, shape, torch.zeros(*colour.shape, 2), direction)

    def _parse_one(self, caption: str) -> list[tuple[int, int, list[int]]]:
        c, found = self.config, []
        for part in caption.split(" and "):
            match = _OBJECT.fullmatch(part.strip())
            names = match and (match[1], match[2], *match[3].split(" then "))
            if (
                not names
                or names[0] not in c.colours
                or names[1] not in c.shapes
                or not set(names[2:]) <= set(c.directions)
            ):
                raise ConfigError(
                    f"caption {caption!r} is not of this world; it speaks sentences such as"
                    f" {self.prompts()[0]!r}"
                )
            directions = [c.directions.index(name) for name in names[2:]]
            found.append((c.colours.index(names[0]), c.shapes.index(names[1]), directions))
        if len(found) != c.num_shapes or any(len(d) != c.turns + 1 for _, _, d in found):
            raise ConfigError(
                f"caption {caption!r} needs {c.num_shapes} shapes (num_shapes) with {c.turns} turns"
                " (turns) each"
            )
        return found

    def prompts(self, limit: int = 4096) -> list[str]:
        """Every caption of one shape without turns, else those of the first `limit` scenes."""
        c = self.config
        if c.num_shapes == 1 and c.turns == 0:
            return [
                f"a {k} {s} moving {d}"
                for k, s, d in itertools.product(c.colours, c.shapes, c.directions)
            ]
        return list(dict.fromkeys(self.captions(self.scenes(limit, seed=0))))
