"""The list of experiments for reading: grouped by row, at most `WIDTH` columns, quick."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence

from rcm.configs import compose
from rcm.configs.network import networks, parameter_count
from rcm.core.errors import ConfigError

WIDTH = 120
_SUFFIXES = re.compile(r"(_c\d+-\d+)?(_replayed)?(_debug)?$")
_SHORT = {
    "net_teacher": "teacher",
    "net_causal_teacher": "causal",
    "net_bidirectional_teacher": "bidir",
    "net_fake_score": "fake",
}


def matching(words: Sequence[str]) -> dict[str, list[str]]:
    """Runnable experiments with all `words` in their names, by row; `_debug` if asked for."""
    known = set(compose.options("experiment"))
    debug = any("debug" in word for word in words)
    found: dict[str, list[str]] = {}
    for name in sorted(known):
        template = any(
            other.startswith(f"{name}_c") and _SUFFIXES.sub("", other) == name for other in known
        )
        asked = all(word in name for word in words) and (debug or not name.endswith("_debug"))
        if asked and not template:
            found.setdefault(_SUFFIXES.sub("", name), []).append(name)
    return found


def lines(words: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """(line, whether it tells of a failure). Words narrow the list, and rows are composed."""
    rows = matching(words)
    if not rows:
        raise ConfigError(
            f"no experiment has {' and '.join(map(repr, words))} in its name; the whole list: rcm"
            " experiments"
        )
    toys = [row for row in rows if row.startswith("toy_")]
    wan = [row for row in rows if "wan2pt" in row]
    groups = {
        "toy world, two CPU cores": toys,
        "Wan": wan,
        "of this registry": [row for row in rows if row not in {*toys, *wan}],
    }
    for title, members in groups.items():
        chosen = {row: rows[row] for row in members}
        if not chosen:
            continue
        yield f"{title}:", False
        for row, names in chosen.items():
            yield from _row(row, names, composed=bool(words))
    yield "Each name also exists with _debug (25 iterations).", False
    if words:
        batch = "batch: per data rank x accumulation"
        yield f"{batch}; ranks: those that share a sample / the weights.", False
    else:
        more = "With words from the names it also tells networks, sizes and needs"
        yield f"{more}: rcm experiments toy sf_dmd", False


def _row(row: str, names: Sequence[str], *, composed: bool) -> Iterator[tuple[str, bool]]:
    if composed:
        about, failed = details(names[0])
        yield f"  {row}", failed
        for line in textwrap.wrap(about, WIDTH - 6):
            yield f"      {line}", failed
    for name in names:
        yield f"    {name}" if composed else f"  {name}", False


def details(name: str) -> tuple[str, bool]:
    """Networks, sizes and needs of an experiment in words, and whether it does not even compose."""
    try:
        run = compose.compose_run([f"experiment={name}"], world_size=None, require_inputs=False)
    except ConfigError as error:
        return f"FAILS: {error}", True
    config, model = run.config, run.config.model.config
    nets = networks(model)
    mine = f"net {nets['net'].preset} ({parameter_count(nets['net']) / 1e6:,.2f} M)"
    if model.lora.rank:
        mine += f", adapters of rank {model.lora.rank}"
    others = ", ".join(
        f"{_SHORT[role]} {net.preset}" for role, net in nets.items() if role != "net"
    )
    batch = f"{config.dataloader_train.batch_size}x{config.trainer.grad_accum_iter}"
    ranks = f"{config.model_parallel.context_parallel_size}/{model.fsdp_shard_size}"
    lacks = (lack.split()[0].removeprefix("model.config.") for lack in run.missing)
    needs = sorted({lack.removeprefix("dataloader_train.") for lack in lacks})
    rate, steps = f"lr {config.optimizer.lr:.0e}", f"{config.trainer.max_iter} steps"
    sizes = f"{rate}, batch {batch}, {steps}, ranks {ranks}"
    verdict = f"ok; needs {', '.join(needs)}" if needs else "ok"
    return f"{mine}{', with ' + others if others else ''}; {sizes}; {verdict}", False
