"""Predict the memory and time of a training job before it runs, and find a layout that fits.

    python -m scripts.plan experiment=causal_wan2pt1_1pt3B_res480p_t2v_tf_scm_c3-3 gpus=32 gpu=h100
    python -m scripts.plan experiment=toy_tf_c3-3 gpus=1 memory_gib=8 --json plan.json
    python -m scripts.plan --smallest experiment=causal_wan2pt1_1pt3B_res480p_t2v_sf_dmd_c3-3

Arguments are the settings of `rcm train`, and also gpus=N (ranks), gpu=NAME (h200, h100, ...),
memory_gib=N (another memory size), global_batch=N (samples per update; the config's by default).
Where no layout fits, ways to save memory are added in order of their cost. docs/planner.md explains
the model, docs/scale.md the memory savings; `rcm bench memory` measures what is predicted here.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rcm.configs.checks import check_mesh
from rcm.configs.cli import DEFAULT_REGISTRY, load_registry
from rcm.configs.compose import Run, compose_run
from rcm.configs.memory import require_products
from rcm.configs.plan_job import plan_job
from rcm.configs.plan_search import Found, Search, words_of
from rcm.core.arguments import Arguments
from rcm.core.errors import ConfigError
from rcm.core.output_file import OutputFile
from rcm.inference.outcome import command, sparing
from rcm.train.planner import PassPrediction, PhasePrediction, Prediction, predict
from rcm.train.planner_card import CARDS, GIB, Card, card
from rcm.train.planner_job import Job
from rcm.train.planner_memory import Term

OWN_KEYS = {"gpus": 2**16, "gpu": None, "memory_gib": 2**20, "global_batch": 2**24}
"""The planner's own words, and the largest value of those that are numbers."""

ADAPTERS = "model.config.lora.rank=64"


def arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, str], list[str]]:
    """Flags, the planner's own words, and the overrides of the config."""
    parser = Arguments(prog="scripts.plan", description=__doc__)
    add, told = parser.add_argument, "as for scripts.train [%(default)s]"
    add("--config", default=DEFAULT_REGISTRY, metavar="REGISTRY", help=told)
    add("--json", type=Path, metavar="FILE", help="also write everything there")
    told = "predict the configured layout only, search for no other"
    add("--as-is", "--as_is", action="store_true", help=told)
    told = (
        "the smallest machine that trains it: one to eight cards of 24, 48, 80 or 141 GB, or those"
        " of gpus= and gpu="
    )
    add("--smallest", action="store_true", help=told)
    told = f"config keys, and {', '.join(OWN_KEYS)}"
    add("words", nargs="+", metavar="key=value", help=told)
    parser.idle("as_is", beside="smallest")
    flags = parser.parse_intermixed_args(argv)
    own = [word for word in flags.words if "=" in word and word.split("=")[0] in OWN_KEYS]
    rest = [word for word in flags.words if word not in own]
    words = [word.split("=", 1) for word in own]
    keys = [key for key, _ in words]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"{twice[0]}= is given twice; say which one is meant")
    if not rest:
        raise ConfigError(
            "nothing chosen; give experiment=NAME (`rcm experiments` shows the names)"
        )
    return flags, dict(words), rest


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


def print_phase(phase: PhasePrediction, *, often: str) -> None:
    """One kind of iteration: its fullest moment, and its passes, those of one name together."""
    peak, taken = gib(phase.peak).strip(), seconds(phase.seconds)
    print(f"  {phase.role} iteration{often}: peak {peak} in '{phase.fullest}', {taken}")
    print_terms(phase.terms)
    told: dict[str, list[PassPrediction]] = {}
    for step in phase.passes:
        told.setdefault(f"{step.name} ({step.mode})", []).append(step)
    for name, steps in told.items():
        size, flops = max(step.bytes for step in steps), sum(step.flops for step in steps)
        taken = seconds(sum(step.seconds for step in steps))
        beside = f"{gib(size)} on top of the states, {taken:>9}, {flops / 1e12:10.2f} TFLOP"
        print(f"      pass {name:<42} {beside}")
    print(f"      update {'':<40} {'':>33} {seconds(phase.update_seconds):>9}")


