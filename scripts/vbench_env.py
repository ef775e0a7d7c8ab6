"""Create the Python environment that VBench runs in: it pins transformers 4.33.2 and numpy below 2,
so it cannot share this package's.

    python -m scripts.vbench_env  # .venv-vbench, everything that the package index has
    python -m scripts.vbench_env --minimal  # what temporal_flickering needs, and no model libraries
    python -m scripts.vbench_env --torch torch==2.11.0    # another torch
    # only look: which dimensions can be imported, which model files are there
    python -m scripts.vbench_env --check

Python 3.11 (or 3.10) is needed: tokenizers 0.13.3, which transformers 4.33.2 wants, has no wheel
for 3.12. Model files are not downloaded; the printed list says which are needed, how large they are
and where they are published. detectron2, for four dimensions, has to be compiled by hand.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rcm.core.arguments import Arguments
from rcm.core.errors import ConfigError
from rcm.evaluation.vbench_files import cache_folder
from rcm.evaluation.vbench_files import told as files_told
from rcm.evaluation.vbench_launch import Launch
from rcm.evaluation.vbench_score import T2V
from rcm.inference.flag_table import add_flags
from rcm.inference.outcome import command

VERSION = "0.1.5"
PACKAGES = ("numpy<2", "setuptools<82")
"""openai-clip asks pkg_resources, which setuptools 82 no longer has."""
MINIMAL = ("opencv-python-headless<4.12", "decord", "tqdm", "pillow")
"""What vbench.utils and temporal_flickering import besides torch, torchvision and numpy; later
OpenCV asks for numpy 2.
"""


_FLAGS = """
venv DIR = .venv-vbench   [%(default)s]
python NAME = python3.11  interpreter of the environment [%(default)s]
torch REQUIREMENT = torch==2.13.0  installed first, with the torchvision that fits [%(default)s]
minimal                   only what temporal_flickering needs
check                     install nothing
vbench_cache DIR          its model files [$VBENCH_CACHE_DIR, else ~/.cache/vbench]
dry_run                   print the commands
"""


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = Arguments(prog="scripts.vbench_env", allow_abbrev=False, description=__doc__)
    add_flags(parser, _FLAGS, venv={"type": Path}, vbench_cache={"type": Path})
    parser.idle("python", "torch", "minimal", "dry_run", beside="check")
    parser.idle("vbench_cache", beside="dry_run")
    run(parser.parse_args(argv))


def run(flags: argparse.Namespace) -> None:
    """Install, then say what works."""
    if not flags.check:
        for command in commands(flags):
            print(f"+ {shlex.join(command)}", flush=True)
            if not flags.dry_run:
                _run(command)
    if not flags.dry_run:
        _check(flags)


def commands(flags: argparse.Namespace) -> list[list[str]]:
    """What is run, in order. `ConfigError` for an interpreter that is not there, or too new."""
    try:
        told = subprocess.run(
            [flags.python, "-c", "import sys; print(*sys.version_info[:2])"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"--python {flags.python} cannot be run ({error}); name a Python 3.11"
        ) from error
    version = tuple(int(part) for part in told.stdout.split())
    if not (3, 10) <= version <= (3, 11):
        raise ConfigError(
            f"--python {flags.python} is {version[0]}.{version[1]}; VBench's pinned packages have"
            " wheels for 3.10 and 3.11"
        )
    pip = [str(flags.venv / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    base = [
        [flags.python, "-m", "venv", str(flags.venv)],
        [*pip, flags.torch, "torchvision", *PACKAGES],
    ]
    if flags.minimal:
        return [*base, [*pip, *MINIMAL, *PACKAGES], [*pip, "--no-deps", f"vbench=={VERSION}"]]
    return [*base, [*pip, f"vbench=={VERSION}", flags.torch, *PACKAGES]]


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"failed: {shlex.join(command)} ({error}); see the lines above, or try --minimal"
        ) from error


def _check(flags: argparse.Namespace) -> None:
    launch = Launch(
        python=(flags.venv / "bin" / "python").absolute(),
        output=Path("."),
        device="cpu",
        local=True,
    )
    if not launch.python.is_file():
        raise ConfigError(f"no environment at {flags.venv}; leave out --check to make it")
    works = []
    for name in T2V.names:
        problem = launch.check(name)
        print(f"{name}: {'can be imported' if problem is None else problem}", flush=True)
        works += [name] if problem is None else []
    print(f"{len(works)} of {len(T2V.names)} dimensions can be imported; their model files:")
    print(files_told(cache_folder(flags.vbench_cache), T2V.names))


if __name__ == "__main__":
    sys.exit(main())
