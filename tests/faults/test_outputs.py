"""Places that no file or folder can be written to, for every command that writes one: found before
the work. A refused command leaves nothing behind, no folder for its output either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from rcm.front import cli
from rcm.inference import stream, wan2pt1_t2v_rcm_infer
from rcm.storage.shipped import toy_checkpoint
from scripts import checkpoint, dcp_to_pth, plan
from tests.faults.case import Fault, each, kept_folder
from tests.faults.test_command_values import wan_files
from tests.support.tiny_checkpoint import STUDENT, write_checkpoint


@functools.cache
def job() -> Path:
    """A small trained job, made once."""
    return write_checkpoint(kept_folder() / "job", STUDENT)


def _folder(place: Path) -> Path:
    place.mkdir()
    (place / "inside").write_text("kept")
    return place


def _below_a_file(place: Path) -> Path:
    place.parent.joinpath("file").write_text("kept")
    return place.parent / "file" / place.name


def _device(place: Path) -> Path:
    place.symlink_to("/dev/full")
    return place


def _loop(place: Path) -> Path:
    place.symlink_to(place.name)
    return place


PLACES: dict[str, Callable[[Path], Path]] = {
    "a folder": _folder,
    "below a file": _below_a_file,
    "a link to a device": _device,
    "a link to itself": _loop,
    "a file system that takes no files": lambda place: Path("/proc") / place.name,
    "a name that is too long": lambda place: place.with_name("x" * 300 + place.suffix),
}


def _stream(flag: str, place: Path) -> list[object]:
    other = {"--save_path": place.parent / "other.mp4", flag: place}
    return ["--prompt", "a red cross moving up", "--device", "cpu", *(word for pair in other.items() for word in pair)]


def _wan(flag: str, place: Path) -> list[object]:
    files = wan_files()
    other = {"--save_path": place.parent / "other.mp4", flag: place}
    words = [word for pair in other.items() for word in pair]
    return [*files.shared_flags, "--dit_path", files.dit, "--prompt", "a cat", *words]


COMMANDS: dict[str, tuple[Callable, str, Callable[[Path], list[object]]]] = {
    "stream --save_path": (stream.main, ".mp4", lambda place: _stream("--save_path", place)),
    "stream --report": (stream.main, ".json", lambda place: _stream("--report", place)),
    "wan --save_path": (wan2pt1_t2v_rcm_infer.main, ".mp4", lambda place: _wan("--save_path", place)),
    "wan --preview_grid": (wan2pt1_t2v_rcm_infer.main, ".png", lambda place: _wan("--preview_grid", place)),
    "wan --report": (wan2pt1_t2v_rcm_infer.main, ".json", lambda place: _wan("--report", place)),
    "dcp_to_pth": (dcp_to_pth.main, ".pth", lambda place: ["--dcp_checkpoint_dir", job(), "--save_path", place]),
    "convert to pth": (checkpoint.main, ".pth", lambda place: ["convert", wan_files().dit, place]),
    "convert to safetensors": (checkpoint.main, ".safetensors", lambda place: ["convert", wan_files().dit, place]),
    "plan --json": (plan.main, ".json", lambda place: ["experiment=toy_tf_c3-3", "--json", place]),
}


def _case(command: str, place: str) -> Fault:
    main, suffix, words = COMMANDS[command]

    def argv(folder: Path) -> list[object]:
        return words(PLACES[place](folder / f"out{suffix}"))

    def left(folder: Path) -> None:
        kept = {folder / "file", folder / f"out{suffix}", folder / f"out{suffix}" / "inside"}
        assert not (others := set(folder.rglob("*")) - kept), others
        for path in kept:
            assert not path.is_file() or path.name != "inside" or path.read_text() == "kept"

    return Fault(place, kind=f"outputs of {command}", refusal="out|file", main=main, argv=argv, after=left, deadline=8)


@each(_case(command, place) for command in COMMANDS for place in PLACES)
def test_refused(case: Fault, tmp_path: Path) -> None:
    case.check(tmp_path)


FOLDERS = {
    "demo": "demo --out OUT",
    "data build": "data build --num 2 --out OUT",
    "data ode-pairs": f"data ode-pairs --teacher {toy_checkpoint()} --out OUT",
    "data merge": "data merge none.tar --out OUT",
    "checkpoint convert": f"checkpoint convert {toy_checkpoint()} OUT",
    "train": "train experiment=toy_tf_c3-3 job.output_root=OUT",
    "vbench sample": f"vbench sample --dit_path {toy_checkpoint()} --no_augmented_prompt --output_dir OUT",
    "bench metrics": "bench metrics --out OUT",
    "bench drift": "bench drift a.mp4 --no-features --out OUT",
}
NO_FOLDERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "below a file": (_below_a_file, "file is no folder"),
    "a link to itself": (_loop, "leads nowhere, or in a circle"),
    "a link to nothing": (lambda place: _loop(place.with_name("other")).rename(place), "leads nowhere, or in a circle"),
}


def _in_folder(command: str, place: str) -> Fault:
    make, refusal = NO_FOLDERS[place]
    argv = lambda folder: [*FOLDERS[command].replace("OUT", str(make(folder / "out"))).split()]  # noqa: E731
    return Fault(place, kind=f"folders of {command}", refusal=refusal, main=cli.main, argv=argv, deadline=8)


LATER = {
    "stream": ("no checkpoint at", "stream --ckpt none --prompt cat --save_path OUT/a.mp4 --report OUT/b.json"),
    "sample": ("does not exist", "sample rcm --dit_path none --save_path OUT/a.mp4 --device cpu --preview_grid OUT/b.png"),
    "export": ("none", "checkpoint export --dcp_checkpoint_dir none --save_path OUT/a.pth"),
    "convert": ("none", "checkpoint convert none OUT/a.pth"),
    "plan": ("unknown key", "plan experiment=toy_tf_c3-3 nothing=1 --json OUT/a.json"),
    "memory": ("unknown key", "bench memory experiment=toy_tf_c3-3 nothing=1 --json OUT/a.json"),
    "doctor": ("unrecognized", "doctor --json OUT/a.json --nothing"),
    "view": ("no shard", "data view none.tar --sheet OUT/a.png"),
    "negative": ("none", "data build --source teacher --teacher none --write_negative_embedding OUT/a.pt"),
    "demo": ("must be", "demo --out OUT --videos 3"),
}
"""What is refused once the place of the output was looked at."""


def _later(command: str) -> Fault:
    refusal, line = LATER[command]

    def argv(folder: Path) -> list[str]:
        return line.replace("OUT", str(folder / "new" / "deeper")).split()

    def left_nothing(folder: Path) -> None:
        assert not list(folder.iterdir())

    return Fault(
        command, kind="outputs of what is refused later", refusal=refusal, main=cli.main, argv=argv, after=left_nothing, deadline=8
    )


@each([*(_in_folder(command, place) for command in FOLDERS for place in NO_FOLDERS), *map(_later, LATER)])
def test_folders(case: Fault, tmp_path: Path) -> None:
    case.check(tmp_path)
