"""What the demo's page shows: data for `write_report`, from what is recorded so far."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rcm.evaluation.report import write_report
from rcm.evaluation.throughput import processor
from scripts.demo_clips import LARGE, SMALL, picks, stem, teacher_of
from scripts.demo_gates import judge
from scripts.demo_run import LONG_FRAMES, Demo
from scripts.demo_stages import ABOUT, Stage

SUBTITLE = """Coloured shapes move over a torus, asked for by captions. {} Everything here was
trained and streamed on this machine."""
DISTILLED = """A slow teacher is distilled, stage by stage, into students that stream the same
videos in 4, 2 or 1 steps."""
ALONE = "One stage alone, from random weights and shortened: many steps for every frame."
COLUMNS = ("score", "joint", "colour", "shape", "direction", "motion", "realism", "diversity")
COLOURS = {"bidirectional": 6, "tf": 4, "tf_dcm": 2, "tf_scm": 3, "sf_dmd": 1}
ORDER = ("many steps", "4 steps", "2 steps", "1 step")
NUM_STEPS = {"many steps": 50, "4 steps": 4, "2 steps": 2, "1 step": 1}

EXPECT = {
    "bidirectional": (
        "Falls fast, then slowly to a plateau that is not zero: noise that nothing could predict"
        " remains."
    ),
    "tf": (
        "Begins with trained weights, so most of the fall is over in a few steps: c1-1 with the"
        " teacher's, and learns to do without the future; c3-3 with those of c1-1, and learns to"
        " make three frames at a time."
    ),
    "tf_dcm": (
        "Falls quickly, then stays noisy: the target is the student itself at a slightly earlier"
        " time, and moves as it learns."
    ),
    "tf_scm": (
        "May rise, and that is no fault: it is a squared tangent, and while the tangent's weight"
        " warms up (first 50 iterations) more of it is counted. Judge this stage by its samples."
    ),
    "sf_dmd": (
        "Two players. The student's loss is the gap between two score estimates and stays noisy"
        " around a level; the fake score's is an ordinary denoising loss that should stay flat"
        " while it follows the student."
    ),
}

GLOSSARY = {
    "steps": (
        "Network evaluations per chunk of a video. Where students are asked for 2 or 1, the first"
        " chunk still takes 4."
    ),
    "chunk, c3-3, c1-1": (
        "Latent frames made together. c3-3: three at a time; c1-1: frame by frame, the lowest"
        " delay."
    ),
    "teacher": (
        "A diffusion model sampled in many steps, from which the students learn. The whole-video"
        " one sees past and future."
    ),
    "TF, teacher forcing": "Training every frame at once, each given the clean frames before it.",
    "TF-dCM, TF-sCM": (
        "Consistency distillation of the causal teacher: to jump to the end of its path from"
        " anywhere on it. d: learned from pairs of neighbouring times; s: from the path's exact"
        " derivative."
    ),
    "SF-DMD": (
        "Self-forced distribution matching: it rolls out its own videos, which are pushed towards"
        " what the teacher finds likely."
    ),
    "score": (
        "0 to 100, exact arithmetic on pixels against the caption and the world: colour, shape,"
        " direction, smooth motion, realism, diversity. Real videos reach 98."
    ),
    "joint": "Share of videos whose colour, shape and direction are all as asked for.",
    "drift": (
        "Worst later window of a long stream minus its first, in points of adherence: 0 is steady,"
        " negative decays."
    ),
    "first frames": "Time from the prompt to the first pixels, for one video.",
    "FPS": "Pixel frames per second of one video, streamed alone on one core.",
}


def write_page(demo: Demo, stages: Sequence[Stage], *, judged: bool, status: str = "") -> Path:
    """Write report.html and report.json of everything recorded; `status` says what is still going
    on.
    """
    scores, record = demo.scores(), demo.record.stages
    verdicts = {
        stage.name: verdict(stage, scores, judged=judged)
        for stage in stages
        if demo.record.is_scored(stage.name)
    }
    return write_report(
        demo.folder,
        {
            "title": "Causal-rCM: the embedded recipe",
            "subtitle": SUBTITLE.format(DISTILLED if len(stages) > 1 else ALONE),
            "status": status,
            "machine": machine(demo.record.seconds),
            "stages": [
                _stage(demo, stage, verdicts.get(stage.name, ("", None))) for stage in stages
            ],
            "charts": _charts(stages, record),
            "tables": [_table(stages, record), _speeds(stages, record)],
            "videos": [*_videos(demo, stages, record), *_long_videos(demo, stages, record)],
            "glossary": GLOSSARY,
        },
    )


def verdict(stage: Stage, scores: Mapping, *, judged: bool) -> tuple[str, bool | None]:
    """(sentence, passed) of a stage's gate; None for a shortened run, or while what it is compared
    with is missing.
    """
    if not judged:
        return "not judged", None
    try:
        return judge(stage.name, scores)
    except KeyError:
        return "waits for the stage it is compared with", None


def machine(seconds: float) -> dict[str, Any]:
    """What computed this, by its real name."""
    gpu = {"GPU (unused)": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    minutes, rest = divmod(round(seconds), 60)
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        **gpu,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(terse=True),
        "wall time": f"{minutes} min {rest:02d} s",
        "date": time.strftime("%Y-%m-%d"),
    }


def _stage(demo: Demo, stage: Stage, gate: tuple[str, bool | None]) -> dict[str, Any]:
    entry, done = demo.record.stages.get(stage.name, {}), demo.record.is_scored(stage.name)
    return {
        "name": stage.name,
        "about": ABOUT[stage.kind],
        "seconds": entry["train_seconds"] + entry["score_seconds"] if done else None,
        "gate": gate[0] if done else "not trained yet",
        "passed": gate[1],
        "history": demo.history(stage.name),
        "expect": EXPECT[stage.kind if stage.feeds else "bidirectional"],  # from random weights
        "scores": entry.get("drift", {}),
    }


def _charts(stages: Sequence[Stage], record: Mapping) -> list[dict[str, Any]]:
    charts = []
    for pattern in dict.fromkeys(stage.pattern for stage in stages if stage.pattern):
        lines = []
        for stage in stages:
            plans = record.get(stage.name, {}).get("plans", {})
            if plans and stage.pattern in (pattern, None):
                points = sorted(
                    [NUM_STEPS[label], plan["scores"]["score"]] for label, plan in plans.items()
                )
                lines.append({"name": stage.kind, "colour": COLOURS[stage.kind], "points": points})
        note = (
            "Higher is better; flat to the left is the aim: as good in 1 step as in 4."
            if len(lines) > 2
            else ""
        )
        if sum(len(line["points"]) for line in lines) < 2:
            continue
        axes = {"x": "steps per later chunk", "y": "score"}
        title = f"Score against steps, {pattern}"
        charts.append({"title": title, **axes, "note": note, "lines": lines})
    drifting = [stage for stage in stages if record.get(stage.name, {}).get("drift")]
    if drifting:
        lines = []
        for stage in drifting:
            values = [v for k, v in record[stage.name]["drift"].items() if "window " in k]
            points = [[i, v] for i, v in enumerate(values, 1)]
            lines.append({"name": stage.name, "points": points})
        note = (
            f"{LONG_FRAMES} frames, four times the length of the training videos. A falling line is"
            " drift."
        )
        axes = {"x": "window of 17 frames", "y": "adherence"}
        title = "Adherence along the long stream"
        charts.append({"title": title, **axes, "note": note, "lines": lines})
    return charts


def _table(stages: Sequence[Stage], record: Mapping) -> dict[str, Any]:
    rows = [
        {
            "stage": stage.name,
            "steps": label,
            "scores": {column: plan["scores"][column] for column in COLUMNS},
        }
        for stage, label, plan in _plans(stages, record)
    ]
    return {
        "title": "By stage and steps of later chunks",
        "rows": rows,
        "better": {"score": "higher", "joint": "higher"},
    }


def _speeds(stages: Sequence[Stage], record: Mapping) -> dict[str, Any]:
    rows = [
        {
            "stage": stage.name,
            "steps": label,
            "scores": {
                "first frames, ms": 1000 * plan["speed"]["first_chunk"],
                "each later chunk, ms": (
                    1000 * plan["speed"]["later_chunks"] if stage.pattern else None
                ),
                "FPS": plan["speed"]["fps"],
            },
        }
        for stage, label, plan in _plans(stages, record)
    ]
    return {
        "title": "Speed of one video, streamed alone on one core",
        "note": "Stages were training on the other cores at the same time." * (len(stages) > 1),
        "section": "measured",
        "rows": rows,
        "better": {"first frames, ms": "lower", "FPS": "higher"},
    }


def _videos(demo: Demo, stages: Sequence[Stage], record: Mapping) -> list[dict[str, Any]]:
    prompts = [demo.prompts[i] for i in picks(len(demo.prompts))]
    videos = []
    for stage, label, plan in _plans(stages, record):
        name, teacher = stem(stage.name, label), teacher_of(stage.name) if stage.feeds else None
        path = f"videos/{stem(*teacher)}.mp4" if teacher else ""
        if path and stage.kind != "tf" and (demo.folder / path).is_file():
            told = {"title": ORDER[0], "facts": [f"its teacher, {teacher[0]}"]}
            above = {**told, "path": path, "group": stage.name}
            videos += [] if above in videos else [above]
        beside = (
            f"Above its teacher {teacher[0]} on the same noise, below {stage.name} in {label}. "
            if teacher
            else ""
        )
        videos.append(
            {
                "title": label,
                "caption": f"{beside}From left to right: {'; '.join(prompts[:LARGE])}.",
                "facts": [
                    f"score {plan['scores']['score']:.1f}",
                    f"{plan['speed']['fps']:.0f} FPS",
                ],
                "path": f"videos/{name}.mp4",
                "beside": f"videos/{name}_large.mp4",
                "group": stage.name,
            }
        )
    order = [stage.name for stage in stages]
    return sorted(videos, key=lambda v: (order.index(v["group"]), ORDER.index(v["title"])))


def _long_videos(demo: Demo, stages: Sequence[Stage], record: Mapping) -> list[dict[str, Any]]:
    prompts = [demo.long_prompts[i] for i in picks(len(demo.long_prompts))[:SMALL]]
    return [
        {
            "title": stage.name,
            "facts": [
                f"{LONG_FRAMES} frames",
                f"drift {record[stage.name]['drift']['drift over 4 windows']:+.1f} points",
            ],
            "caption": f"4 steps for the first chunk, 2 for each later one: {'; '.join(prompts)}.",
            "path": f"videos/{stage.name}_long.mp4",
            "section": "drift",
        }
        for stage in stages
        if record.get(stage.name, {}).get("drift")
    ]


def _plans(stages: Sequence[Stage], record: Mapping) -> list[tuple[Stage, str, Mapping]]:
    return [
        (stage, label, plan)
        for stage in stages
        for label, plan in record.get(stage.name, {}).get("plans", {}).items()
    ]
