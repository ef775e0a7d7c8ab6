"""Values that the commands of data sets and plans cannot work with: refused before any work, naming
the flag.
"""

from __future__ import annotations

from pathlib import Path

from scripts import build_dataset, build_ode_pairs, plan
from tests.faults.case import Fault, each

SMALL = ("--source", "toy", "--num", "2", "--size", "4x4", "--frames", "3")
HUGE = "9" * 20


def toy(name: str, refusal: str, *words: str) -> Fault:
    """A build of toy videos with these words."""

    def left_nothing(folder: Path) -> None:
        assert not list(folder.glob("out/*.tar"))

    argv = lambda folder: [*SMALL, "--out", folder / "out", *words]  # noqa: E731
    return Fault(name, kind="values of build_dataset", refusal=refusal, main=build_dataset.main, argv=argv, after=left_nothing, deadline=5)


def teacher(name: str, refusal: str, *words: str) -> Fault:
    """A build from a teacher that is not there: what these words say is refused first."""

    def argv(folder: Path) -> list[object]:
        (folder / "prompts.txt").write_text("a red fox\n")
        return ["--source", "teacher", "--teacher", folder / "none", "--prompts", folder / "prompts.txt", "--out", folder / "out", *words]

    return Fault(name, kind="values of build_dataset", refusal=refusal, main=build_dataset.main, argv=argv, deadline=5)


def pairs(name: str, refusal: str, *words: str) -> Fault:
    """Trajectories of a teacher that is not there."""
    argv = lambda folder: ["--teacher", folder / "none", "--out", folder / "out", *words]  # noqa: E731
    return Fault(name, kind="values of build_ode_pairs", refusal=refusal, main=build_ode_pairs.main, argv=argv, deadline=5)


def planned(name: str, refusal: str, *words: str) -> Fault:
    """A plan of a toy run with these words."""
    argv = lambda folder: ["experiment=toy_tf_c3-3", *words]  # noqa: E731
    return Fault(name, kind="values of plan", refusal=refusal, main=plan.main, argv=argv, deadline=5)


CASES = [
    toy("num 0", "num=0", "--num", "0"),
    toy("num negative", "num=-1", "--num=-1"),
    toy("num huge", "num=9", "--num", HUGE),
    toy("shard size 0", "shard-size=0", "--shard-size", "0"),
    toy("seed of 20 digits", "--seed 9", "--seed", HUGE),
    toy("seed negative", "--seed -1", "--seed=-1"),
    toy("seed beyond 32 bits", "--seed 4294967296", "--seed", "4294967296"),
    toy("size of no area", "HEIGHTxWIDTH", "--size", "0x8"),
    toy("size beyond memory", "--size", "--size", "100000x100000"),
    toy("no frames", "frames", "--frames", "0"),
    toy("negative frames", "frames", "--frames=-3"),
    toy("frames that do not fold", "frames", "--frames", "4"),
    toy("no shapes", "num[-_]shapes", "--num-shapes", "0"),
    toy("many shapes", "num[-_]shapes", "--num-shapes", "100000"),
    toy("negative turns", "turns", "--turns=-1"),
    toy("share above 1", "empty-prompts", "--empty-prompts", "1.5"),
    toy("share nan", "empty-prompts", "--empty-prompts", "nan"),
    toy("no text rows", "text[-_]len", "--text-len", "0"),
    toy("no text width", "text[-_]dim", "--text-dim", "0"),
    toy("video codec for toys", "wan_vae is for real videos", "--codec", "wan_vae"),
    toy("no folder of videos", "no_such", "--source", "videos", "--input", "no_such_folder"),
    toy("no hop", "hop", "--source", "videos", "--input", "nowhere", "--hop", "0"),
    toy("no stride", "stride", "--source", "videos", "--input", "nowhere", "--frame-stride", "0"),
    teacher("shift 0", "--timestep_shift 0", "--timestep_shift", "0"),
    teacher("shift negative", "--timestep_shift -1", "--timestep_shift=-1"),
    teacher("guidance nan", "--guidance_scale nan", "--guidance_scale", "nan"),
    teacher("sigma 0", "--sigma_max 0", "--sigma_max", "0"),
    teacher("sigma infinite", "--sigma_max inf", "--sigma_max", "inf"),
    teacher("no steps", "num_steps=0", "--num_steps", "0"),
    teacher("endless steps", "num_steps=1000000000", "--num_steps", "1000000000"),
    teacher("no batch", "batch=0", "--batch", "0"),
    teacher("seeds that run out", "--seed 4294967295.*4 in a row", "--seed", "4294967295", "--num_samples", "4"),
    pairs("guidance infinite", "guidance=inf", "--guidance", "inf"),
    pairs("guidance nan", "guidance=nan", "--guidance", "nan"),
    pairs("shift 0", "shift=0", "--shift", "0"),
    pairs("shift tiny", "shift=1e-300", "--shift", "1e-300"),
    pairs("shift nan", "shift=nan", "--shift", "nan"),
    pairs("num 0", "num=0", "--num", "0"),
    pairs("batch 0", "batch=0", "--batch", "0"),
    pairs("shard size negative", "shard-size=-1", "--shard-size=-1"),
    pairs("seed of 20 digits", "--seed 9", "--seed", HUGE),
    pairs("no device", "--device nowhere", "--device", "nowhere"),
    pairs("device without memory", "meta has no memory", "--device", "meta"),
    pairs("time 0", "times.*0", "--times", "1", "0"),
    pairs("time of no number", "time", "--times", "1/0"),
    pairs("times that grow", "decrease", "--times", "0.5", "0.75"),
    pairs("part of none", "0/0", "--part", "0/0"),
    planned("gpus 0", "gpus=0", "gpus=0"),
    planned("gpus huge", "gpus=99999", "gpus=" + HUGE),
    planned("gpus of 5000 digits", "gpus=1111", "gpus=" + "1" * 5000),
    planned("gpus of other digits", "gpus=", "gpus=²"),
    planned("no batch", "global_batch=0", "global_batch=0"),
    planned("memory nan", "memory_gib=nan", "memory_gib=nan"),
    planned("memory infinite", "memory_gib=inf", "memory_gib=inf"),
    planned("memory negative", "memory_gib=-1", "memory_gib=-1"),
    planned("unknown card", "unknown gpu='abacus'", "gpu=abacus"),
    planned("no latents", "latent_hw", "gpus=1", "model.config.latent_hw=[0,0]"),
    planned("no layers", "num_layers=0", "gpus=1", "model.config.net.num_layers=0"),
]


@each(CASES)
def test_refused(case: Fault, tmp_path: Path) -> None:
    case.check(tmp_path)


def test_many_ranks_are_planned_at_once(tmp_path: Path) -> None:
    """The largest number of ranks that is taken."""
    words = ["experiment=toy_tf_c3-3", "gpus=65536"]
    Fault("65536 ranks", kind="values of plan", refusal=None, main=plan.main, argv=lambda folder: words, deadline=10).check(tmp_path)