def print_prediction(found: Prediction) -> None:
    """Memory and time of one layout: states, then each kind of iteration."""
    job, several = found.job, len(found.phases) > 1
    print(
        f"  {job.ranks} ranks, {job.data_ranks} data ranks x batch {job.batch} x accumulation"
        f" {job.accumulation} = global batch {job.global_batch}; fsdp_shard_size {job.shard_ranks},"
        f" context_parallel_size {job.context}, recompute"
        f" {', '.join(sorted(set(recomputations(job).values())))}"
    )
    print(f"  states, held throughout: {gib(found.state_bytes).strip()}")
    print_terms(found.states)
    for phase in found.phases:
        print_phase(phase, often=f" ({phase.share:.0%} of the iterations)" if several else "")
    verdict = "fits" if found.fits else "DOES NOT FIT"
    scale = "" if found.card.measured else " (rates scaled from the H200's)"
    print(
        f"  => needs {gib(found.reserved).strip()} of {found.card.gib:g} GiB with the allocator's"
        f" slack: {verdict}; {seconds(found.seconds)} per iteration on {found.card.name}{scale},"
        f" {found.seconds_per_sample:.3f} s per sample"
    )
    if found.host:
        host = gib(found.host * job.ranks).strip()
        print(f"     and {host} of host memory, all ranks of a machine together")


def seconds(value: float) -> str:
    """Seconds or milliseconds."""
    return f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.1f} ms"


def recomputations(job: Job) -> dict[str, str]:
    """Trained role -> its mode, and of which blocks where not of all."""
    told = {}
    for net in (net for net in job.nets if net.trained):
        count, layers = net.recomputed_blocks, net.config.num_layers
        some = "" if count in (0, layers) else f" ({count} of {layers} blocks)"
        told[net.role] = net.recompute + some
    return told


