"""Predict the memory and time of a training job before it runs, and find a layout that fits.

    python -m scripts.plan experiment=causal_wan2pt1_1pt3B_res480p_t2v_tf_scm_c3-3 gpus=32 gpu=h100
    python -m scripts.plan experiment=toy_tf_c3-3 gpus=1 memory_gib=8 --json plan.json

Words are the keys of `rcm train`, and besides: gpus=N (ranks), gpu=NAME (h200, h100, ...),
memory_gib=N (another memory size), global_batch=N (samples per update; the config's by default).
The model is explained in docs/planner.md; scripts.bench_memory measures what is predicted here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rcm.configs.cli import DEFAULT_REGISTRY, load_registry
from rcm.configs.compose import Run, compose_run
from rcm.configs.plan_job import plan_job
from rcm.core.arguments import Arguments
from rcm.core.errors import ConfigError
from rcm.core.output_file import OutputFile
from rcm.inference.outcome import command
from rcm.train.planner import Prediction, Proposal, enough_ranks, predict, propose
from rcm.train.planner_card import CARDS, GIB, Card, card
from rcm.train.planner_job import NetPlan
from rcm.train.planner_memory import Term

OWN_KEYS = {"gpus": 2**16, "gpu": None, "memory_gib": 2**20, "global_batch": 2**24}
"""The planner's own words, and the largest value of those that are numbers."""


def arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, str], list[str]]:
    """Flags, the planner's own words, and the overrides of the config."""
    parser = Arguments(
        prog="scripts.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        default=DEFAULT_REGISTRY,
        metavar="REGISTRY",
        help="as for scripts.train [%(default)s]",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything there")
    parser.add_argument(
        "--as-is",
        "--as_is",
        action="store_true",
        help="predict the configured layout only, search for no other",
    )
    parser.add_argument(
        "words", nargs="+", metavar="key=value", help=f"config keys, and {', '.join(OWN_KEYS)}"
    )
    flags = parser.parse_intermixed_args(argv)
    own = [word for word in flags.words if "=" in word and word.split("=")[0] in OWN_KEYS]
    return (
        flags,
        dict(word.split("=", 1) for word in own),
        [word for word in flags.words if word not in own],
    )


def whole(own: dict[str, str], key: str) -> int | None:
    """The whole number `key` from 1 to its most, None if it is not given; `ConfigError` for
    anything else.
    """
    text, most = own.get(key), OWN_KEYS[key]
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and 1 <= int(text) <= most):
        raise ConfigError(f"{key}={text[:40]} must be a whole number from 1 to {most}")
    return int(text)


def chosen_card(own: dict[str, str]) -> Card:
    """The card of gpu= and memory_gib=."""
    text, most, size = own.get("memory_gib"), OWN_KEYS["memory_gib"], None
    if text is not None:
        try:
            size = float(text)
        except ValueError as error:
            raise ConfigError(f"memory_gib={text} is not a number of GiB") from error
        if not 0 < size <= most:
            raise ConfigError(f"memory_gib={text} must be above 0 and at most {most}")
    return card(own.get("gpu", "h200"), memory_gib=size)


def gib(size: float) -> str:
    """Bytes in GiB, small ones in MiB."""
    return f"{size / GIB:8.2f} GiB" if size >= 0.01 * GIB else f"{size / (1 << 20):8.2f} MiB"


def print_terms(terms: Sequence[Term]) -> None:
    """One line per share of the memory."""
    for term in terms:
        print(f"    {gib(term.bytes)}  {term.name:<34} {term.what}")


def print_prediction(found: Prediction) -> None:
    """Memory and time of one layout: states, then each kind of iteration."""
    job = found.job
    print(
        f"  {job.ranks} ranks, {job.data_ranks} data ranks x batch {job.batch} x accumulation"
        f" {job.accumulation} = global batch {job.global_batch}; fsdp_shard_size {job.shard_ranks},"
        f" context_parallel_size {job.context}, recompute"
        f" {', '.join(sorted({told_recompute(net) for net in job.nets if net.trained}))}"
    )
    print(f"  always there: {gib(found.state_bytes).strip()}")
    print_terms(found.states)
    for phase in found.phases:
        often = "" if len(found.phases) == 1 else f" ({phase.share:.0%} of the iterations)"
        print(
            f"  {phase.role} iteration{often}: peak {gib(phase.peak).strip()} in '{phase.fullest}',"
            f" {seconds(phase.seconds)}"
        )
        print_terms(phase.terms)
        told: dict[str, list[float]] = {}
        for step in phase.passes:
            row = told.setdefault(f"{step.name} ({step.mode})", [0.0, 0.0, 0.0])
            row[0], row[1], row[2] = (
                max(row[0], step.bytes),
                row[1] + step.seconds,
                row[2] + step.flops,
            )
        for name, (size, timing, flops) in told.items():
            print(
                f"      pass {name:<42} {gib(size)} beside the states, {seconds(timing):>9},"
                f" {flops / 1e12:10.2f} TFLOP"
            )
        print(f"      update {'':<40} {'':>29} {seconds(phase.update_seconds):>9}")
    verdict = "fits" if found.fits else "DOES NOT FIT"
    scale = "" if found.card.measured else " (rates scaled from the H200's)"
    print(
        f"  => needs {gib(found.reserved).strip()} of {found.card.gib:g} GiB with the allocator's"
        f" slack: {verdict}; {seconds(found.seconds)} per iteration on {found.card.name}{scale},"
        f" {found.seconds_per_sample:.3f} s per sample"
    )


