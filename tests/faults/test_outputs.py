"""Places that no file can be written to, for every command that writes one: found before the work,
and nothing is left behind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from rcm.inference import stream, wan2pt1_t2v_rcm_infer
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
