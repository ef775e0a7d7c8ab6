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
    toy("size of no area", "HEIGHTxWIDTH", "--size", "0x8"),
    toy("size beyond memory", "--size", "--size", "100000x100000"),
    toy("frames that do not fold", "frames", "--frames", "4"),
    toy("video codec for toys", "wan_vae is for real videos", "--codec", "wan_vae"),
    toy("no folder of videos", "no_such", "--source", "videos", "--input", "no_such_folder"),
    teacher("seeds that run out", "--seed 4294967295.*4 in a row", "--seed", "4294967295", "--num_samples", "4"),
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
