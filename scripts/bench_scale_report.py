"""What `scripts.bench_scale` writes and prints: the file of all rows, lines, and comparisons
between rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from rcm.core.errors import ConfigError
from rcm.core.output_file import OutputFile
from rcm.train.planner import Prediction
from scripts.bench_measure import machine, write
from scripts.bench_scale_flops import mfu
from scripts.bench_scale_run import Attempt

GIB = 2**30


class Ledger:
    """The rows of a file, by name and number of ranks, written after each. `path` None: kept in
    memory alone. Rows that a launch does not measure stay as they are.
    """

    def __init__(self, path: OutputFile | None, *, device: torch.device | None = None) -> None:
        self.path = path
        self._content: dict[str, Any] = _read(path)
        self._machine = {} if device is None else machine(device)

    def end(self, record: Mapping[str, Any]) -> None:
        """Keep a row in place of an older one of its name and ranks, unless that was measured and
        this one was not run.
        """
        old = next((r for r in self.records() if _key(r) == _key(record)), None)
        kept = old is not None and old["status"] == "measured"
        if not kept or record["status"] not in ("not run", "stopped"):
            rest = [r for r in self.records() if r is not old]
            self._content["rows"] = [*rest, {**record, "machine": self._machine}]
        if self.path is not None:
            write(self.path, self._content)

    def records(self) -> list[dict[str, Any]]:
        """All rows."""
        return self._content["rows"]


def _key(record: Mapping[str, Any]) -> tuple[str, int]:
    return record["row"], record["ranks"]


def _read(path: OutputFile | None) -> dict[str, Any]:
    if path is None or not path.path.is_file() or not path.path.stat().st_size:
        return {"rows": []}
    try:
        content = json.loads(path.path.read_text())
        _ = [_key(record) for record in content["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no file of bench_scale; give --json another name") from error
    return content


def measured_record(
    prediction: Prediction, flops: Mapping[str, float], ends: Sequence[Attempt]
) -> dict[str, Any]:
    """A measured row: every kind of iteration, and what follows from their shares."""
    job, kinds = prediction.job, {}
    for phase in prediction.phases:
        ranks = [[i for i in end.iterations if i.role == phase.role] for end in ends]
        timed = [[i for i in own if not i.kernels] for own in ranks]
        slowest = [max(i.seconds for i in turn) for turn in zip(*timed, strict=True)]
        profiled = next((i for i in ranks[0] if i.kernels), None)
        kinds[phase.role] = {
            "share": phase.share,
            "seconds": median(slowest),
            "samples_s": slowest,
            "predicted_s": phase.seconds,
            "flops": flops[phase.role],
            "mfu": mfu(flops[phase.role], seconds=median(slowest), gpus=job.ranks),
            "peak_gib": [max(i.allocated for i in own) / GIB for own in ranks],
            "reserved_gib": [max(i.reserved for i in own) / GIB for own in ranks],
            "allocator_retries": sum(i.retries for own in ranks for i in own),
            "predicted_peak_gib": phase.peak / GIB,
            "kernels": {}
            if profiled is None
            else {**profiled.kernels, "seconds": profiled.seconds},
        }
    return {"status": "measured", "global_batch": job.global_batch, "kinds": kinds} | _totals(
        prediction, kinds
    )


def _totals(prediction: Prediction, kinds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    job = prediction.job
    seconds = _weighed(kinds, "seconds")
    video = max(
        (layout for phase in job.phases for step in phase.passes for layout in step.layouts),
        key=lambda x: x.num_output_frames,
    )
    tokens = job.global_batch * video.num_output_frames * video.tokens_per_frame
    peak = max(max(kind["peak_gib"]) for kind in kinds.values())
    found = {
        "seconds": seconds,
        "seconds_per_sample": seconds / job.global_batch,
        "tokens_per_s": tokens / seconds,
        "mfu": mfu(_weighed(kinds, "flops"), seconds=seconds, gpus=job.ranks),
        "peak_gib": peak,
        "reserved_gib": max(max(kind["reserved_gib"]) for kind in kinds.values()),
        "time_ratio": prediction.seconds / seconds,
        "memory_ratio": prediction.peak / GIB / peak,
    }
    if all(kind["kernels"] for kind in kinds.values()):
        profiled = {
            role: kind["kernels"] | {"share": kind["share"]} for role, kind in kinds.items()
        }
        for name in ("nccl", "exposed"):
            spent = _weighed(profiled, f"{name}_ms") / 1e3
            found[f"{name}_share"] = spent / _weighed(profiled, "seconds")
    return found


def _weighed(kinds: Mapping[str, Mapping[str, Any]], key: str) -> float:
    return sum(kind["share"] * kind[key] for kind in kinds.values())


def print_record(record: Mapping[str, Any]) -> None:
    """One row, and a line for each of several kinds of iteration."""
    name = f"{record['row']} on {record['ranks']}"
    predicted = record.get("predicted", {})
    if record["status"] != "measured":
        told = ""
        if predicted:
            told = f"; predicted {predicted['peak_gib']:.1f} GiB, {predicted['seconds']:.2f} s"
        print(f"{name:<52} {record['status']}: {record['why']}{told}", flush=True)
        return
    comm = ""
    if "nccl_share" in record:
        comm = f"comm {record['nccl_share']:.1%} (exposed {record['exposed_share']:.1%})"
    retries = sum(kind.get("allocator_retries", 0) for kind in record["kinds"].values())
    without = " without the average" if record.get("left_out") else ""
    without += f" {retries} allocator retries" if retries else ""
    memory = (
        f"{record['peak_gib']:6.2f} GiB ({record['memory_ratio']:.3f}), reserved"
        f" {record['reserved_gib']:6.2f}"
    )
    speed = f"{record['tokens_per_s']:8.0f} tokens/s  MFU {record['mfu']:.1%}"
    print(
        f"{name:<52} {record['seconds']:7.3f} s ({record['time_ratio']:.2f})  {memory}  {speed} "
        f" {comm}{without}",
        flush=True,
    )
    if len(record["kinds"]) > 1:
        for role, kind in record["kinds"].items():
            spent = f"{kind['seconds']:7.3f} s (planner {kind['predicted_s']:.2f})"
            peak = f"{max(kind['peak_gib']):.2f} GiB (planner {kind['predicted_peak_gib']:.2f})"
            print(
                f"    {role:<12} x {kind['share']:.2f}: {spent}, {peak}, MFU {kind['mfu']:.1%}",
                flush=True,
            )


def print_plan(plans: Iterable[tuple[str, Prediction, Sequence[str], float]]) -> None:
    """What the planner says of rows: (name, prediction, words left out, seconds in a call)."""
    total = 0.0
    for name, found, lean, seconds in plans:
        total += seconds if found.fits else 0.0
        verdict = "fits" if found.fits else "DOES NOT FIT"
        without = " without the average" if lean else ""
        print(
            f"{name:<44} {found.seconds:7.2f} s per iteration, peak {found.peak / GIB:6.1f} GiB,"
            f" needs {found.reserved / GIB:6.1f} of {found.card.gib:g}: {verdict}{without};"
            f" {seconds:4.0f} s to measure"
        )
    print(f"{total:.0f} s for all that fit")


def print_comparison(records: Sequence[Mapping[str, Any]]) -> None:
    """Weak scaling and per-sample time against one GPU, and how far the planner was off."""
    done = [record for record in records if record["status"] == "measured"]
    ones = [record for record in done if record["row"].endswith("-one")]
    single = {record["row"].removesuffix("-one"): record for record in ones}
    for record in done:
        base, _, layout = record["row"].rpartition("-")
        one = single.get(base)
        if record["ranks"] == 1 or one is None:
            continue
        ratio = record["seconds_per_sample"] / one["seconds_per_sample"]
        weak = f" (weak scaling {one['seconds'] / record['seconds']:.1%})"
        print(
            f"{record['row']} on {record['ranks']}: per-sample time {ratio:.3f} of one GPU's,"
            f" efficiency {1 / ratio / record['ranks']:.1%}" + weak * (layout in ("fsdp", "hsdp"))
        )
    if done:
        for key, what in (("time_ratio", "time"), ("memory_ratio", "peak memory")):
            values = [record[key] for record in done]
            print(
                f"planner over measured {what}: {min(values):.3f} to {max(values):.3f} in"
                f" {len(values)} rows"
            )
