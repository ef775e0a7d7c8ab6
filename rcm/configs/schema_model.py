"""The keys of `model.config`: networks, objective, time laws, rollout, checkpoints. Two families,
causal and bidirectional rCM.

Times named `backward_timesteps`, `sf_backward_timestep_schedules`, `kd_timesteps` are
rectified-flow (RF) times in (0, 1), 1 = noise, in the causal family, and TrigFlow angles in (0,
pi/2) in the bidirectional one (docs/reference/training.md#bidirectional-keys, #causal-keys).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rcm.core.errors import ConfigError
from rcm.core.records import Record, within
from rcm.diffusion.time_sampling import TimeLawConfig
from rcm.parallel.checkpointing import SACConfig
from rcm.train.ema import EMAConfig
from rcm.train.optim import AdamWConfig, LambdaLinear

TrainingType = Literal[
    "bidirectional",
    "tf",
    "df",
    "tf_kd",
    "df_kd",
    "tf_dcm",
    "tf_scm",
    "tf_dscm",
    "tf_meanflow",
    "sf_dmd",
    "tf_scm_sf_dmd",
]
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
    "magi",
    "te",
]
"""The names of `rcm.nets.attention.BACKENDS`, and "" for the environment's."""

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
"""Video (width, height) in pixels by (resolution, aspect ratio);
docs/reference/wan.md#frame-sizes.
"""

SIZES = {
    **dict.fromkeys(("dim", "ffn_dim", "in_dim", "out_dim", "freq_dim", "text_dim"), 2**17),
    "num_heads": 2**12,
    "num_layers": 1024,
    "text_len": 2**16,
    "max_frames": 2**16,
}
"""Sizes of a network that a config may replace, and the largest that a machine can hold."""

VAE_STRIDE = 8
"""Pixels per latent cell of Wan's VAE, both ways."""