def seconds(value: float) -> str:
    """Seconds or milliseconds."""
    return f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.1f} ms"


def told_recompute(net: NetPlan) -> str:
    """The mode, and of which blocks where not of all."""
    some = net.recomputed_blocks not in (0, net.config.num_layers)
    return (
        f"{net.recompute} ({net.recomputed_blocks} of {net.config.num_layers} blocks)"
        if some
        else net.recompute
    )


def keys_of(found: Prediction) -> list[str]:
    """The overrides that give this layout."""
    job, nets = found.job, {"student": "net", "fake_score": "net_fake_score"}
    keys = [
        f"model.config.fsdp_shard_size={job.shard_ranks}",
        f"model_parallel.context_parallel_size={job.context}",
    ]
    for net in (net for net in job.nets if net.trained):
        sac = f"model.config.{nets[net.role]}.sac_config"
        keys.append(f"{sac}.mode={net.recompute}")
        if net.recompute == "none" and net.recompute_every != 1:  # which would have no effect
            keys.append(f"{sac}.every_n_blocks=1")
    return [*keys, f"trainer.grad_accum_iter={job.accumulation}"]


def print_proposal(proposal: Proposal, wider: Prediction | None) -> None:
    """The best layout, or what would be needed."""
    print(f"\nproposed, out of {proposal.tried} layouts:")
    if proposal.best is not None:
        print("  " + " ".join(keys_of(proposal.best)))
        print_prediction(proposal.best)
        return
    small = proposal.smallest
    print(
        f"  nothing fits {small.card.gib:g} GiB. The layout that needs least,"
        f" {gib(small.reserved).strip()}:"
    )
    print("  " + " ".join(keys_of(small)))
    print_prediction(small)
    print("  what would fit:")
    for other in CARDS.values():
        if small.reserved <= other.gib * GIB:
            print(f"    this layout on cards of {other.gib:g} GiB (gpu={other.name})")
    if wider is not None:
        print(
            f"    gpus={wider.job.ranks} of these cards: {' '.join(keys_of(wider))} (global batch"
            f" {wider.job.global_batch})"
        )
    if any("rollout's last steps" in step.name for phase in small.phases for step in phase.passes):
        print("    back-propagating one chunk at a time: the experiment's _replayed variant")
    print(
        "    fewer latent frames or a smaller resolution: model.config.state_t,"
        " model.config.resolution"
    )


def plan(flags: argparse.Namespace, own: dict[str, str], overrides: list[str]) -> dict[str, Any]:
    """Predict, search, print; everything as plain data."""
    ranks, chosen, wanted = whole(own, "gpus") or 1, chosen_card(own), whole(own, "global_batch")
    run = compose_run(
        overrides, registry=load_registry(flags.config), world_size=None, require_inputs=False
    )
    print(f"{run.experiment or 'this run'} on {ranks} x {chosen.name} ({chosen.gib:g} GiB)")
    record: dict[str, Any] = {
        "experiment": run.experiment,
        "overrides": overrides,
        "card": asdict(chosen),
    }
    try:
        as_configured = predict(plan_job(run, ranks=ranks), chosen)
    except ConfigError as error:
        print(f"\nnot possible as configured: {error}")
    else:
        print("\nas configured:")
        print_prediction(as_configured)
        record["configured"] = plain(as_configured)
        wanted = wanted or as_configured.job.global_batch
    if flags.as_is:
        return record
    job = plan_job(alone(run), ranks=ranks)
    proposal = propose(job, chosen, global_batch=wanted)
    wider = None if proposal.best is not None else enough_ranks(job, chosen)
    print_proposal(proposal, wider)
    found = {"proposed": proposal.best, "smallest": proposal.smallest}
    return record | {
        name: None if it is None else {"keys": keys_of(it), **plain(it)}
        for name, it in found.items()
    }


def alone(run: Run) -> Run:
    """The run laid out for any number of ranks: no shards, no context parallelism."""
    model = replace(run.config.model, config=replace(run.config.model.config, fsdp_shard_size=1))
    parallel = replace(run.config.model_parallel, context_parallel_size=1)
    return replace(run, config=replace(run.config, model=model, model_parallel=parallel))


def plain(found: Prediction) -> dict[str, Any]:
    """A prediction as plain data: layout, terms and passes in bytes and seconds."""
    job = found.job
    layout = {
        "ranks": job.ranks,
        "fsdp_shard_size": job.shard_ranks,
        "context_parallel_size": job.context,
    }
    layout |= {
        "batch": job.batch,
        "accumulation": job.accumulation,
        "global_batch": job.global_batch,
    }
    layout["recompute"] = {net.role: told_recompute(net) for net in job.nets if net.trained}
    needed = {"peak_bytes": found.peak, "reserved_bytes": found.reserved, "fits": found.fits}
    taken = {"seconds": found.seconds, "seconds_per_sample": found.seconds_per_sample}
    terms = {
        "states": [asdict(term) for term in found.states],
        "phases": [asdict(phase) for phase in found.phases],
    }
    return {"layout": layout, **needed, **taken, **terms}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on standard error."""
    flags, own, overrides = arguments(argv)
    if flags.json is not None and not flags.json.absolute().parent.is_dir():
        raise ConfigError(f"--json {flags.json}: there is no folder {flags.json.parent}")
    target = None if flags.json is None else OutputFile.claim(flags.json, knob="--json")
    record = plan(flags, own, overrides)
    if target is not None:
        target.write(json.dumps(record, indent=1) + "\n")
        print(f"\nwritten to {flags.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
