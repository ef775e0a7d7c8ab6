"""Media and text as strangers write them: read as they are meant, or refused in one sentence that
names the file.
"""

from __future__ import annotations

import io
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image

from rcm.core.text_file import read_text
from rcm.data.prompt_list import read_prompt_list
from rcm.data.prompts import read_prompts
from rcm.inference import stream
from rcm.pipelines.clip_folder import caption_of, find_clips, plan_windows, read_windows
from rcm.pipelines.image_condition import read_image
from rcm.pipelines.video_io import probe, read_mp4
from scripts import build_dataset
from tests.faults.case import Fault, each

DEADLINE = 5
PICTURE = np.full((12, 20, 3), 99, np.uint8)
NOISE = np.random.default_rng(1).integers(0, 255, (64, 64, 3)).astype(np.uint8)


def encoded(kind: str, array: np.ndarray = PICTURE, **options: object) -> bytes:
    """A picture in a format."""
    out = io.BytesIO()
    Image.fromarray(array).save(out, format=kind, **options)
    return out.getvalue()


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header says one thing and whose data another."""
    parts = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    chunks = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def animated(kind: str) -> bytes:
    """Three frames."""
    frames = [Image.new("RGB", (8, 8), (i * 80, 0, 0)) for i in range(3)]
    out = io.BytesIO()
    frames[0].save(out, format=kind, save_all=True, append_images=frames[1:])
    return out.getvalue()


def inks() -> bytes:
    """A CMYK photograph."""
    out = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 99, 0, 0)).save(out, format="JPEG")
    return out.getvalue()


def clip(*words: str, size: str = "48x32", frames: int = 20) -> Callable[[Path], None]:
    """Makes an mp4 at a path with ffmpeg's test picture."""

    def make(path: Path) -> None:
        source = ("-f", "lavfi", "-i", f"testsrc=s={size}:r=10", "-frames:v", str(frames))
        whole = ["-pix_fmt", "yuv420p", "-movflags", "+faststart", *words, "-f", "mp4", str(path.absolute())]
        subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *source, *whole], check=True)

    return make


def cut(share: float) -> Callable[[Path], None]:
    """Makes an mp4 of which only the first part is there."""

    def make(path: Path) -> None:
        clip("-g", "5", frames=100)(path)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * share)])

    return make


