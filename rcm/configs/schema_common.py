"""The keys of `model.config` of both families: networks, numerics, the video, time laws.

Times are those of the family: docs/reference/training.md#bidirectional-keys, #causal-keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rcm.core.errors import ConfigError
from rcm.core.records import Record, within
from rcm.diffusion.blocks import BlockPattern
from rcm.diffusion.time_sampling import TimeLawConfig
from rcm.nets.attention import attention_name
from rcm.nets.frozen_fp8 import FrozenWeights
from rcm.nets.trained_fp8 import LinearPrecision
from rcm.nets.wan.adapters import LoRAConfig
from rcm.parallel.checkpointing import KEEP_PRODUCTS, SACConfig
from rcm.train.ema import EMAConfig
from rcm.train.optim import AdamWConfig, LambdaLinear

Dtype = Literal["bfloat16", "float32", "float64"]
AttentionBackendName = Literal[
    "",
    "auto",
    "reference",
    "sdpa",
    "cudnn",
    "triton",
    "flex",
    "flex_triton",
    "flex_flash",
    "flash2",
    "flash3",
    "flash4",
    "magi",
    "te",
]
"""The names of `rcm.nets.attention.BACKENDS`, and "" for the environment's."""

M = "model.config"
"""Where these keys stand, for messages that name another one."""

PIXELS = {
    ("480p", "1:1"): (640, 640),
    ("480p", "4:3"): (640, 480),
    ("480p", "3:4"): (480, 640),
    ("480p", "16:9"): (832, 480),
    ("480p", "9:16"): (480, 832),
    ("720p", "1:1"): (960, 960),
    ("720p", "4:3"): (960, 720),
    ("720p", "3:4"): (720, 960),
    ("720p", "16:9"): (1280, 720),
    ("720p", "9:16"): (720, 1280),
}
"""Video (width, height) by (resolution, aspect ratio); docs/reference/wan.md#frame-sizes."""

SIZES = {
    **dict.fromkeys(("dim", "ffn_dim", "freq_dim", "text_dim"), 2**17),
    **dict.fromkeys(("in_dim", "out_dim", "text_len", "max_frames"), 2**14),
    "num_heads": 2**12,
    "num_layers": 1000,
}
"""Sizes of a network that a config may replace, and the largest that a checkpoint may tell of."""

VAE_STRIDE = 8
"""Pixels per latent cell of Wan's VAE, both ways."""


@dataclass(frozen=True)
class NetConfig(Record):
    """One network: a preset of `rcm.nets.wan.config`, and numbers in place of its own."""

    preset: str = "tiny"  # set by net=NAME, net_fake_score=NAME, ...
    dim: int | None = None  # model width; null = the preset's
    ffn_dim: int | None = None  # hidden width of the MLP
    num_heads: int | None = None  # attention heads
    num_layers: int | None = None  # blocks
    in_dim: int | None = None  # input channels
    out_dim: int | None = None  # output channels
    freq_dim: int | None = None  # size of the sinusoidal time embedding
    text_dim: int | None = None  # width of a text token
    text_len: int | None = None  # text tokens
    max_frames: int | None = None  # latent frames covered by the rotary table
    two_times: bool = False  # knows a second time below its own: the student of tf_meanflow
    # products of a trained network's linear layers: in the compute dtype, or of e4m3 numbers
    linear_precision: LinearPrecision = "compute"
    sac_config: SACConfig = field(default_factory=SACConfig)

    def __post_init__(self) -> None:
        for name, most in SIZES.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ConfigError(f"{name}={value} must be in 1 to {most}")


