"""The embedded recipe, end to end on two CPU cores: data, bidirectional teacher, causal teachers, consistency students, self-forced DMD,
streaming in 1, 2 and 4 steps, frame-wise and chunk-wise, scored against an exact world.

`python -m scripts.demo` writes report.html, report.json and mp4 files to outputs/demo, prints a table, and exits 1 if a stage misses its
gate. Every stage is an ordinary experiment (configs/experiment/toy_*.yaml) run through the training entry point.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rcm.configs import registry_distill
from rcm.configs.compose import compose_run
from rcm.evaluation.report import write_report
from rcm.pipelines.from_checkpoint import LoadedModel, open_checkpoint
from rcm.pipelines.video_io import contact_sheet, write_mp4
from rcm.rollout.recipe import SamplingRecipe
from rcm.worlds.toy_scores import ToyScorer
from rcm.worlds.toy_world import ToyWorld
from scripts.demo_gates import SELF_FORCED_START, Scores, judge
from scripts.demo_world import DATA_ARGUMENTS, WORLD

PATTERNS = ("c3-3", "c1-1")
STEPS = ((4,), (4, 2), (4, 1))
"""Steps of the first and of later chunks: the 4-, 2- and 1-step samplers (spec/causal_inference 2)."""

VERDICTS = {True: "pass", False: "FAIL", None: "  - "}

LONG_FRAMES = 65
"""Pixel frames of the long streams: four windows of 17 that share their border frames."""

COLUMNS = ("score", "joint", "colour", "shape", "direction", "motion", "realism", "diversity")


@dataclass(frozen=True)
class Stage:
    """One training run: experiment, and which earlier stages feed which config keys."""

    name: str
    experiment: str
    feeds: dict[str, str] = field(default_factory=dict)


def branch(pattern: str) -> tuple[Stage, ...]:
    """The causal stages of one block pattern, in order."""
    tf, dcm, scm = f"tf_{pattern}", f"tf_dcm_{pattern}", f"tf_scm_{pattern}"
    causal = {"student_ckpt": tf, "causal_teacher_ckpt": tf}
    start = f"{SELF_FORCED_START[pattern]}_{pattern}"
    return (
        Stage(tf, f"toy_tf_{pattern}", {"student_ckpt": "bidirectional"}),
        Stage(dcm, f"toy_tf_dcm_{pattern}", causal),
        Stage(scm, f"toy_tf_scm_{pattern}", causal),
        Stage(f"sf_dmd_{pattern}", f"toy_sf_dmd_2step_{pattern}", {"student_ckpt": start, "bidirectional_teacher_ckpt": "bidirectional"}),
    )


FIRST = Stage("bidirectional", "toy_bidirectional")


class Demo:
    """State of one demo run: its folder, its seconds per stage, its scores."""

    def __init__(self, folder: Path, stages: Sequence[Stage], *, iterations_scale: float, num_videos: int) -> None:
        self.folder, self.scale, self.num_videos = folder, iterations_scale, num_videos
        self.iterations = {stage.experiment: published_iterations(stage.experiment) for stage in stages} if iterations_scale != 1 else {}
        self.seconds: dict[str, float] = {}
        self.world = ToyWorld(WORLD)
        self.scorer = ToyScorer(self.world)
        self.prompts = (self.world.prompts() * 8)[:num_videos]
        self.scores: dict[tuple[str, str], Scores] = {}
        self.drifts: dict[str, dict[str, float]] = {}
        self.videos: list[dict] = []

    def build_data(self) -> None:
        """Shards of the toy world in the release's layout."""
        begin = time.perf_counter()
        command = [sys.executable, "-m", "scripts.build_dataset", "--source", "toy", "--out", str(self.folder / "data"), *DATA_ARGUMENTS]
        _call(command, log=self.folder / "logs" / "data.log", threads=2)
        self.seconds["data"] = time.perf_counter() - begin

    def train(self, stage: Stage, *, threads: int) -> None:
        """Run one stage through `scripts.train` in its own process."""
        begin = time.perf_counter()
        overrides = [
            f"experiment={stage.experiment}",
            f"job.output_root={self.folder}",
            "job.project=runs",
            "job.group=",
            f"job.name={stage.name}",
            "data=toy_shards",
            f"dataloader_train.tar_path_pattern={self.folder}/data/*.tar",
            "trainer.progress_bar=False",
            "model.config.allow_random_init=" + str(not stage.feeds),
            *(f"model.config.{key}={self.run(source)}" for key, source in stage.feeds.items()),
        ]
        if self.scale != 1:
            overrides.append(f"trainer.max_iter={max(2, round(self.iterations[stage.experiment] * self.scale))}")
        _call([sys.executable, "-m", "scripts.train", *overrides], log=self.folder / "logs" / f"{stage.name}.log", threads=threads)
        self.seconds[stage.name] = time.perf_counter() - begin
        print(f"  {stage.name:<16} trained in {self.seconds[stage.name]:5.0f} s", flush=True)

    def run(self, name: str) -> Path:
        """Job folder of a stage."""
        return self.folder / "runs" / name

    def history(self, name: str) -> dict[str, list[list[float]]]:
        """Logged losses of a stage by term: [[step, loss], ...]."""
        curves: dict[str, list[list[float]]] = {}
        for line in (self.run(name) / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            for key, value in record.items():
                if key.startswith("loss/"):
                    curves.setdefault(key.removeprefix("loss/"), []).append([record["step"], value])
        return curves

    def evaluate(self, name: str) -> None:
        """Sample a stage's checkpoint with every step count it supports, score, and write a few videos."""
        begin = time.perf_counter()
        model = open_checkpoint(self.run(name))
        for label, recipe in sampling_plans(model):
            video, report = model.generate(self.prompts, recipe=recipe, seed=1234)
            scores = self.scorer.score(video.clamp(-1, 1), self.prompts).as_dict()
            self.scores[name, label] = Scores({**scores, "first_chunk_s": report.first_chunk, "fps": report.fps * len(self.prompts)})
            self._keep(name, label, video)
        if name.startswith("sf_dmd"):
            self.drifts[name] = self._drift(model)
        self.seconds[f"{name} (scoring)"] = time.perf_counter() - begin

    def _drift(self, model: LoadedModel) -> dict[str, float]:
        """Adherence per window of a stream four times as long as the training videos, 2 steps per later chunk."""
        prompts = self.prompts[: self.num_videos // 2]
        video, _ = model.generate(prompts, recipe=model.recipe.with_steps(4, 2), num_frames=LONG_FRAMES, seed=99)
        report = self.scorer.drift(video.clamp(-1, 1), prompts)
        windows = {f"adherence in window {i + 1}": value for i, value in enumerate(report.adherence)}
        return {**windows, "drift over 4 windows": report.drift}

    def _keep(self, name: str, label: str, video: torch.Tensor) -> None:
        folder = self.folder / "videos"
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{name}_{label}".replace(" ", "")
        shown = sorted({17 * i % len(self.prompts) for i in range(6)})  # 17: other shapes, colours and directions next to each other
        write_mp4(folder / f"{stem}.mp4", torch.cat([video[i] for i in shown], dim=-1), fps=6, scale=8)
        contact_sheet(folder / f"{stem}.png", video[shown], labels=[self.prompts[i] for i in shown], scale=4)
        caption = "; ".join(self.prompts[i] for i in shown)
        self.videos.append(
            {"title": label, "caption": caption, "path": f"videos/{stem}.mp4", "poster": f"videos/{stem}.png", "group": name}
        )


def published_iterations(experiment: str) -> int:
    """`trainer.max_iter` of an experiment."""
    registry_distill.register()
    return compose_run([f"experiment={experiment}"], require_inputs=False).config.trainer.max_iter


def sampling_plans(model: LoadedModel) -> list[tuple[str, SamplingRecipe | None]]:
    """(label, recipe) of the samplers shown for a checkpoint: its own many-step one, or 4, 2 and 1 steps."""
    recipe = model.recipe
    if recipe is None:
        return [("many steps", None)]
    if recipe.kind == "ode":
        return [("many steps", recipe)]
    return [(f"{steps[-1]} step{'s' if steps[-1] > 1 else ''}", recipe.with_steps(*steps)) for steps in STEPS]


def _call(command: Sequence[str], *, log: Path, threads: int) -> None:
    """Run a command with its output in `log`; on failure print the end of the log and stop the demo."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "WANDB_MODE": "disabled"}
    environment.pop("IMAGINAIRE_OUTPUT_ROOT", None)
    with open(log, "w") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if code:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise SystemExit(f"demo: {' '.join(command[1:4])} failed with exit code {code}; the end of {log}:\n{tail}")


def _machine(seconds: float) -> dict:
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "total seconds": round(seconds, 1),
        "date": time.strftime("%Y-%m-%d"),
    }


def _report(demo: Demo, stages: Sequence[Stage], verdicts: dict[str, tuple[str, bool | None]], seconds: float) -> None:
    rows = [
        {"stage": name, "steps": label, "scores": {column: scores.values[column] for column in COLUMNS}}
        for (name, label), scores in demo.scores.items()
    ]
    write_report(
        demo.folder,
        {
            "title": "Causal-rCM: the embedded recipe",
            "subtitle": "Moving coloured shapes, trained and streamed on this machine. Score 0 to 100; real videos score above 98.",
            "machine": _machine(seconds),
            "stages": [
                {
                    "name": stage.name,
                    "seconds": demo.seconds[stage.name],
                    "gate": verdicts[stage.name][0],
                    "passed": verdicts[stage.name][1],
                    "history": demo.history(stage.name),
                    "scores": demo.drifts.get(stage.name, {}),
                }
                for stage in stages
            ],
            "tables": [{"title": "Scores by stage and steps of later chunks", "rows": rows}],
            "videos": demo.videos,
        },
    )


def _print_table(demo: Demo, verdicts: dict[str, tuple[str, bool | None]]) -> None:
    print(f"\n{'stage':<16} {'steps':<11} " + " ".join(f"{c:>9}" for c in COLUMNS))
    for (name, label), scores in demo.scores.items():
        cells = " ".join(f"{scores.values[c]:9.1f}" if c == "score" else f"{scores.values[c]:9.2f}" for c in COLUMNS)
        print(f"{name:<16} {label:<11} {cells}")
    for name, drift in demo.drifts.items():
        print(f"{name:<16} streamed {LONG_FRAMES} frames: adherence drifts by {drift['drift over 4 windows']:+.1f}")
    print()
    for name, (sentence, passed) in verdicts.items():
        print(f"{VERDICTS[passed]}  {name:<16} {sentence}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns 1 if a gate was missed."""
    parser = argparse.ArgumentParser(prog="scripts.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder of everything the demo writes; emptied first")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all iterations; below 1 is a quick look without gates")
    parser.add_argument("--videos", type=int, default=96, help="videos sampled per score")
    args = parser.parse_args(argv)
    begin = time.perf_counter()
    if args.out.exists():
        shutil.rmtree(args.out)
    branches = [branch(pattern) for pattern in PATTERNS]
    stages = (FIRST, *(stage for one in branches for stage in one))
    demo = Demo(args.out, stages, iterations_scale=args.scale, num_videos=args.videos)
    print(f"training {len(stages)} stages on {os.cpu_count()} cores; logs in {args.out / 'logs'}", flush=True)
    demo.build_data()
    demo.train(FIRST, threads=max(1, min(2, os.cpu_count() or 1)))
    # The two patterns are independent from here on: one core each beats two threads on tensors this small.
    with ThreadPoolExecutor(len(branches)) as pool:
        list(pool.map(lambda one: [demo.train(stage, threads=1) for stage in one], branches))
    for stage in stages:
        demo.evaluate(stage.name)
    judged = args.scale >= 1
    verdicts = {stage.name: judge(stage.name, demo.scores) if judged else ("not judged", None) for stage in stages}
    seconds = time.perf_counter() - begin
    _report(demo, stages, verdicts, seconds)
    _print_table(demo, verdicts)
    print(f"\n{seconds:.0f} s in all; open {args.out / 'report.html'}")
    return 0 if all(passed in (True, None) for _, passed in verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