IMAGES: dict[str, tuple[str, str | None, bytes]] = {
    "nothing in it": ("a.png", r"a\.png", b""),
    "text": ("a.png", r"a\.png", b"hello"),
    "cut off": ("a.png", r"a\.png", encoded("PNG")[:-30]),
    "a cut photograph": ("a.jpg", r"a\.jpg", encoded("JPEG", NOISE)[:900]),
    "a header without a picture": ("a.png", r"a\.png", png(64, 64, b"\0" * 10)),
    "a bomb": ("a.png", r"a\.png.*", png(60_000, 60_000)),
    "larger than is read": ("a.png", r"a\.png.*128 million", png(12_000, 12_000)),
    "no width": ("a.png", r"a\.png", png(0, 64)),
    "moving gif": ("a.gif", "holds 3 pictures", animated("GIF")),
    "moving webp": ("a.webp", "holds 3 pictures", animated("WEBP")),
    "moving png": ("a.png", "holds 3 pictures", animated("PNG")),
    "pages": ("a.tiff", "holds 3 pictures", animated("TIFF")),
    "32-bit pixels": ("a.tiff", "32-bit", encoded("TIFF", np.ones((4, 4), np.float32))),
    "PostScript": ("a.png", r"a\.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file\n"),
    "an icon": ("a.png", r"a\.png", encoded("ICO")),
    "a damaged EXIF": ("a.jpg", None, encoded("JPEG", exif=b"Exif\0\0" + b"MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40)),
    "a wrong suffix": ("a.png", None, encoded("JPEG")),
    "a photograph in four inks": ("a.jpg", None, inks()),
    "half transparent": ("a.png", None, encoded("PNG", np.full((4, 4, 4), 128, np.uint8))),
    "16 bits": ("a.png", None, encoded("PNG", np.full((4, 4), 40_000, np.uint16))),
    "one bit": ("a.png", None, encoded("PNG", np.eye(9, dtype=bool))),
}


def _reads_image(name: str, data: bytes) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        (folder / name).write_bytes(data)
        pixels = read_image(folder / name)
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3

    return read


VIDEOS: dict[str, tuple[str | None, Callable[[Path], object]]] = {
    "nothing in it": ("a.mp4", lambda path: path.write_bytes(b"")),
    "text": ("a.mp4", lambda path: path.write_text("hello " * 99)),
    "cut in the middle": ("cut off|inside a frame", cut(0.6)),
    "cut in its head": ("cannot decode", cut(0.02)),
    "a list of other files": ("cannot decode", lambda path: path.write_text("ffconcat version 1.0\nfile /etc/hostname\n")),
    "a playlist": ("cannot decode", lambda path: path.write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n")),
    "a script": ("cannot decode", lambda path: path.write_text("<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>")),
    "sound alone": (
        "cannot decode",
        lambda path: subprocess.run(
            [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", "sine=d=1", "-f", "mp4", str(path)], check=True
        ),
    ),
    "frames too large": ("too large", clip(size="64x9000", frames=1)),
    "a folder": ("no video file", lambda path: path.mkdir()),
    "a device": ("no video file", lambda path: path.symlink_to("/dev/zero")),
    "a link to nothing": ("no video file", lambda path: path.symlink_to("gone")),
    "wide pixels": (None, clip("-vf", "setsar=4/3")),
    "pixels of no stated shape": (None, clip("-vf", "setsar=0")),
    "ten bits": (None, clip("-pix_fmt", "yuv420p10le")),
}
NAMES = ("12:30.mp4", "-i.mp4", "run[1].mp4", "a b'\"#.mp4", "%d.mp4", "concat:a.mp4", "x=1,y{2}.mp4", "\N{SNOWMAN}.mp4")


def _reads_video(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        make(folder / "a.mp4")
        probe(folder / "a.mp4")
        assert read_mp4(folder / "a.mp4").shape[0] == 3

    return read


def _reads_name(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        (folder / "run[1]").mkdir()
        clip(frames=5)(folder / "run[1]" / name)
        [found] = find_clips(folder / "run[1]")
        windows = plan_windows([found], num_frames=5, stride=1)
        assert len(list(read_windows(windows, height=16, width=16))) == 1

    return read


def _companions(folder: Path) -> None:
    clip(frames=5)(folder / "a.mp4")
    for name in ("._a.mp4", "._a.txt"):
        (folder / name).write_bytes(b"\0\x05\x16\x07" + bytes(60))
    assert [path.name for path in find_clips(folder)] == ["a.mp4"]


TEXTS: dict[str, tuple[str | None, bytes]] = {
    "Latin-1": (r"a\.txt:2 is not UTF-8.*iconv", b"one\ncaf\xe9\n"),
    "UTF-16 without a mark": ("looks like UTF-16", "one two".encode("utf-16-le")),
    "half a UTF-16": ("begins as UTF-16-LE", b"\xff\xfea"),
    "with a mark": (None, b"\xef\xbb\xbfone\r\ntwo\r\n\r\n"),
    "UTF-16": (None, "one\ntwo\n".encode("utf-16")),
    "old line ends": (None, b"one\rtwo\r"),
    "blank lines at the end": (None, b"one\ntwo\n\n \n\n"),
}
READERS: dict[str, Callable[[Path], object]] = {
    "prompts": read_prompts,
    "prompt list": read_prompt_list,
    "stream's prompts": lambda path: stream.read_prompts(None, str(path), allow_empty=False),
    "caption": lambda path: caption_of(path.with_suffix(".mp4")).split(),
}


def _reads_text(reader: str, data: bytes) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        (folder / "a.txt").write_bytes(data)
        assert READERS[reader](folder / "a.txt") == ["one", "two"]

    return read


def _no_text(name: str, make: Callable[[Path], object], refusal: str) -> Fault:
    def read(folder: Path) -> None:
        make(folder / "a.txt")
        read_text(folder / "a.txt", what="prompt file", knob="--prompts")

    return Fault(name, kind="text files", refusal=refusal, call=read, deadline=DEADLINE)


def _first_frames(name: str, refusal: str, make: Callable[[Path], object], file: str) -> Fault:
    def argv(folder: Path) -> list[object]:
        make(folder / file)
        words = ["--prompt", "a red cross moving up", "--device", "cpu", "--save_path", folder / "out.mp4"]
        return [*words, "--first_frames", folder / file]

    def after(folder: Path) -> None:
        assert not (folder / "out.mp4").exists()

    return Fault(name, kind="first frames of stream", refusal=refusal, main=stream.main, argv=argv, after=after, deadline=DEADLINE)


def _built(name: str, refusal: str | None, make: Callable[[Path], object]) -> Fault:
    def argv(folder: Path) -> list[object]:
        (folder / "in").mkdir()
        clip(frames=5, size="32x32")(folder / "in" / "a_red_square.mp4")
        make(folder / "in")
        return ["--source", "videos", "--input", folder / "in", "--size", "32x32", "--frames", "5", "--out", folder / "out"]

    return Fault(name, kind="folders of build_dataset", refusal=refusal, main=build_dataset.main, argv=argv, deadline=DEADLINE)


CASES = [
    *(Fault(n, kind="images", refusal=told, call=_reads_image(file, data), deadline=DEADLINE) for n, (file, told, data) in IMAGES.items()),
    *(Fault(n, kind="videos", refusal=told, call=_reads_video(make), deadline=DEADLINE) for n, (told, make) in VIDEOS.items()),
    *(Fault(n, kind="names of videos", refusal=None, call=_reads_name(n), deadline=DEADLINE) for n in NAMES),
    *(
        Fault(f"{reader}: {n}", kind="text files", refusal=told, call=_reads_text(reader, data), deadline=DEADLINE)
        for reader in READERS
        for n, (told, data) in TEXTS.items()
    ),
    Fault("companions of macOS", kind="videos", refusal=None, call=_companions, deadline=DEADLINE),
    _no_text("missing", lambda path: None, "no prompt file at .*--prompts"),
    _no_text("a folder", lambda path: path.mkdir(), "is a folder or a device"),
    _no_text("endless", lambda path: path.symlink_to("/dev/zero"), "is a folder or a device"),
    _no_text("a loop", lambda path: path.symlink_to(path), "no prompt file at|cannot read"),
    _first_frames("a broken image", "cannot decode", lambda path: path.write_bytes(b"x"), "a.png"),
    _first_frames("a cut clip", "cannot decode", cut(0.05), "a.mp4"),
    _first_frames("an animation", "holds 3 pictures", lambda path: path.write_bytes(animated("WEBP")), "a.webp"),
    _built("companions", None, lambda folder: (folder / "._a_red_square.mp4").write_bytes(b"\0\x05\x16\x07" * 9)),
    _built("a caption in Latin-1", r"a_red_square\.txt:1 is not UTF-8", lambda folder: (folder / "a_red_square.txt").write_bytes(b"\xe9")),
    _built("a cut clip", "cannot decode", lambda folder: cut(0.6)(folder / "b.mp4")),
]


@each(CASES)
def test_read_or_refused(case: Fault, tmp_path: Path) -> None:
    case.check(tmp_path)