@dataclass(frozen=True)
class TokenizerConfig(Record):
    """The video codec of the latents, which decodes samples; recorded in checkpoints."""

    name: Literal["wan", "toy"] = "wan"  # Wan's VAE, or the toy world's invertible folding
    vae_pth: str = "assets/checkpoints/Wan2.1_VAE.pth"  # weights of Wan's VAE
    # toy: pixel frames per later latent frame
    temporal_stride: int = within(2, least=1, most=64)
    spatial_stride: int = within(2, least=1, most=64)  # toy: pixels per latent cell, both ways
    gain: float = within(3.0, above=0, most=1e6)  # toy: factor of all latents
    # toy: factor of channels with a frequency other than zero, per axis
    boost: float = within(1.0, above=0, most=1e6)
    # toy: pixel value that becomes latent 0
    centre: float = within(-0.9, least=-1e6, most=1e6)


@dataclass(frozen=True)
class CommonModelConfig(Record, ABC):
    """Keys that both families share."""

    # networks, optimisers
    net: NetConfig = field(default_factory=NetConfig)  # the student
    net_fake_score: NetConfig | None = None  # null = no DMD, no critic phases
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer_fake_score: AdamWConfig = field(default_factory=AdamWConfig)
    scheduler_fake_score: LambdaLinear = field(default_factory=LambdaLinear)
    ema: EMAConfig = field(default_factory=EMAConfig)
    student_ckpt: str = ""  # weights the student starts from
    fake_score_ckpt: str = ""  # "" = the bidirectional teacher's
    # start networks without a checkpoint from random weights (toys, dry runs)
    allow_random_init: bool = False
    # numerics
    precision: Dtype = "bfloat16"  # compute dtype; set by precision=NAME
    # dtype of the timestep a network receives (released Wan weights were trained with bfloat16)
    time_precision: Dtype = "bfloat16"
    # how frozen networks keep their linear layers: compute dtype, e4m3 made wide for each product,
    # or (fp8) products of e4m3
    frozen_weights: FrozenWeights = "compute"
    grad_clip: bool = False  # clip the gradient norm (it is measured either way)
    grad_clip_norm: float = within(1.0, above=0)  # largest norm when grad_clip is on
    # ranks over which one copy of the parameters is sharded, context-parallel ranks included
    fsdp_shard_size: int = within(1, least=1)
    # attention of plain passes; "" = environment RCM_ATTENTION_BACKEND, else auto
    attention_backend: AttentionBackendName = ""
    flex_backend: Literal["", "auto", "triton", "flash"] = (
        ""  # kernel of attention_backend=flex; "" = environment RCM_FLEX_BACKEND, else auto
    )
    # attention with tangents; auto = triton on CUDA, reference on CPU
    jvp_implementation: Literal["auto", "reference", "triton"] = "auto"
    # fused norms, gates and GELU; auto = on CUDA, on = refuse to run without
    fused_layers: Literal["auto", "on", "off"] = "auto"
    compile: bool = False  # compile each block (tangent passes stay eager)
    # the video
    state_ch: int = within(16, least=1, most=2**14)  # latent channels
    state_t: int = within(21, least=1, most=2**14)  # latent frames
    resolution: str = "480p"  # with aspect_ratio: the latent size, unless latent_hw is given
    aspect_ratio: str = "16:9"  # width to height
    # latent height and width; null = from resolution and aspect_ratio
    latent_hw: tuple[int, int] | None = None
    input_data_key: str = "videos"  # this alone: batches are records
    input_latent_key: str = "latents"  # this alone
    input_caption_key: str = "prompts"  # this alone
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    # encoder of sample prompts and of the negative prompt
    text_encoder_class: Literal["umT5", "toy"] = "umT5"
    # umT5: its weights, the tokenizer's folder beside them; "" = prompts must come with embeddings
    text_encoder_path: str = ""
    text_cache: str = ""  # folder where umT5's embeddings are kept between runs; "" = none
    # stored embedding of the negative prompt; "" = encode it with the text encoder
    neg_embed_path: str = ""
    # network timestep of t = 1; this alone, of the released weights
    rectified_flow_t_scaling_factor: float = 1000.0
    # objective
    p_G: TimeLawConfig = field(default_factory=TimeLawConfig)  # student times
    # times of DMD and fake score
    p_D: TimeLawConfig = field(default_factory=lambda: TimeLawConfig(law="uniform_shift"))
    # factor of the consistency / diffusion loss; 0 = term off
    loss_scale: float = within(100.0, least=0)
    loss_scale_dmd: float = within(1.0, least=0)  # factor of the DMD loss
    # 1 student iteration, then this number - 1 fake-score iterations
    student_update_freq: int = within(5, least=1, most=10**12)
    # longest rollout of the step-count cycle
    max_simulation_steps_fake: int = within(4, least=1, most=1024)
    # iterations over which the JVP term of sCM fades in
    tangent_warmup: int = within(0, least=0, most=10**12)
    dcm_total_steps: int = within(48, most=2**16)  # N of the discrete consistency grid
    dcm_skipping_interval_steps: int = 1  # teacher steps between the two points of a pair

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent_hw is not None and any(not 1 <= size <= 4096 for size in self.latent_hw):
            raise ConfigError(f"latent_hw={list(self.latent_hw)} must be two sizes from 1 to 4096")
        if not 1 <= self.dcm_skipping_interval_steps < self.dcm_total_steps:
            most = f"dcm_total_steps - 1 = {self.dcm_total_steps - 1}"
            raise ConfigError(
                f"dcm_skipping_interval_steps={self.dcm_skipping_interval_steps} must be in"
                f" 1..{most}"
            )

    def latent_size(self) -> tuple[int, int]:
        """Latent (height, width); `KeyError` for a frame size that `PIXELS` lacks."""
        if self.latent_hw is not None:
            return self.latent_hw
        width, height = PIXELS[self.resolution, self.aspect_ratio]
        return height // VAE_STRIDE, width // VAE_STRIDE

    @property
    @abstractmethod
    def stage(self) -> str:
        """What is trained, in a word: the training type of the causal family, or rCM."""

    @property
    def pattern(self) -> BlockPattern | None:
        """Blocks of the latent frames; None for a network that sees all of them at once."""
        return None

    @property
    @abstractmethod
    def guided(self) -> bool:
        """Whether a teacher is asked with and without the text."""

    @property
    def learns_trajectories(self) -> bool:
        """Whether samples must have the states of a teacher's trajectory."""
        return False

    @abstractmethod
    def checkpoints(self) -> dict[str, str]:
        """Key of each checkpoint that this stage must have -> what for."""

    def check(self) -> None:
        """Raise `ConfigError` for keys of this record that cannot work together."""
        attention = attention_name(self.attention_backend, flex_backend=self.flex_backend)
        if not self.compile:
            return
        if attention.startswith("flex"):
            raise ConfigError(
                f"{M}.attention_backend={attention} compiles a kernel of its own, which"
                f" {M}.compile=True leaves uncompiled with the rest of the attention, at the"
                f" memory of a whole score matrix; choose {M}.attention_backend=auto, or leave"
                f" {M}.compile at False"
            )
        if self.fused_layers == "on":
            raise ConfigError(
                f"{M}.fused_layers=on refuses the plain formulas, which {M}.compile=True hands to"
                f" the compiler; choose {M}.fused_layers=auto"
            )
        for knob, net in (("net", self.net), ("net_fake_score", self.net_fake_score)):
            if net is not None and net.sac_config.mode in KEEP_PRODUCTS:
                raise ConfigError(
                    f"{M}.{knob}.sac_config.mode={net.sac_config.mode} keeps single operators,"
                    f" which {M}.compile=True hides inside compiled code; choose block_wise,"
                    " block_wise_keep_attention or none"
                )


def require_times(key: str, times: Sequence[float], *, first: float) -> None:
    """Raise `ConfigError` unless `times` lie strictly inside (0, first) and decrease strictly."""
    for i, t in enumerate(times):
        if not 0 < t < first:
            raise ConfigError(f"{key}[{i}]={t:g} must lie strictly between 0 and {first:g}")
        if i and t >= times[i - 1]:
            raise ConfigError(
                f"{key}={[round(x, 6) for x in times]} must decrease strictly: entry {i} is {t:g}"
                f" after {times[i - 1]:g}"
            )
