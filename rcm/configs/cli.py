"""The command line of training: read flags, choose the registry, compose and check, then print or run.

`[--config=REGISTRY] [--dryrun | --list [WORD ...]] [--] experiment=NAME key=value ...`
REGISTRY is a Python file or module with a `register()`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import rcm
from rcm.configs import registry_distill
from rcm.configs.compose import Run, compose_run, options
from rcm.configs.network import networks, parameter_count
from rcm.configs.schema_model import CausalConfig
from rcm.core.errors import CheckpointError, ConfigError, NonFinite
from rcm.data.tar_index import ShardError

DEFAULT_REGISTRY = "rcm/configs/registry_distill.py"
_COLUMNS = ("experiment", "net", "teachers", "pattern", "lr", "batch", "steps", "ranks", "check")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m scripts.train` and `rcm-train`; returns the exit code.

    0: finished, or stopped and saved when asked to. 1: what the run was given does not fit, or it had to stop; one sentence says why, the
    last checkpoint stays in use. 2: the config was refused, nothing was touched. A dry run needs no ranks, checkpoints or data.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        flags, overrides = _flags(argv)
        registry = load_registry(flags.config)
        if flags.list:
            return _print_table(overrides)
        if not overrides:
            raise ConfigError("nothing chosen; give experiment=NAME (`python -m scripts.train --list` shows the names)")
        ranks = os.environ.get("WORLD_SIZE", "" if flags.dryrun else "1")
        run = compose_run(overrides, registry=registry, world_size=int(ranks) if ranks else None, require_inputs=not flags.dryrun)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `--list | head`: the reader has seen enough; the interpreter's own flush at exit must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if flags.dryrun:
        print(run.to_yaml(), end="")
        for sentence in run.missing:
            print(f"# still missing: {sentence}")
        return 0
    return _train(run)


def _train(run: Run) -> int:
    """Every rank that fails speaks: a full disk or a damaged shard may be known to one alone."""
    from rcm.configs.build import run as run_training

    try:
        run_training(run)
    except (ConfigError, CheckpointError, ShardError, NonFinite, OSError) as error:
        rank = f" on rank {os.environ['RANK']}" if "RANK" in os.environ else ""
        print(f"error{rank}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def list_main() -> int:
    """Entry point of `rcm-experiments`: the table of experiments whose names contain every given word."""
    return main(["--list", *sys.argv[1:]])


def load_registry(name: str) -> str:
    """Import the registry, call its `register()`, return its name.

    `name` is a .py path (also relative to the package's parent folder) or a dotted module. Raises `ConfigError` if there is no such file or
    module, or it has no `register`.
    """
    module = _module_of(name)
    if not callable(getattr(module, "register", None)):
        raise ConfigError(f"--config={name}: a registry must define a function register() that fills Hydra's ConfigStore")
    module.register()
    return module.__name__ if module.__spec__ and module.__name__.startswith("rcm.") else name


def experiment_rows(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Table rows of every experiment whose name contains all `words`; `_debug` variants only if a word asks for them."""
    names = [n for n in options("experiment") if all(w in n for w in words)]
    templates = {row.name for row in registry_distill.ROWS if row.causal}
    for name in names:
        if name in templates or (name.endswith("_debug") and not any("debug" in w for w in words)):
            continue
        yield _row(name)


def _flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="scripts.train", allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=DEFAULT_REGISTRY, metavar="REGISTRY", help="file or module with register() [%(default)s]")
    parser.add_argument("--dryrun", action="store_true", help="print the resolved config and exit")
    parser.add_argument("--list", action="store_true", help="print the experiments (whose names contain the given words) and exit")
    if "--" in argv:
        cut = argv.index("--")
        argv = argv[:cut] + argv[cut + 1 :]
    flags, rest = parser.parse_known_args(argv)
    for word in rest:
        if word.startswith("-"):
            raise ConfigError(f"unknown flag {word!r}; flags are --config, --dryrun, --list, --help; settings are written key=value")
    return flags, rest


def _module_of(name: str) -> ModuleType:
    if not name.endswith(".py"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and not f"{name}.".startswith(f"{error.name}."):
                raise
            raise ConfigError(f"--config={name}: no such module; give a path that ends in .py or a dotted module name") from error
    inside = Path(rcm.__file__).resolve().parent.parent
    candidates = [Path(name), inside / name]
    path = next((p.resolve() for p in candidates if p.is_file()), None)
    if path is None:
        raise ConfigError(f"--config={name}: no such file (looked at {candidates[0].resolve()} and {candidates[1]})")
    if path.is_relative_to(inside / "rcm"):
        return importlib.import_module(".".join(path.relative_to(inside).with_suffix("").parts))
    spec = importlib.util.spec_from_file_location(f"rcm_registry_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _print_table(words: Sequence[str]) -> int:
    widths = (70, 18, 34, 7, 7, 5, 6, 5)
    print("  ".join(c.ljust(w) for c, w in zip((*_COLUMNS,), (*widths, 0), strict=True)))
    failed = 0
    for row in experiment_rows(words):
        failed += not row[-1].startswith("ok")
        print("  ".join(c.ljust(w) for c, w in zip(row, (*widths, 0), strict=True)), flush=True)
    print("Each name also exists with _debug (25 iterations). batch: per data rank x accumulation; ranks: context x shard.")
    return 1 if failed else 0


def _row(name: str) -> tuple[str, ...]:
    try:
        run = compose_run([f"experiment={name}"], world_size=None, require_inputs=False)
    except ConfigError as error:
        return (name, *[""] * (len(_COLUMNS) - 2), f"FAILS: {error}")
    config, model = run.config, run.config.model.config
    nets = {role: f"{net.preset} ({parameter_count(net) / 1e6:,.2f} M)" for role, net in networks(model).items()}
    short = {"net_teacher": "teacher", "net_causal_teacher": "causal", "net_bidirectional_teacher": "bidir", "net_fake_score": "fake"}
    teachers = ", ".join(f"{short[role]} {net.preset}" for role, net in networks(model).items() if role != "net")
    causal = isinstance(model, CausalConfig) and model.training_type != "bidirectional"
    pattern = f"c{model.first_chunk_t}-{model.chunk_t}" if causal else "-"
    ranks = f"{config.model_parallel.context_parallel_size}x{model.fsdp_shard_size}"
    batch = f"{config.dataloader_train.batch_size}x{config.trainer.grad_accum_iter}"
    needs = sorted({sentence.split()[0].removeprefix("model.config.").removeprefix("dataloader_train.") for sentence in run.missing})
    verdict = "ok" + (f"; needs {', '.join(needs)}" if needs else "")
    return name, nets["net"], teachers or "-", pattern, f"{config.optimizer.lr:.0e}", batch, str(config.trainer.max_iter), ranks, verdict
