"""The keys of `model.config`: networks, objective, time laws, rollout, checkpoints. Two families, causal and bidirectional rCM.

Times named `backward_timesteps`, `sf_backward_timestep_schedules`, `kd_timesteps` are rectified-flow (RF) times in (0, 1), 1 = noise, in
the causal family, and TrigFlow angles in (0, pi/2) in the bidirectional one (docs/reference/training.md#bidirectional-keys, #causal-keys).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

TrainingType = Literal["bidirectional", "tf", "df", "tf_kd", "df_kd", "tf_dcm", "tf_scm", "tf_dscm", "sf_dmd", "tf_scm_sf_dmd"]
Dtype = Literal["bfloat16", "float32", "float64"]
AttentionBackendName = Literal[
    "", "auto", "reference", "sdpa", "cudnn", "triton", "flex", "flex_triton", "flex_flash", "flash2", "flash3", "magi", "te"
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
"""Video (width, height) in pixels by (resolution, aspect ratio); docs/reference/wan.md#frame-sizes."""

VAE_STRIDE = 8
"""Pixels per latent cell of Wan's VAE, both ways."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW of one role; master weights are fp32."""

    type: Literal["fusedadamw", "adamw"] = "fusedadamw"  # fused kernel or plain loop
    lr: float = 1e-4  # peak learning rate
    weight_decay: float = 0.1  # decoupled, applied to every parameter
    betas: tuple[float, float] = (0.9, 0.99)  # decay of first and second moment
    eps: float = 1e-8  # added to the root of the second moment


@dataclass(frozen=True)
class SchedulerConfig:
    """Learning-rate factor as a function of the role's own update count: f_start to f_max linearly, then towards f_min."""

    warm_up_steps: int = 100  # updates from f_start to f_max
    cycle_length: int = 0  # updates from the end of the warm-up to f_min; 0 = constant at f_max
    f_start: float = 1e-6  # factor at update 0
    f_max: float = 1.0  # factor after the warm-up
    f_min: float = 1.0  # factor at the end of the cycle (kept from then on)


@dataclass(frozen=True)
class EMAConfig:
    """Power-function EMA of the student (docs/reference/training.md#optimiser-and-ema)."""

    enabled: bool = True  # keep and evaluate averaged weights
    rate: float = 0.1  # relative standard deviation s of the averaging profile, in (0, 0.288)
    iteration_shift: int = 0  # added to the student's update count


@dataclass(frozen=True)
class TimeLawConfig:
    """A law of RF times.

    `lognormal`: log(t / (1 - t)) is normal, reads p_mean and p_std. `uniform_shift`: t = s u / (1 + (s - 1) u), u uniform, reads shift.
    """

    law: Literal["lognormal", "uniform_shift"] = "lognormal"  # which of the two
    p_mean: float = -0.8  # mean of log sigma
    p_std: float = 1.6  # standard deviation of log sigma
    shift: float = 5.0  # s


@dataclass(frozen=True)
class SACConfig:
    """Activation checkpointing of one network."""

    # what a block keeps for its backward pass: everything, nothing, the result of self-attention, or all matrix products and attentions
    mode: Literal["none", "block_wise", "block_wise_keep_attention", "mm_only"] = "block_wise"
    every_n_blocks: int = 1  # recompute blocks 0, n, 2n, ... alone; the blocks between them keep everything


