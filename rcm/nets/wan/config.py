"""Sizes of the Wan family. docs/reference/wan.md#sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from rcm.core.errors import ConfigError, require_divisible, require_equal
from rcm.core.records import check_kinds


@dataclass(frozen=True)
class WanConfig:
    """Architecture of one Wan network. Raises `ConfigError` for sizes that do not fit each other.

    `in_dim` counts all input channels, those of `Condition.concat` included (16 latent + 20 for
    image-to-video). `image_branch` adds the CLIP tokens of Wan2.1 image-to-video, `image_positions`
    a table of so many positions for them: 514 where they are those of a first and a last frame
    (FLF2V), 0 for none. `max_frames`, `max_rows`, `max_columns` limit rotary positions. `two_times`
    adds the second time of a flow map (arXiv 2505.13447), which no published file has.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    image_branch: bool = False
    image_dim: int = 1280
    image_positions: int = 0
    max_frames: int = 1024
    max_rows: int = 1024
    max_columns: int = 1024
    two_times: bool = False

    def __post_init__(self) -> None:
        check_kinds(self, prefix="net.")
        for key, value in asdict(self).items():
            least = 0 if key == "image_positions" else 1
            if type(value) is int and value < least:
                raise ConfigError(f"net.{key}={value} must be at least {least}")
        if not self.eps > 0:
            raise ConfigError(f"net.eps={self.eps} must be positive")
        if min(self.patch) < 1:
            raise ConfigError(f"net.patch={self.patch} must be at least 1 in each direction")
        heads = "net.num_heads"
        require_divisible("net.dim", value=self.dim, by=self.num_heads, by_name=heads, knob=heads)
        if self.freq_dim % 2:
            raise ConfigError(
                f"net.freq_dim={self.freq_dim} must be even: a cosine and a sine each"
            )
        require_equal(
            "net.patch[0] (frames per token)", got=self.patch[0], expected=1, knob="net.patch"
        )
        if self.image_positions and not (self.image_branch and self.image_positions % 2 == 0):
            raise ConfigError(
                f"net.image_positions={self.image_positions} are those of the tokens of two images:"
                " even, with net.image_branch=True"
            )
        if self.head_dim < 6 or self.head_dim % 2:
            raise ConfigError(
                f"net.dim={self.dim} over net.num_heads={self.num_heads} gives head size"
                f" {self.head_dim}; rotary embedding needs an even one, at least 6"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def patch_area(self) -> int:
        """Latent positions per token."""
        return self.patch[1] * self.patch[2]

    def to_dict(self) -> dict[str, Any]:
        """The fields as a checkpoint describes them: `two_times` only where it is on."""
        return {k: v for k, v in asdict(self).items() if k != "two_times" or v}

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Tokens (h, w) of a latent frame; `ConfigError` if the patch does not divide it."""
        knob = "the resolution or net.patch"
        for axis, (side, value) in enumerate((("height", height), ("width", width)), 1):
            name = f"net.patch[{axis}]"
            require_divisible(
                f"latent {side}", value=value, by=self.patch[axis], by_name=name, knob=knob
            )
        return height // self.patch[1], width // self.patch[2]


_LARGE = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)

PRESETS: dict[str, WanConfig] = {
    "tiny": WanConfig(
        dim=64, ffn_dim=128, num_heads=4, num_layers=2, freq_dim=32, text_dim=32, text_len=16
    ),
    "1.3B": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "14B": _LARGE,
    "i2v-14B": replace(_LARGE, in_dim=36, image_branch=True),
    "flf2v-14B": replace(_LARGE, in_dim=36, image_branch=True, image_positions=514),
    "A14B": replace(_LARGE, in_dim=36),
}
"""tiny for tests and the toy world; Wan2.1 text-to-video 1.3B and 14B (also a Wan2.2 text-to-video
expert); Wan2.1 image-to-video; the same from a first and a last frame; a Wan2.2 image-to-video
expert.
"""


def preset(name: str) -> WanConfig:
    """The configuration called `name`; `ConfigError` lists the choices."""
    if name not in PRESETS:
        raise ConfigError(f"unknown network preset {name!r}; choose net from {', '.join(PRESETS)}")
    return PRESETS[name]
