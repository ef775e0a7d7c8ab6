"""The command line of training: flags, registry, then print or run what is composed.

`[--config=REGISTRY] [--dryrun | --list [WORD ...]] [--] experiment=NAME key=value ...`; REGISTRY is
a Python file or module with a `register()`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import rcm
from rcm.configs import listing
from rcm.configs.compose import compose_run
from rcm.core.arguments import Arguments
from rcm.core.errors import CheckpointError, ConfigError, NonFinite, PeerGone, first_line
from rcm.core.standard_output import lost_output
from rcm.data.tar_index import ShardError
from rcm.parallel.agree import sentence, together
from rcm.parallel.launch import is_first, launched_world
from rcm.parallel.mesh import launch_group
from rcm.parallel.threads import end_if_held
from rcm.pipelines.video_io import VideoError

_TOLD = (ConfigError, CheckpointError, ShardError, NonFinite, PeerGone, VideoError, OSError)
DEFAULT_REGISTRY = "rcm/configs/registry_distill.py"
HELP = """\
Train an experiment with your settings. The same command resumes a run that was stopped.
An unknown key or value is refused before any network is built.

NAME is one of those that `rcm experiments` lists. --dryrun prints all keys with their values;
rcm/configs/schema.py in the package, and the records it combines, explain them.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m scripts.train` and `rcm-train`; returns the exit code.

    0: finished, or stopped and saved when asked to. 1: what the run was given does not fit, or it
    had to stop; one sentence says why, the last checkpoint stays in use. 2: the config was refused,
    nothing was touched. A dry run needs no ranks, checkpoints or data.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        flags, overrides = _flags(argv)
        registry = load_registry(flags.config)
        if flags.list:
            return _print_table(overrides)
        if not overrides:
            raise ConfigError(
                "nothing chosen; give experiment=NAME (`rcm experiments` shows the names)"
            )
        if flags.dryrun:
            return _show(overrides, registry)
    except ConfigError as error:
        if is_first():
            print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        lost = lost_output(error)
        if lost is None:
            raise
        if not lost.reader_gone:  # of `--list | head` it has seen enough
            print(f"error: {lost.sentence}", file=sys.stderr)
        return 0 if lost.reader_gone else 2
    return _train(overrides, registry)


def _show(overrides: Sequence[str], registry: str) -> int:
    """Print the resolved config, what it still needs, and what it has no use for."""
    ranks = os.environ.get("WORLD_SIZE", "")
    run = compose_run(
        overrides,
        registry=registry,
        world_size=launched_world() if ranks else None,
        require_inputs=False,
    )
    print(run.to_yaml(), end="")
    for lack in run.missing:
        print(f"# still missing: {lack}")
    for idle in run.unread:
        print(f"# {idle}")
    return 0


def _train(overrides: Sequence[str], registry: str) -> int:
    """Compose and train. What one rank refuses, all ranks hear of before they wait for it."""
    status = 2
    try:
        world = launched_world()
        if world == 1:
            run = compose_run(overrides, registry=registry)
        from rcm.configs.build import run as run_training

        with launch_group() if world > 1 else nullcontext():
            if world > 1:
                run = together(lambda: compose_run(overrides, registry=registry, world_size=world))
            status = 1
            run_training(run)
    except _TOLD as error:
        if told := sentence(error):
            print(told, file=sys.stderr, flush=True)
        if isinstance(error, PeerGone):
            end_if_held(status)
        return status
    return 0


def list_main() -> int:
    """Entry point of `rcm-experiments`: those whose names contain every given word."""
    return main(["--list", *sys.argv[1:]])


def load_registry(name: str) -> str:
    """Import the registry, call its `register()`, return its name.

    `name`: a .py path (also relative to the package's parent folder) or a dotted module.
    `ConfigError` for one that is not there, and for whatever its own code raises.
    """
    try:
        module = _module_of(name)
        if not callable(getattr(module, "register", None)):
            raise ConfigError(
                f"--config={name}: a registry must define a function register() that fills Hydra's"
                " ConfigStore"
            )
        module.register()
    except ConfigError:
        raise
    except Exception as error:  # what else its code can raise
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if Path(f.filename).name == Path(name).name]
        where = f"line {lines[-1]}: " if lines else ""
        raise ConfigError(f"--config={name}: {where}{first_line(error)}") from error
    return module.__name__ if module.__spec__ and module.__name__.startswith("rcm.") else name


def _flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Arguments(
        prog="scripts.train",
        usage=(
            "%(prog)s [--config REGISTRY] [--dryrun | --list [WORD ...]] experiment=NAME [key=value"
            " ...]"
        ),
        allow_abbrev=False,
        description=HELP,
    )
    parser.add_argument(
        "--config",
        default=DEFAULT_REGISTRY,
        metavar="REGISTRY",
        help="file or module with register() [%(default)s]",
    )
    parser.add_argument("--dryrun", action="store_true", help="print the resolved config and exit")
    parser.add_argument(
        "--list",
        action="store_true",
        help="print the experiments (whose names contain the given words) and exit",
    )
    parser.idle("dryrun", beside="list")
    if "--" in argv:
        cut = argv.index("--")
        argv = argv[:cut] + argv[cut + 1 :]
    flags, rest = parser.parse_known_args(argv)
    for word in rest:
        if word.startswith("-"):
            known = ("--config", "--dryrun", "--list", "--help")
            near = difflib.get_close_matches(word, known, n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"unknown flag {word!r}; {meant}flags are {', '.join(known)}; settings are written"
                " key=value"
            )
    return flags, rest


def _module_of(name: str) -> ModuleType:
    if not name or name.startswith("."):
        raise ConfigError(
            f"--config={name}: no name of a module; give a path that ends in .py or a dotted module"
            " name"
        )
    if not name.endswith(".py"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and not f"{name}.".startswith(f"{error.name}."):
                raise
            raise ConfigError(
                f"--config={name}: no such module; give a path that ends in .py or a dotted module"
                " name"
            ) from error
    inside = Path(rcm.__file__).resolve().parent.parent
    candidates = [Path(name), inside / name]
    if candidates[1].is_relative_to(inside / "rcm"):
        candidates.reverse()  # a path into the package is this package's, also in another clone
    path = next((p.resolve() for p in candidates if p.is_file()), None)
    if path is None:
        looked = " and ".join(dict.fromkeys(str(p.absolute()) for p in candidates))
        raise ConfigError(f"--config={name}: no such file (looked at {looked})")
    if path.is_relative_to(inside / "rcm"):
        return importlib.import_module(".".join(path.relative_to(inside).with_suffix("").parts))
    spec = importlib.util.spec_from_file_location(f"rcm_registry_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up the names of their annotations
    spec.loader.exec_module(module)
    return module


def _print_table(words: Sequence[str]) -> int:
    failed = False
    for line, fails in listing.lines(words):
        failed |= fails
        print(line, flush=True)
    return int(failed)