@dataclass(frozen=True)
class NetConfig:
    """One network: a preset of `rcm.nets.wan.config`, with single sizes replaced where a number is given."""

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
    sac_config: SACConfig = field(default_factory=SACConfig)


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters on frozen weights instead of training all weights: student and fake score alike (docs/lora.md)."""

    rank: int = 0  # rank of every update (PEFT's r); 0 = no adapters, all weights are trained
    alpha: float | None = None  # strength of an update times the rank (lora_alpha); null = the rank, strength 1
    targets: tuple[str, ...] = ("q", "k", "v", "o", "ffn.0", "ffn.2")  # ends of layer names (target_modules), of both attentions


@dataclass(frozen=True)
class TokenizerConfig:
    """The video codec of the latents: training reads latents, the codec decodes samples and is recorded in checkpoints."""

    name: Literal["wan", "toy"] = "wan"  # Wan's VAE, or the embedded world's invertible folding
    vae_pth: str = "assets/checkpoints/Wan2.1_VAE.pth"  # weights of Wan's VAE
    temporal_stride: int = 2  # toy: pixel frames per later latent frame
    spatial_stride: int = 2  # toy: pixels per latent cell, both ways
    gain: float = 3.0  # toy: factor of all latents
    boost: float = 1.0  # toy: factor of channels with a frequency other than zero, per axis
    centre: float = -0.9  # toy: pixel value that becomes latent 0


@dataclass(frozen=True)
class CommonModelConfig:
    """Keys that both families share."""

    # networks, optimisers
    net: NetConfig = field(default_factory=NetConfig)  # the student
    net_fake_score: NetConfig | None = None  # null = no DMD, no critic phases
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer_fake_score: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler_fake_score: SchedulerConfig = field(default_factory=SchedulerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    student_ckpt: str = ""  # weights the student starts from
    fake_score_ckpt: str = ""  # "" = the bidirectional teacher's
    allow_random_init: bool = False  # start networks without a checkpoint from random weights (toys, dry runs)
    # numerics
    precision: Dtype = "bfloat16"  # compute dtype; set by precision=NAME
    time_precision: Dtype = "bfloat16"  # dtype of the timestep a network receives (released Wan weights were trained with bfloat16)
    grad_clip: bool = False  # clip the gradient norm (it is measured either way)
    grad_clip_norm: float = 1.0  # largest norm when grad_clip is on
    fsdp_shard_size: int = 1  # ranks over which one copy of the parameters is sharded, context-parallel ranks included
    attention_backend: AttentionBackendName = ""  # attention of plain passes; "" = environment RCM_ATTENTION_BACKEND, else auto
    flex_backend: Literal["", "auto", "triton", "flash"] = (
        ""  # kernel of attention_backend=flex; "" = environment RCM_FLEX_BACKEND, else auto
    )
    jvp_implementation: Literal["auto", "reference", "triton"] = "auto"  # attention with tangents; auto = triton on CUDA, reference on CPU
    fused_layers: Literal["auto", "on", "off"] = "auto"  # fused norms, gates and GELU; auto = on CUDA, on = refuse to run without
    compile: bool = False  # compile each block (tangent passes stay eager)
    # the video
    state_ch: int = 16  # latent channels
    state_t: int = 21  # latent frames
    resolution: str = "480p"  # with aspect_ratio: the latent size, unless latent_hw is given
    aspect_ratio: str = "16:9"  # width to height
    latent_hw: tuple[int, int] | None = None  # latent height and width; null = from resolution and aspect_ratio
    input_data_key: str = "videos"  # batch key of decoded videos
    input_latent_key: str = "latents"  # batch key of latents
    input_caption_key: str = "prompts"  # batch key of prompts
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    text_encoder_class: Literal["umT5", "toy"] = "umT5"  # encoder of sample prompts and of the negative prompt
    text_encoder_path: str = ""  # umT5: its weights, the tokenizer's folder beside them; "" = prompts must come with embeddings
    text_cache: str = ""  # folder where umT5's embeddings are kept between runs; "" = none
    neg_embed_path: str = ""  # stored embedding of the negative prompt; "" = encode it with the text encoder
    rectified_flow_t_scaling_factor: float = 1000.0  # network timestep of t = 1 (fixed by the released weights)
    # objective
    p_G: TimeLawConfig = field(default_factory=TimeLawConfig)  # student times
    p_D: TimeLawConfig = field(default_factory=lambda: TimeLawConfig(law="uniform_shift"))  # times of DMD and fake score
    loss_scale: float = 100.0  # factor of the consistency / diffusion loss; 0 = term off
    loss_scale_dmd: float = 1.0  # factor of the DMD loss
    student_update_freq: int = 5  # 1 student iteration, then this number - 1 fake-score iterations
    max_simulation_steps_fake: int = 4  # longest rollout of the step-count cycle
    tangent_warmup: int = 0  # iterations over which the JVP term of sCM fades in
    dcm_total_steps: int = 48  # N of the discrete consistency grid
    dcm_skipping_interval_steps: int = 1  # teacher steps between the two points of a pair

    def latent_size(self) -> tuple[int, int]:
        """Latent (height, width): `latent_hw`, or the table entry of resolution and aspect ratio. `KeyError` if the table has none."""
        if self.latent_hw is not None:
            return self.latent_hw
        width, height = PIXELS[self.resolution, self.aspect_ratio]
        return height // VAE_STRIDE, width // VAE_STRIDE


@dataclass(frozen=True)
class RCMConfig(CommonModelConfig):
    """`model=fsdp_t2v_distill_rcm`: bidirectional rCM (docs/reference/training.md#bidirectional-keys)."""

    net_teacher: NetConfig | None = None  # the diffusion teacher
    teacher_ckpt: str = ""  # its weights; the student starts from them too unless student_ckpt is set
    teacher_guidance: float = 5.0  # classifier-free guidance of the teacher; <= 1 skips the unconditional pass
    p_D: TimeLawConfig = field(default_factory=lambda: TimeLawConfig(law="lognormal", p_mean=0.0))
    sigma_data: float = 1.0  # fixed
    sigma_max: float = 80.0  # first noise level when sampling
    cm_type: Literal["scm", "dcm"] = "scm"  # continuous or discrete consistency
    use_rf_scm: bool = False  # sCM in rectified-flow form instead of TrigFlow
    tangent_form: Literal["paper", "release"] = "paper"  # warm-up of the TrigFlow tangent: release leaves its JVP term unscaled
    fd_type: Literal[0, 1, 2] = 0  # 0 exact JVP, 1 semi-continuous, 2 discrete difference
    fd_size: float = 1e-4  # step of the difference, radians
    backward_timesteps: tuple[float, ...] = (1.5, 1.4, 1.0)  # TrigFlow angles after pi/2, when dmd_fix_timesteps
    dmd_fix_timesteps: bool = False  # rollout times from backward_timesteps instead of p_D
    dcm_timestep_shift: float = 5.0  # shift of the discrete grid


@dataclass(frozen=True)
class CausalConfig(CommonModelConfig):
    """`model=fsdp_t2v_causal`: causal training (docs/reference/training.md#causal-keys). `sigma_max` is used when sampling only."""

    training_type: TrainingType = "tf"  # the stage
    net_causal_teacher: NetConfig | None = None  # stages tf_dcm, tf_scm, tf_dscm
    net_bidirectional_teacher: NetConfig | None = None  # stage sf_dmd
    causal_teacher_ckpt: str = ""  # weights of net_causal_teacher
    bidirectional_teacher_ckpt: str = ""  # weights of net_bidirectional_teacher (and of the fake score, unless fake_score_ckpt)
    causal_guidance: float = 3.0  # guidance of the causal teacher
    bidirectional_guidance: float = 5.0  # guidance of the bidirectional teacher
    sigma_max: float = 1600.0  # first noise level when sampling
    first_chunk_t: int = 1  # latent frames of block 0; set by pattern=cF-C (0 = unset, a template)
    chunk_t: int = 1  # latent frames of each later block
    loss_scale_fake_score: float = 1.0  # factor of the fake score's loss
    loss_weighting: Literal["none", "gaussian_bell"] = "none"  # time weight of velocity regression
    df_timestep_strategy: Literal["random", "same", "fopp"] = "random"  # per-block times of diffusion forcing
    sample_timestep_shift: float = 3.0  # shift of the tf_dcm grid and of many-step sampling
    backward_timesteps: tuple[float, ...] = (15 / 16, 5 / 6, 5 / 8)  # RF times after t = 1 in a rollout
    shift3_backward: bool = False  # use (0.9, 0.75, 0.5) instead (resolved away by compose)
    replayed_training: bool = False  # back-propagate one block at a time (sf_dmd)
    sf_simulation_steps_per_chunk: tuple[int, ...] = ()  # largest step count per chunk, last repeats; () = max_simulation_steps_fake
    sf_backward_timestep_schedules: tuple[tuple[float, ...], ...] = ()  # RF times per entry above; () = from backward_timesteps
    context_from_last_step: bool = False  # noisy context: keep the KV of the last denoising input
    context_from_last_step_start_chunk: int = 0  # first chunk index with noisy context
    kd_timesteps: tuple[float, ...] = (1.0, 15 / 16, 5 / 6, 5 / 8)  # RF times of trajectory entries 1.. of ODE-pair data (entry 0 is clean)