def kept_words(overrides: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """Words of the user without those that chosen ones replace."""
    replaced = {word.split("=")[0] for word in chosen}
    return [word for word in overrides if word.split("=")[0] not in replaced]


def command_line(found: Prediction, levers: Found, overrides: Sequence[str]) -> str:
    """The command that trains so."""
    chosen = words_of(levers.levers, found.job)
    ranks, node = found.job.ranks, found.card.node
    each = max(each for each in range(1, node + 1) if ranks % each == 0)  # as many on every machine
    machines = "" if each == ranks else f"--nnodes={ranks // each} "
    words = shlex.join([*kept_words(overrides, chosen), *chosen])
    return f"torchrun {machines}--nproc_per_node={each} -m rcm train {words}"


def print_proposal(levers: Found, search: Search, overrides: Sequence[str]) -> None:
    """The best layout and its command, or what would be needed."""
    proposal = levers.proposal
    print(f"\nproposed, out of {proposal.tried} layouts:")
    if (best := proposal.best) is not None:
        print("  " + " ".join(words_of((), best.job)))
        for lever in levers.levers:
            print(f"  {' '.join(lever.words)}: needed to fit; {lever.price}")
        print_prediction(best)
        print(f"  train so:\n    {command_line(best, levers, overrides)}")
        return
    small = proposal.smallest
    least = f"The layout that needs least, {gib(small.reserved).strip()}:"
    print(f"  nothing fits {small.card.gib:g} GiB. {least}")
    print("  " + " ".join(words_of(levers.levers, small.job)))
    print_prediction(small)
    print("  what would fit:")
    for other in CARDS.values():
        if small.reserved <= other.gib * GIB:
            print(f"    this layout on cards of {other.gib:g} GiB (gpu={other.name})")
    if (wider := search.wider(levers, small.card, ranks=small.job.ranks)) is not None:
        words, batch = words_of(levers.levers, wider.job), wider.job.global_batch
        told = f"{' '.join(words)} (global batch {batch})"
        print(f"    gpus={wider.job.ranks} of these cards: {told}")
    if offers_adapters(search, small):
        print(f"    adapters instead of all weights (docs/lora.md): {ADAPTERS}")
    keys = "model.config.state_t, model.config.resolution"
    print(f"    fewer latent frames or a smaller resolution: {keys}")


def offers_adapters(search: Search, found: Prediction) -> bool:
    """Whether the run could train adapters, and does not."""
    return not any(net.rank for net in found.job.nets) and search.takes(ADAPTERS)


def print_machines(
    search: Search, own: dict[str, str], overrides: Sequence[str]
) -> list[dict[str, Any]]:
    """The smallest machine that trains the run, after those that are too small; as plain data."""
    if idle := [f"{key}={own[key]}" for key in ("memory_gib", "global_batch") if key in own]:
        raise ConfigError(
            f"{', '.join(idle)} has no effect with --smallest, which goes through machines as they"
            " are; leave one of them out"
        )
    rows, best = [], None
    on = chosen_card(own) if "gpu" in own else None
    print(f"{'machine':<14}{'memory':>9}{'needs':>11}{'host':>11}  an iteration")
    for levers, best in search.machines(ranks=whole(own, "gpus"), card=on):
        found = best or levers.proposal.smallest
        name = f"{found.job.ranks} x {found.card.name}"
        needs = f"{gib(found.reserved).strip():>11}{gib(found.host * found.job.ranks).strip():>11}"
        how = seconds(found.seconds) if best else "does not fit, even with every memory saving"
        print(f"{name:<14}{found.card.gib:>5.1f} GiB{needs}  {how}")
        rows.append({"gpus": found.job.ranks, "gpu": found.card.name, **plain(found)})
        rows[-1]["levers"] = levers.words
        if best is not None:
            print_proposal(levers, search, overrides)
    if best is None:
        print("none of these machines trains it")
        if offers_adapters(search, found):
            print(f"  adapters instead of all weights (docs/lora.md) need less: {ADAPTERS}")
    return rows


def plan(flags: argparse.Namespace, own: dict[str, str], overrides: list[str]) -> dict[str, Any]:
    """Predict, search, print; everything as plain data."""
    ranks, chosen, wanted = whole(own, "gpus") or 1, chosen_card(own), whole(own, "global_batch")
    registry = load_registry(flags.config)

    def composed(more: Sequence[str]) -> Run:
        words = [*kept_words(overrides, more), *more]
        return compose_run(words, registry=registry, world_size=None, require_inputs=False)

    run, search = composed(()), Search(composed)
    chose = [] if flags.config == DEFAULT_REGISTRY else [f"--config={flags.config}", "--"]
    require_products(run.config.model.config, chosen.capability, where=f"gpu={chosen.name}")
    record: dict[str, Any] = {"experiment": run.experiment, "overrides": overrides}
    if flags.smallest:
        return record | {"machines": print_machines(search, own, [*chose, *overrides])}
    if flags.as_is and wanted:
        raise ConfigError(
            f"global_batch={wanted} has no effect with --as-is, which predicts the batch of the"
            " config; set dataloader_train.batch_size, or leave one of them out"
        )
    print(f"{run.experiment or 'this run'} on {ranks} x {chosen.name} ({chosen.gib:g} GiB)")
    record["card"] = asdict(chosen)
    try:
        as_configured = predict(plan_job(run, ranks=ranks), chosen)
        check_mesh(run.config, world_size=ranks)
    except ConfigError as error:
        if flags.as_is:
            raise
        print(f"\nnot possible as configured: {error}")
    else:
        print("\nas configured:")
        print_prediction(as_configured)
        record["configured"] = plain(as_configured)
        wanted = wanted or as_configured.job.global_batch
    if flags.as_is:
        return record
    levers = search.found(chosen, ranks=ranks, global_batch=wanted)
    print_proposal(levers, search, [*chose, *overrides])
    found = {"proposed": levers.proposal.best, "smallest": levers.proposal.smallest}
    return record | {
        name: None if it is None else {"keys": words_of(levers.levers, it.job), **plain(it)}
        for name, it in found.items()
    }


def plain(found: Prediction) -> dict[str, Any]:
    """A prediction as plain data: layout, terms and passes in bytes and seconds."""
    job = found.job
    return {
        "layout": {
            "ranks": job.ranks,
            "fsdp_shard_size": job.shard_ranks,
            "context_parallel_size": job.context,
            "batch": job.batch,
            "accumulation": job.accumulation,
            "global_batch": job.global_batch,
            "recompute": recomputations(job),
        },
        "peak_bytes": found.peak,
        "reserved_bytes": found.reserved,
        "fits": found.fits,
        "host_bytes": found.host * job.ranks,
        "seconds": found.seconds,
        "seconds_per_sample": found.seconds_per_sample,
        "states": [asdict(term) for term in found.states],
        "phases": [asdict(phase) for phase in found.phases],
    }


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on standard error."""
    flags, own, overrides = arguments(argv)
    target = None
    if flags.json is not None:
        target = sparing(OutputFile.claim(flags.json, knob="--json"), flags, knob="--json")
    record = plan(flags, own, overrides)
    if target is not None:
        target.write(json.dumps(record, indent=1) + "\n")
        print(f"\nwritten to {flags.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
