"""Running VBench in its own environment: a command per dimension, over a folder of videos."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rcm.core.errors import ConfigError
from rcm.core.files import discard
from rcm.evaluation import vbench_driver
from rcm.evaluation.vbench_results import SUFFIX
from rcm.evaluation.vbench_score import SUITES
from rcm.train.describe import write_atomically

DRIVER = Path(vbench_driver.__file__)
CUT = ("split_clip", "split_scene", "temporal_filtered_cilps")
"""Folders of VBench-Long's clips, spelt as it does."""
SCORED_SAMPLES = 5
"""VBench looks at samples 0 to 4 of a prompt, whatever else is there."""


@dataclass(frozen=True)
class Launch:
    """How to run VBench. `python` of its environment; `gpus` of one machine (more than 1:
    torchrun); `cache` of its model files; `local`: use them without asking the network;
    `repository`: a clone of VBench, which its long and image-to-video suites read files from.
    """

    python: Path
    output: Path
    suite: str = "t2v"
    device: str = "cuda"
    gpus: int = 1
    cache: Path | None = None
    local: bool = False
    repository: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.gpus > 1 and self.device == "cpu":
            raise ConfigError(f"--ngpus {self.gpus} on cpu: several only on cuda")

    @property
    def view(self) -> Path:
        return self.output / "videos"

    @property
    def full_json(self) -> Path:
        return self.output / "scored_prompts.json"

    def result(self, dimension: str) -> Path:
        return self.output / f"{dimension}{SUFFIX}"

    def command(self, dimension: str) -> list[str]:
        """The command line that scores one dimension."""
        if self.suite == "long":
            return self._long(dimension)
        words = ["--suite", self.suite, "--dimension", dimension, "--videos", self.view]
        words += ["--full_json", self.full_json, "--output", self.output, "--device", self.device]
        words += ["--local", int(self.local), "--options", json.dumps(dict(self.options))]
        many = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.gpus}"]
        launcher = many if self.gpus > 1 else []
        return [str(word) for word in (self.python, *launcher, DRIVER, *words)]

    def _long(self, dimension: str) -> list[str]:
        if self.repository is None:
            raise ConfigError(
                "--suite long runs VBench-Long from a clone of github.com/Vchitect/VBench; say"
                " where with --vbench_repo DIR"
            )
        script = self.repository.absolute() / "vbench2_beta_long" / "eval_long.py"
        words = [self.python, script, "--videos_path", self.view, "--dimension", dimension]
        words += ["--output_path", self.output, "--full_json_dir", self.full_json]
        words += ["--mode", "long_vbench_standard", "--dev_flag"]
        words += ["--static_filter_flag"] if dimension == "temporal_flickering" else []
        words += ["--load_ckpt_from_local", "1"] if self.local else []
        return [str(word) for word in words]

    def environment(self) -> dict[str, str]:
        """Variables of the command beyond the caller's: VBench reads names and prompts, of which
        one is no ASCII, in the encoding of the locale.
        """
        extra = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "PYTHONUTF8": "1"}
        if self.cache is not None:
            extra["VBENCH_CACHE_DIR"] = str(self.cache)
        return extra

    def check(self, dimension: str) -> str | None:
        """What is wrong with a dimension's module in the environment; None if it imports."""
        words = [str(self.python), str(DRIVER), "--check", "--dimension", dimension]
        env = os.environ | self.environment()
        try:
            done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=600)
        except subprocess.TimeoutExpired:
            return "it takes more than ten minutes"
        if done.returncode == 0:
            return None
        return (done.stderr.strip().splitlines() or ["no message"])[-1][:200]

    def run(self, dimension: str) -> None:
        """Score one dimension; `ConfigError` quotes VBench where it leaves no result."""
        if not self.python.is_file():
            raise ConfigError(
                f"no Python of a VBench environment at {self.python}; make one with `rcm"
                " vbench env`, or name one with --vbench_python"
            )
        if (
            self.suite == "i2v"
            and self.repository is None
            and SUITES["i2v"][dimension].group == "i2v"
        ):
            raise ConfigError(
                f"{dimension} reads the images of the suite in a clone of VBench; say where with"
                " --vbench_repo DIR (github.com/Vchitect/VBench)"
            )
        log = self.output / f"{dimension}.log"
        before = set(self.output.glob(f"*{SUFFIX}"))
        with log.open("wb") as out:
            done = subprocess.run(
                self.command(dimension),
                env=os.environ | self.environment(),
                cwd=self.repository,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        written = set(self.output.glob(f"*{SUFFIX}")) - before
        if self.suite != "long":  # other commands may be scoring other dimensions here
            written &= {self.result(dimension)}
        if done.returncode or not written:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise ConfigError(
                f"VBench failed on {dimension} (exit status {done.returncode}):"
                f" {lines[-1][:200] if lines else '?'}; see {log}"
            )
        if self.suite == "long":
            os.replace(written.pop(), self.result(dimension))  # its own name holds the time


def prepare(launch: Launch, videos: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Link `videos`' mp4 files and list the prompts to score. VBench names files by the suffix of
    whatever entry it sees first, so nothing else may lie among the links; but VBench-Long puts the
    clips that it cuts there, and would go on with those of other videos.
    """
    launch.view.mkdir(parents=True, exist_ok=True)
    if launch.view.samefile(videos):
        raise ConfigError(
            f"{launch.view}, where links to the videos go, is the folder of the videos itself; name"
            " another folder of results with --result_dir"
        )
    wanted = {path.name: Path(os.path.realpath(path)) for path in videos.glob("*.mp4")}
    there = {path.name: path.readlink() for path in launch.view.iterdir() if path.is_symlink()}
    if there != wanted:
        for name in (*CUT, *(name for name in there if wanted.get(name) != there[name])):
            discard(launch.view / name)
    for name in sorted(wanted):
        if not (launch.view / name).is_symlink():
            (launch.view / name).symlink_to(wanted[name])
    listed = [{k: v for k, v in row.items() if k != "video_list"} for row in rows]
    write_atomically(launch.full_json, json.dumps(listed, ensure_ascii=False))


def missing_videos(videos: Path, rows: Sequence[Mapping[str, Any]], dimension: str) -> list[str]:
    """Files that VBench would not find, or find empty; it only warns of the first, passes over the
    others in temporal_flickering, and scores what there is.
    """
    prompts = [row["prompt_en"] for row in rows if dimension in row["dimension"]]
    names = [f"{prompt}-{sample}.mp4" for prompt in prompts for sample in range(SCORED_SAMPLES)]
    return [name for name in names if not holds_bytes(videos / name)]


def holds_bytes(path: Path) -> bool:
    """Whether there is a file that is not empty."""
    return path.is_file() and path.stat().st_size > 0
