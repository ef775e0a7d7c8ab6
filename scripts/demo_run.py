"""One stage of the demo: trained by the training entry point in a process of its own, then sampled,
scored and shown.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path

from rcm.configs import registry_distill
from rcm.configs.compose import compose_run
from rcm.evaluation.throughput import measure
from rcm.pipelines.from_checkpoint import LoadedModel, open_checkpoint
from rcm.rollout.recipe import SamplingRecipe
from rcm.storage.inside import pointed_at
from rcm.worlds.toy_scores import ToyScorer
from rcm.worlds.toy_world import ToyWorld
from scripts.demo_clips import keep_clips, keep_drift
from scripts.demo_gates import Scores
from scripts.demo_progress import Board
from scripts.demo_record import Record
from scripts.demo_stages import DATA, WORLD, Stage

STEPS = ((4,), (4, 2), (4, 1))
"""Steps of the first and of later chunks: the 4-, 2- and 1-step samplers."""
LONG_FRAMES = 65
"""Pixel frames of the long streams: four windows of 17 that share their border frames."""
LOOK_EVERY = 0.3
"""Seconds between two looks at a process, or at a stage that is waited for."""
SEED, LONG_SEED = 1234, 99
"""Every sampler gets the same noise, so that videos can be compared one by one."""


class Stopped(Exception):
    """The demo was asked to stop."""


class Failed(RuntimeError):
    """A training process failed; the message holds the end of its log."""


class Demo:
    """Trains and scores stages into `record.folder`; methods may run in several threads. `changed`
    is called after every result.
    """

    def __init__(
        self,
        record: Record,
        board: Board,
        *,
        scale: float,
        num_videos: int,
        changed: Callable[[], None],
    ) -> None:
        self.record, self.board, self.folder = record, board, record.folder
        self.scale, self.changed = scale, changed
        self.world = ToyWorld(WORLD)
        self.scorer = ToyScorer(self.world)
        self.prompts = list(islice(cycle(self.world.prompts()), num_videos))
        self._stop, self._running = threading.Event(), set[subprocess.Popen]()
        self._iterations = dict[str, int]()

    @property
    def long_prompts(self) -> list[str]:
        """Prompts of the long streams: half of them."""
        return self.prompts[: max(8, len(self.prompts) // 2)]

    def run(self, name: str) -> Path:
        """Job folder of a stage."""
        return self.folder / "runs" / name

    def build_data(self) -> None:
        """Shards of the toy world in the release's layout; those that are whole stay."""
        words = ["data", "build", *DATA, "--out", str(self.folder / "data")]
        self._call(words, log="data", threads=1, watch=lambda: None)

    def train(self, stage: Stage, *, threads: int) -> None:
        """Train, or continue, until the stage's last iteration."""
        entry = self.record.stage(stage.name)
        if entry["trained"]:
            return
        total, begin = self.iterations(stage), time.perf_counter()

        def watch() -> None:
            done = last_iteration(self.run(stage.name) / "metrics.jsonl")
            doing = f"iteration {done} of {total}" if done else "starting"
            self.board.update(stage.name, stage.train_share * done / total, doing)

        words = ["train", *self._overrides(stage, total)]
        try:
            self._call(words, log=stage.name, threads=threads, watch=watch)
        finally:
            entry["train_seconds"] += time.perf_counter() - begin
            self.record.write()
        if checkpointed_iteration(self.run(stage.name)) != total:
            raise Failed(
                f"stage {stage.name} ended before iteration {total}; see"
                f" {self.folder / 'logs' / stage.name}.log"
            )
        entry["trained"] = True
        self.record.write()

    def wait_for(self, names: Iterable[str]) -> None:
        """Until those stages are trained; `Stopped` when asked to stop."""
        for name in names:
            while not self.record.stage(name)["trained"]:
                self._check_stop()
                time.sleep(LOOK_EVERY)

    def score(self, stage: Stage) -> None:
        """Sample with every step count the checkpoint supports, score, keep a few videos; what is
        there already stays.
        """
        if self.record.is_scored(stage.name):
            return
        entry, begin = self.record.stage(stage.name), time.perf_counter()
        model = open_checkpoint(self.run(stage.name))
        plans = sampling_plans(model)
        lengthy, first = stage.kind == "sf_dmd", stage.train_share
        for i, (label, recipe) in enumerate(plans):
            share = first + (1 - first) * i / (len(plans) + lengthy)
            self.board.update(stage.name, share, f"sampling in {label}")
            if label not in entry["plans"]:
                found = self._sampled(stage, model, label, recipe)
                entry["plans"] = {**entry["plans"], label: found}
                self.record.write()
            self._check_stop()
        if lengthy and not entry["drift"]:
            share = first + (1 - first) * len(plans) / (len(plans) + 1)
            self.board.update(stage.name, share, f"streaming {LONG_FRAMES} frames")
            entry["drift"] = self._drift(stage, model)
        entry["score_seconds"] += time.perf_counter() - begin
        entry["scored"] = True
        self.record.write()
        self.board.update(stage.name, 1.0, "done")
        self.board.say(f"{self.board.number(stage.name)}  {stage.name:<14} {told(entry)}")
        self.changed()

    def scores(self) -> dict[tuple[str, str], Scores]:
        """By stage and sampler, of everything scored."""
        return {
            (name, label): plan["scores"]
            for name, e in list(self.record.stages.items())
            for label, plan in e["plans"].items()
        }

    def history(self, name: str) -> dict[str, list[list[float]]]:
        """Logged losses of a stage by term: [[step, loss], ...]."""
        curves: dict[str, list[list[float]]] = {}
        path = self.run(name) / "metrics.jsonl"
        text = path.read_text() if path.is_file() else ""
        for line in text.rpartition("\n")[0].splitlines():  # what is being written is left out
            record = json.loads(line)
            for key, value in record.items():
                if key.startswith("loss/"):
                    curves.setdefault(key.removeprefix("loss/"), []).append([record["step"], value])
        return curves

    def iterations(self, stage: Stage) -> int:
        """Iterations of a stage at this scale. Composing is not for threads: ask once for every
        stage before they start.
        """
        if stage.name not in self._iterations:
            registry_distill.register()
            words = [f"experiment={stage.experiment}", *stage.overrides]
            full = compose_run(words, require_inputs=False).config.trainer.max_iter
            scaled = full if self.scale == 1 else max(2, round(full * self.scale))
            self._iterations[stage.name] = scaled
        return self._iterations[stage.name]

    def share(self, stage: Stage) -> float:
        """How much of a stage earlier sessions did, 0 to 1."""
        entry, total = self.record.stages.get(stage.name, {}), self.iterations(stage)
        if entry.get("scored"):
            return 1.0
        saved = checkpointed_iteration(self.run(stage.name)) or 0
        return stage.train_share * (1.0 if entry.get("trained") else saved / total)

    def stop(self) -> None:
        """Ask everything to stop: training processes save and end, scoring ends after the sampler
        it is at. Asked again, nothing more is done: a second signal would end them unsaved.
        """
        if self._stop.is_set():
            return
        self._stop.set()
        # a script's background jobs may ignore SIGINT
        for process in list(self._running):
            process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End training processes at once."""
        for process in list(self._running):
            process.kill()

    def _overrides(self, stage: Stage, total: int) -> list[str]:
        return [
            f"experiment={stage.experiment}",
            *stage.overrides,
            f"job.output_root={self.folder}",
            "job.project=runs",
            "job.group=",
            f"job.name={stage.name}",
            "data=toy_shards",
            f"dataloader_train.tar_path_pattern={self.folder}/data/*.tar",
            "trainer.progress_bar=False",
            "trainer.logging_iter=10",
            f"model.config.allow_random_init={not stage.feeds}",
            *(f"model.config.{key}={self.run(source)}" for key, source in stage.feeds.items()),
            *([] if self.scale == 1 else [f"trainer.max_iter={total}"]),
        ]

    def _sampled(
        self, stage: Stage, model: LoadedModel, label: str, recipe: SamplingRecipe | None
    ) -> dict:
        video, _ = model.generate(self.prompts, recipe=recipe, seed=SEED)
        scores = self.scorer.score(video.clamp(-1, 1), self.prompts).as_dict()
        one = partial(model.stream, self.prompts[:1], recipe=recipe, seed=SEED)
        alone = measure(one, warmup=0, num_runs=1)
        keep_clips(self.folder, stage, label, video, self.prompts)
        speed = {name: getattr(alone, name) for name in ("first_chunk", "later_chunks", "fps")}
        return {"scores": scores, "speed": speed}

    def _drift(self, stage: Stage, model: LoadedModel) -> dict[str, float]:
        """Adherence per window of a stream four times as long as the training videos, 2 steps per
        later chunk.
        """
        prompts = self.long_prompts
        recipe = model.trained_recipe.with_steps(4, 2)
        how = {"recipe": recipe, "num_frames": LONG_FRAMES, "seed": LONG_SEED}
        video, _ = model.generate(prompts, **how)
        report = self.scorer.drift(video.clamp(-1, 1), prompts)
        keep_drift(self.folder, stage, video, prompts)
        windows = {
            f"adherence in window {i + 1}": value for i, value in enumerate(report.adherence)
        }
        return {**windows, "drift over 4 windows": report.drift}

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _call(
        self, words: Sequence[str], *, log: str, threads: int, watch: Callable[[], None]
    ) -> None:
        """Run `rcm WORDS` with its output in a log, watching; `Failed` with the end of the log,
        `Stopped` when asked to stop.
        """
        self._check_stop()
        path = self.folder / "logs" / f"{log}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "WANDB_MODE": "disabled"}
        environment["CUDA_VISIBLE_DEVICES"] = ""  # the limits of the gates are a CPU's
        environment.pop("IMAGINAIRE_OUTPUT_ROOT", None)
        command = [sys.executable, "-m", "rcm", *words]
        with open(path, "a") as out:
            # In a session of its own: Ctrl-C reaches the demo alone, which asks each process once,
            # and waits until it has saved.
            process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            self._running.add(process)
            if self._stop.is_set():
                process.send_signal(signal.SIGTERM)
            while process.poll() is None:
                watch()
                time.sleep(LOOK_EVERY)
            self._running.discard(process)
        watch()
        self._check_stop()
        if process.returncode:
            tail = "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            raise Failed(
                f"rcm {words[0]} failed with exit status {process.returncode}; the end of"
                f" {path}:\n{tail}"
            )


def sampling_plans(model: LoadedModel) -> list[tuple[str, SamplingRecipe | None]]:
    """(label, recipe) of the samplers shown for a checkpoint: its own many-step one, or 4, 2 and 1
    steps.
    """
    recipe = model.recipe
    if recipe is None or recipe.kind == "ode":
        return [("many steps", recipe)]
    return [
        (f"{steps[-1]} step{'s' if steps[-1] > 1 else ''}", recipe.with_steps(*steps))
        for steps in STEPS
    ]


def last_iteration(path: Path) -> int:
    """Iteration of the last whole line of a metrics file, 0 without one."""
    try:
        tail = path.read_bytes()[-4000:].split(b"\n")
        return int(json.loads(tail[-2])["step"]) if len(tail) > 1 else 0
    except (OSError, ValueError, KeyError):
        return 0


def checkpointed_iteration(job: Path) -> int | None:
    """Iteration of a job's newest checkpoint, None without one."""
    pointer = job / "checkpoints" / "latest_checkpoint.txt"
    return int(pointed_at(pointer).name.rpartition("_")[2]) if pointer.is_file() else None


def told(entry: dict) -> str:
    """A scored stage in one line."""
    scores = ", ".join(
        f"{plan['scores']['score']:.1f} in {label}" for label, plan in entry["plans"].items()
    )
    seconds = entry["train_seconds"] + entry["score_seconds"]
    return f"{seconds:4.0f} s   score {scores}"