@dataclass(frozen=True)
class NetConfig(Record):
    """One network: a preset of `rcm.nets.wan.config`, with single sizes replaced where a number is
    given.
    """

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
    sac_config: SACConfig = field(default_factory=SACConfig)

    def __post_init__(self) -> None:
        for name, most in SIZES.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ConfigError(f"{name}={value} must be in 1 to {most}")


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters on frozen weights instead of training all weights: student and fake score
    alike (docs/lora.md).
    """

    rank: int = 0  # rank of every update (PEFT's r); 0 = no adapters, all weights are trained
    # strength of an update times the rank (lora_alpha); null = the rank, strength 1
    alpha: float | None = None
    # ends of layer names (target_modules), of both attentions
    targets: tuple[str, ...] = ("q", "k", "v", "o", "ffn.0", "ffn.2")


@dataclass(frozen=True)
class LongTuningConfig(Record):
    """Self-forced rollouts longer than what is judged, over a cache that is bounded (Causal_rCM.md
    section 6).
    """

    # longest rollout in latent frames, of which state_t are judged; 0 = off
    frames: int = within(0, least=0, most=2**16)
    # blocks that a chunk sees, its own included, beside the sinks
    window_blocks: int = within(0, least=0, most=2**16)
    sink_blocks: int = within(0, least=0, most=2**16)  # first blocks, which stay visible


@dataclass(frozen=True)
class TokenizerConfig:
    """The video codec of the latents: training reads latents, the codec decodes samples and is
    recorded in checkpoints.
    """

    name: Literal["wan", "toy"] = "wan"  # Wan's VAE, or the embedded world's invertible folding
    vae_pth: str = "assets/checkpoints/Wan2.1_VAE.pth"  # weights of Wan's VAE
    temporal_stride: int = 2  # toy: pixel frames per later latent frame
    spatial_stride: int = 2  # toy: pixels per latent cell, both ways
    gain: float = 3.0  # toy: factor of all latents
    boost: float = 1.0  # toy: factor of channels with a frequency other than zero, per axis
    centre: float = -0.9  # toy: pixel value that becomes latent 0


@dataclass(frozen=True)
class CommonModelConfig(Record):
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
    state_ch: int = within(16, least=1, most=2**16)  # latent channels
    state_t: int = within(21, least=1, most=2**16)  # latent frames
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
    student_update_freq: int = within(5, least=1)
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
        """Latent (height, width): `latent_hw`, or the table entry of resolution and aspect ratio.
        `KeyError` if the table has none.
        """
        if self.latent_hw is not None:
            return self.latent_hw
        width, height = PIXELS[self.resolution, self.aspect_ratio]
        return height // VAE_STRIDE, width // VAE_STRIDE


@dataclass(frozen=True)
class RCMConfig(CommonModelConfig):
    """`model=fsdp_t2v_distill_rcm`: bidirectional rCM
    (docs/reference/training.md#bidirectional-keys).
    """

    net_teacher: NetConfig | None = None  # the diffusion teacher
    # its weights; the student starts from them too unless student_ckpt is set
    teacher_ckpt: str = ""
    # classifier-free guidance of the teacher; <= 1 skips the unconditional pass
    teacher_guidance: float = 5.0
    p_D: TimeLawConfig = field(default_factory=lambda: TimeLawConfig(law="lognormal", p_mean=0.0))
    sigma_data: float = 1.0  # this alone: the TrigFlow wrapper is written for it
    sigma_max: float = within(80.0, above=0)  # first noise level when sampling
    cm_type: Literal["scm", "dcm"] = "scm"  # continuous or discrete consistency
    use_rf_scm: bool = False  # sCM in rectified-flow form instead of TrigFlow
    # warm-up of the TrigFlow tangent: release leaves its JVP term unscaled
    tangent_form: Literal["paper", "release"] = "paper"
    fd_type: Literal[0, 1, 2] = 0  # 0 exact JVP, 1 semi-continuous, 2 discrete difference
    fd_size: float = 1e-4  # step of the difference, radians
    # TrigFlow angles after pi/2, when dmd_fix_timesteps
    backward_timesteps: tuple[float, ...] = (1.5, 1.4, 1.0)
    dmd_fix_timesteps: bool = False  # rollout times from backward_timesteps instead of p_D
    dcm_timestep_shift: float = 5.0  # shift of the discrete grid


@dataclass(frozen=True)
class CausalConfig(CommonModelConfig):
    """`model=fsdp_t2v_causal`: causal training (docs/reference/training.md#causal-keys).
    `sigma_max` is used when sampling only.
    """

    training_type: TrainingType = "tf"  # the stage
    net_causal_teacher: NetConfig | None = None  # stages tf_dcm, tf_scm, tf_dscm
    net_bidirectional_teacher: NetConfig | None = None  # stage sf_dmd
    causal_teacher_ckpt: str = ""  # weights of net_causal_teacher
    # weights of net_bidirectional_teacher (and of the fake score, unless fake_score_ckpt)
    bidirectional_teacher_ckpt: str = ""
    causal_guidance: float = 3.0  # guidance of the causal teacher
    bidirectional_guidance: float = 5.0  # guidance of the bidirectional teacher
    sigma_max: float = within(1600.0, above=0)  # first noise level when sampling
    first_chunk_t: int = 1  # latent frames of block 0; set by pattern=cF-C (0 = unset, a template)
    chunk_t: int = 1  # latent frames of each later block
    loss_scale_fake_score: float = 1.0  # this alone: the release reads it nowhere
    loss_weighting: Literal["none", "gaussian_bell"] = "none"  # time weight of velocity regression
    # per-block times of diffusion forcing
    df_timestep_strategy: Literal["random", "same", "fopp"] = "random"
    sample_timestep_shift: float = 3.0  # shift of the tf_dcm grid and of many-step sampling
    # RF times after t = 1 in a rollout
    backward_timesteps: tuple[float, ...] = (15 / 16, 5 / 6, 5 / 8)
    shift3_backward: bool = False  # use (0.9, 0.75, 0.5) instead (resolved away by compose)
    # tf_meanflow: samples whose second time is the first one
    meanflow_equal_share: float = within(0.25, least=0, most=0.99)
    replayed_training: bool = False  # back-propagate one block at a time (sf_dmd)
    # sf_dmd; its checkpoints are streamed with the same window
    long_tuning: LongTuningConfig = field(default_factory=LongTuningConfig)
    # largest step count per chunk, last repeats; () = max_simulation_steps_fake
    sf_simulation_steps_per_chunk: tuple[int, ...] = ()
    # RF times per entry above; () = from backward_timesteps
    sf_backward_timestep_schedules: tuple[tuple[float, ...], ...] = ()
    context_from_last_step: bool = False  # noisy context: keep the KV of the last denoising input
    context_from_last_step_start_chunk: int = 0  # first chunk index with noisy context
    # RF times of trajectory entries 1.. of ODE-pair data (entry 0 is clean)
    kd_timesteps: tuple[float, ...] = (1.0, 15 / 16, 5 / 6, 5 / 8)
