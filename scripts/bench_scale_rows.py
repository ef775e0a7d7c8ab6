"""The rows of `scripts.bench_scale`: recipe, network and layout, as words of the command line of
`scripts.train`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from rcm.configs.compose import Run, compose_run
from rcm.configs.network import networks
from rcm.configs.plan_job import plan_job
from rcm.core.errors import ConfigError
from rcm.train.planner import Prediction, predict
from rcm.train.planner_card import Card
from scripts.bench_scale_flops import iteration_flops

M = "model.config"
EXPERIMENTS = {
    "tf_diffusion": "causal_wan2pt1_{size}_res480p_t2v_tf_c3-3",
    "tf_dcm": "causal_wan2pt1_1pt3B_res480p_t2v_tf_dcm_c3-3",
    "tf_scm": "causal_wan2pt1_1pt3B_res480p_t2v_tf_scm_c3-3",
    "sf_dmd": "causal_wan2pt1_1pt3B_res480p_t2v_sf_dmd_c3-3",
    "sf_dmd_replayed": "causal_wan2pt1_1pt3B_res480p_t2v_sf_dmd_c3-3_replayed",
    "rcm": "wan2pt1_{size}_res480p_t2v_rCM",
}
"""Recipe -> published experiment. Those without a size train the 1.3B student under 14B teachers;
their 14B rows change the student.
"""

SIZES = {"1.3B": "1pt3B", "14B": "14B"}
LAYOUTS = {
    "one": (1, 1, 1),
    "fsdp": (2, 1, 1),
    "ulysses2": (2, 1, 2),
    "ulysses4": (4, 1, 4),
    "hsdp": (4, 2, 1),
}
"""Layout -> (divisor of the number of ranks, copies of the parameters, ranks that share a sample).
"one" is one rank.
"""

NO_FILES = (
    "dataloader_train.kind=fake",
    "dataloader_train.num_workers=0",
    "dataloader_train.num_videos=64",
    f"{M}.allow_random_init=True",
)
TINY = {"dim": 128, "ffn_dim": 512, "num_heads": 4, "num_layers": 3}
TINY |= {"text_dim": 64, "text_len": 16, "freq_dim": 32}
TINY_VIDEO = (f"{M}.latent_hw=[16,16]", f"{M}.state_t=6")
MODE = f"{M}.net.sac_config.mode="
QUICK = 8.0
"""Seconds of an iteration, all kinds together, that may be warmed up twice."""

TIGHT = 0.94
"""Share of the card that a prediction may fill; beyond it the allocator runs short in practice."""

LEAN = (f"{M}.ema.enabled=False",)
"""What a row leaves out, and says so, where it does not fit as it is: the average can be taken over
checkpoints.
"""


@dataclass(frozen=True)
class Row:
    """One measurement. `variant` names what `words` change of the published experiment; `reduce`:
    dtype in which gradients are averaged, "" for float32.
    """

    recipe: str
    net: str
    layout: str
    variant: str = ""
    words: tuple[str, ...] = ()
    reduce: str = ""

    @property
    def name(self) -> str:
        """RECIPE-NET-LAYOUT, then the variant."""
        return "-".join(part for part in (self.recipe, self.net, self.layout, self.variant) if part)

    def is_possible(self, ranks: int) -> bool:
        """Whether `ranks` ranks can take the layout."""
        if self.layout == "one":
            return ranks == 1
        return ranks > 1 and ranks % LAYOUTS[self.layout][0] == 0

    def overrides(self, ranks: int) -> list[str]:
        """The experiment and its changes on `ranks` ranks."""
        _, copies, context = LAYOUTS[self.layout]
        experiment = EXPERIMENTS[self.recipe].format(size=SIZES[self.net])
        is_small = self.net != "14B" or "{size}" in EXPERIMENTS[self.recipe]
        grown = [] if is_small else ["net=wan2pt1_14b"]
        layout = [
            f"{M}.fsdp_shard_size={ranks // copies}",
            f"model_parallel.context_parallel_size={context}",
        ]
        return [f"experiment={experiment}", *grown, *layout, *self.words]


_KEEP = (MODE + "block_wise_keep_attention",)
_KEEP_MLP = (MODE + "block_wise_keep_attention_mlp",)
_ALL_SMALL = ("net_bidirectional_teacher=wan2pt1_1pt3b", "net_fake_score=wan2pt1_1pt3b")
_TWICE = ("trainer.grad_accum_iter=2",)
_EACH = ("trainer.gradient_sync=each",)
_HALF = ("optimizer.states=bfloat16",)
_FP8 = (f"{M}.net.linear_precision=fp8",)
_LORA = (f"{M}.lora.rank=64",)
_GAN = (f"{M}.gan.loss_scale=0.1",)
_IDLE = ("trainer.offload.idle_roles=True",)
_LIVES = (*_IDLE, "trainer.offload.parameters=True")


def _keep_last(blocks: int) -> tuple[str, ...]:
    return (f"{M}.net.sac_config.keep_last_blocks={blocks}",)


def _states(form: str) -> tuple[str, ...]:
    return (f"optimizer.states={form}", f"{M}.optimizer_fake_score.states={form}")


_STATES_WAIT = ("trainer.offload.states=True",)
_WAITING = (*_EACH, *_STATES_WAIT, *_states("bfloat16"), *LEAN)

LEVERS = {
    "states": _STATES_WAIT,
    "idle_roles": _IDLE,
    "parameters": _LIVES,
    "bfloat16_states": _states("bfloat16"),
    "fp8_storage": (f"{M}.frozen_weights=fp8_storage",),
    "fp8": (f"{M}.frozen_weights=fp8",),
    "gathered_anew": ("trainer.keep_gathered_gib=0",),
    "float8_states": _states("float8"),
    "int8_states": _states("int8"),
}
"""Ways to save memory (docs/scale.md), each timed alone on one card beside the row without; the
last two need torchao.
"""

ROWS = (
    Row("tf_diffusion", "1.3B", "one"),
    Row("tf_diffusion", "1.3B", "fsdp"),
    Row("tf_diffusion", "1.3B", "ulysses4"),
    Row("tf_diffusion", "14B", "fsdp", "keep_attention", _KEEP),
    Row("sf_dmd", "1.3B", "ulysses4"),
    Row("tf_diffusion", "14B", "ulysses4", "keep_attention_mlp", _KEEP_MLP),
    Row("tf_scm", "14B", "ulysses4", "keep_attention_mlp", _KEEP_MLP),
    Row(
        "tf_diffusion", "14B", "ulysses4", "keep_attention_mlp_last8", (*_KEEP_MLP, *_keep_last(8))
    ),
    Row("sf_dmd", "14B", "ulysses4"),
    Row("tf_diffusion", "14B", "ulysses4"),
    Row("tf_scm", "14B", "ulysses4"),
    Row("tf_dcm", "14B", "ulysses4"),
    Row("rcm", "14B", "ulysses4", "block_wise", (MODE + "block_wise",)),
    Row("tf_diffusion", "1.3B", "ulysses2"),
    Row("tf_diffusion", "1.3B", "hsdp"),
    Row("tf_scm", "1.3B", "ulysses4"),
    Row("sf_dmd_replayed", "1.3B", "ulysses4"),
    Row("tf_diffusion", "1.3B", "fsdp", "accumulate2_last", _TWICE),
    Row("tf_diffusion", "1.3B", "fsdp", "accumulate2_each", (*_TWICE, *_EACH)),
    Row("tf_diffusion", "1.3B", "fsdp", "bf16_reduce", reduce="bfloat16"),
    Row("tf_diffusion", "14B", "ulysses4", "keep_attention", _KEEP),
    Row("tf_scm", "14B", "ulysses4", "keep_attention", _KEEP),
    Row("sf_dmd_replayed", "14B", "ulysses4", "each", _EACH),
    Row("tf_diffusion", "14B", "ulysses4", "accumulate2_each", (*_TWICE, *_EACH)),
    Row("tf_diffusion", "14B", "ulysses4", "bf16_reduce", reduce="bfloat16"),
    Row("tf_dcm", "1.3B", "ulysses4"),
    Row("rcm", "1.3B", "fsdp"),
    Row("tf_diffusion", "14B", "ulysses2"),
    # two cards of 139 GiB hold 14B with moments in 16 bits; the average is made over checkpoints
    Row("tf_diffusion", "14B", "ulysses2", "keep_attention_lean", (*_KEEP, *_HALF, *LEAN)),
    Row("tf_diffusion", "14B", "ulysses2", "keep_attention_mlp_lean", (*_KEEP_MLP, *_HALF, *LEAN)),
    Row("tf_scm", "14B", "ulysses2", "keep_attention_lean", (*_KEEP, *_HALF, *LEAN)),
    Row("tf_dcm", "14B", "ulysses2", "keep_attention_lean", (*_KEEP, *_HALF, *LEAN)),
    # of two trained networks only the weights stay on the card
    Row("sf_dmd_replayed", "14B", "ulysses2", "states_lean", _WAITING),
    Row("rcm", "14B", "ulysses2", "states_lean", (*_WAITING, MODE + "block_wise")),
    Row("tf_diffusion", "14B", "fsdp"),
    Row("tf_scm", "14B", "fsdp"),
    Row("tf_scm", "1.3B", "one"),
    Row("tf_scm", "1.3B", "one", "small_teacher", ("net_causal_teacher=wan2pt1_1pt3b",)),
    Row("tf_diffusion", "1.3B", "one", "keep_attention", _KEEP),
    Row("tf_diffusion", "1.3B", "one", "keep_attention_mlp", _KEEP_MLP),
    Row("tf_diffusion", "1.3B", "one", "fp8_products", _FP8),
    Row("tf_diffusion", "1.3B", "one", "keep_attention_last", (*_KEEP, *_keep_last(1))),
    Row("tf_diffusion", "14B", "ulysses4", "keep_attention_fp8_products", (*_KEEP, *_FP8)),
    Row("tf_scm", "14B", "ulysses4", "keep_attention_fp8_products", (*_KEEP, *_FP8)),
    Row("tf_dcm", "1.3B", "one"),
    Row("sf_dmd", "1.3B", "one", "small_roles", _ALL_SMALL),
    Row("sf_dmd_replayed", "1.3B", "one", "small_roles", _ALL_SMALL),
    Row("rcm", "1.3B", "one"),
    Row("sf_dmd_replayed", "1.3B", "one", "lora", (*_ALL_SMALL, *_LORA)),
    Row("sf_dmd_replayed", "1.3B", "one", "gan", (*_ALL_SMALL, *_GAN)),
    # all roles are adapters on one base, so one card holds 14B
    Row("tf_diffusion", "14B", "one", "lora", _LORA),
    Row("tf_scm", "14B", "one", "lora", _LORA),
    Row("rcm", "14B", "one", "lora", (*_LORA, MODE + "block_wise")),
    Row("sf_dmd_replayed", "14B", "one", "lora", _LORA),
    # as published: the fake score is adapters on the 14B teacher, the student on its own base
    Row("sf_dmd_replayed", "1.3B", "one", "lora_published_roles", _LORA),
    Row("tf_scm", "1.3B", "fsdp"),
    Row("tf_scm", "1.3B", "ulysses2"),
    Row("sf_dmd", "1.3B", "fsdp"),
    *(
        Row("sf_dmd_replayed", "1.3B", "one", f"lever_{name}", (*_ALL_SMALL, *words))
        for name, words in LEVERS.items()
    ),
    Row("tf_scm", "1.3B", "one", "lever_fp8_storage", LEVERS["fp8_storage"]),
    Row("tf_scm", "1.3B", "one", "lever_fp8", LEVERS["fp8"]),
    # as `rcm plan --smallest` lays them out; the first asks 207 GiB of the host
    Row("sf_dmd_replayed", "1.3B", "one", "published_waiting", (*_STATES_WAIT, *_IDLE)),
    Row("sf_dmd_replayed", "1.3B", "one", "lever_least", (*_LIVES, MODE + "block_wise")),
    Row("sf_dmd_replayed", "14B", "one", "lever_least", (*_EACH, *_LIVES, MODE + "block_wise")),
)
"""In order of importance: a run stops where its budget does."""


def chosen(patterns: str | None, *, ranks: int) -> tuple[tuple[Row, ...], list[str]]:
    """The rows that `ranks` ranks can run, in order, or those of them that `patterns` (names or
    globs, joined by commas) names, in its order; and the patterns that name none, for lent machines
    are too dear to be given back for a typing error. `ConfigError` if nothing is left.
    """
    possible = [row for row in ROWS if row.is_possible(ranks)]
    if patterns is None:
        return tuple(possible), []
    found: dict[str, Row] = {}
    unknown: list[str] = []
    for pattern in patterns.split(","):
        named = [row for row in possible if fnmatchcase(row.name, pattern)]
        found |= {row.name: row for row in named}
        if not named:
            unknown.append(pattern)
    if not found:
        raise ConfigError(
            f"--rows {patterns}: no such row on {ranks} rank(s); `--list` shows the names"
        )
    return tuple(found.values()), unknown


def composed(row: Row, *, ranks: int, tiny: bool, more: Sequence[str] = ()) -> Run:
    """The run of a row with made-up data and random weights. `tiny`: every network and the video at
    a size for CPU tests.

    `ConfigError` where the configuration refuses, a key it does not know included.
    """
    words = [*row.overrides(ranks), *NO_FILES, *more]
    run = compose_run(words, world_size=ranks, require_inputs=False)
    if not tiny:
        return run
    nets, sizes = networks(run.config.model.config), TINY.items()
    words += [f"{M}.{key}.{name}={value}" for key in nets for name, value in sizes]
    return compose_run([*words, *TINY_VIDEO], world_size=ranks, require_inputs=False)


@dataclass(frozen=True)
class Planned:
    """A row as it will be run: its configuration, what the planner says of it, words that were left
    out to fit, and model FLOPs by role.
    """

    row: Row
    run: Run
    prediction: Prediction
    lean: tuple[str, ...]
    flops: dict[str, float]

    @property
    def warm(self) -> int:
        """Iterations of each kind before those that count: two where that is cheap, for the second
        still finds the allocator new to the optimiser's states.
        """
        return 2 if sum(phase.seconds for phase in self.prediction.phases) < QUICK else 1

    def iterations_seconds(self, turns: int) -> float:
        """Of all iterations of the row."""
        return (self.warm + turns) * sum(phase.seconds for phase in self.prediction.phases)


def planned(row: Row, *, ranks: int, on: Card, tiny: bool, fused: bool) -> Planned:
    """The row as it is, or, where that does not fit, without what `LEAN` leaves out. `ConfigError`
    for keys that are not known.
    """
    how = {"ranks": ranks, "on": on, "tiny": tiny, "fused": fused}
    found = _planned(row, (), **how)
    fits = found.prediction.reserved <= TIGHT * on.gib * 2**30
    return found if fits else _planned(row, LEAN, **how)


def _planned(
    row: Row, lean: tuple[str, ...], *, ranks: int, on: Card, tiny: bool, fused: bool
) -> Planned:
    run = composed(row, ranks=ranks, tiny=tiny, more=lean)
    once = job = plan_job(run, ranks=ranks, fused=fused)
    job = replace(job, reduce_bytes=2) if row.reduce else job
    if row.recipe == "sf_dmd_replayed":
        model = replace(run.config.model.config, replayed_training=False)
        config = replace(run.config, model=replace(run.config.model, config=model))
        once = plan_job(replace(run, config=config), ranks=ranks, fused=fused)
    flops = {phase.role: iteration_flops(once, phase) for phase in once.phases}
    return Planned(row, run, predict(job, on), lean, flops)
