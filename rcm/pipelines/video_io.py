"""Videos in files: mp4 reading and writing through the ffmpeg that imageio-ffmpeg ships, contact
sheets and GIFs for the eye.

Pixels are float tensors in [-1, 1], time before height and width ([3, F, H, W]); files hold 8 bits,
yuv420p, so their sides are even.
"""

from __future__ import annotations

import errno
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from loguru import logger
from PIL import Image, ImageDraw

from rcm.core.errors import ConfigError, NonFinite
from rcm.core.output_file import OutputFile
from rcm.core.records import require_kind
from rcm.pipelines.mp4_encoder import Encoder, enlarge, keep_somewhere, require_ffmpeg

KEPT_BYTES = 1 << 30
"""Pixels that a writer remembers for the case that the write fails: 14 minutes at 256x256 and 16
frames per second.
"""

MAX_SIDE = 8192
"""Pixels a side of a frame, read or written."""

PICTURES = {".png": "PNG", ".gif": "GIF"}

_FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,gif,apng,h264,hevc,ivf,webp_pipe,m4v,mpegvideo"
_KNOWN = "Invalid data|moov atom|not on whitelist|matches no streams|Invalid argument"
_SQUARE_PIXELS = "scale='max(1,round(iw*sar))':ih,setsar=1"

COMFORTABLE = 256
"""Pixels on the shorter side of a toy video that is enlarged for the eye."""


class VideoError(RuntimeError):
    """A video file cannot be decoded; the message names it."""


@dataclass(frozen=True)
class VideoInfo:
    """Frames per second, size in pixels and number of frames of a file."""

    fps: float
    width: int
    height: int
    num_frames: int


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] (clamped) to uint8, rounded to nearest; any shape. `ConfigError` for whole
    numbers, which are of another range; `NonFinite` for NaN.
    """
    if not video.is_floating_point():
        raise ConfigError(f"pixels to write are floats in [-1, 1], got {video.dtype}")
    if not torch.isfinite(video).all():
        raise NonFinite("video holds NaN or infinite pixels; nothing was written")
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def comfortable_scale(height: int, width: int) -> int:
    """Whole factor for `enlarge` that makes the shorter side at least `COMFORTABLE`; 1 for a video
    that has more than a quarter of it.
    """
    side = min(height, width)
    return 1 if 4 * side > COMFORTABLE else math.ceil(COMFORTABLE / side)


def claim_video(path: str | Path, *, knob: str) -> OutputFile:
    """An mp4 file that will be written (`OutputFile.claim`), looked at before anything is made for
    it. `ConfigError` without ffmpeg.
    """
    require_ffmpeg()
    return OutputFile.claim(path, suffix=".mp4", knob=knob)


class Mp4Writer:
    """A file that grows by chunks: `append` frames while they are made; the file appears under its
    name when the `with` block ends well.

    `fps` frames per second; `scale` enlarges by an integer; `crf` x264 quality (0 lossless, 18
    visually lossless); `pad` repeats the last row or column of odd sizes, which otherwise raise
    `ConfigError`. A failed write is an `OSError` that carries the path and says where the frames
    (the last GiB of them) are kept; an older file stays as it was. A block that is interrupted, or
    fails in its own work after some chunks, leaves those in NAME.partial.mp4, with a warning.
    """

    def __init__(
        self,
        path: str | Path | OutputFile,
        *,
        fps: float,
        scale: int = 1,
        crf: int = 12,
        pad: bool = False,
    ) -> None:
        require_kind("fps", fps, float)
        require_kind("scale", scale, int)
        if fps <= 0 or scale < 1:
            raise ConfigError(
                f"mp4 needs fps > 0 and an integer scale >= 1, got fps={fps}, scale={scale}"
            )
        self.path = Path(path.given) if isinstance(path, OutputFile) else Path(path)
        self._target: str | Path | OutputFile = path
        self._settings: dict[str, Any] = {"fps": fps, "scale": scale, "crf": crf, "pad": pad}
        self._encoder: Encoder | None = None
        self._kept: list[torch.Tensor] = []

    def __enter__(self) -> Mp4Writer:
        return self

    def append(self, video: torch.Tensor) -> None:
        """Write frames [3, f, H, W] in [-1, 1]; all chunks have one size. Errors as `to_uint8`."""
        if video.ndim != 4 or video.shape[0] != 3:
            raise ConfigError(
                f"mp4 frames are [3, F, H, W], got {tuple(video.shape)}; write one video of a batch"
                " at a time"
            )
        pixels = to_uint8(video).cpu()
        if self._encoder is None:
            check_frame(
                *pixels.shape[-2:], scale=self._settings["scale"], pad=self._settings["pad"]
            )
            target = OutputFile.claim(self._target)
            self._encoder = Encoder(target.temporary(), **self._settings)
            self._target = target
        if self._kept and self._kept[-1].shape[-2:] != pixels.shape[-2:]:
            sizes = [f"{shape[-1]}x{shape[-2]}" for shape in (self._kept[-1].shape, pixels.shape)]
            raise ConfigError(
                f"frame size changed from {sizes[0]} to {sizes[1]} inside {self.path}"
            )
        self._kept.append(pixels)
        while len(self._kept) > 1 and sum(chunk.numel() for chunk in self._kept) > KEPT_BYTES:
            self._kept.pop(0)
        try:
            self._encoder.write(pixels)
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> OSError:
        """The error of a failed write, once the frames are somewhere else."""
        assert self._encoder is not None
        self._encoder.remove()
        self._encoder = None
        kept = keep_somewhere(self._kept, name=self.path.stem, **self._settings)
        count = sum(chunk.shape[1] for chunk in self._kept)
        where = f"are kept in {kept}" if kept else "could not be kept anywhere else either"
        told = f"its {count} frames {where}"
        return OSError(
            error.errno or errno.EIO,
            f"cannot write video: {error.strerror or error}; {told}",
            str(self.path),
        )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._encoder is None:
            if kind is None:
                raise ConfigError(f"no frames were given for {self.path}")
            return
        assert isinstance(self._target, OutputFile)  # claimed with the first frames
        target = self._target.path
        try:
            if kind is None:
                self._encoder.place(target)
            elif not issubclass(kind, ConfigError | GeneratorExit) and self._kept:
                self._encoder.place(target.with_suffix(".partial.mp4"))
                logger.warning(
                    "broken off; what there was until then is in"
                    f" {self.path.with_suffix('.partial.mp4')}"
                )
        except OSError as error:
            if kind is None:
                raise self._failure(error) from error
            logger.warning(f"broken off, and what there was until then could not be kept: {error}")
        finally:
            if self._encoder is not None:
                self._encoder.remove()


def check_frame(
    height: int, width: int, *, scale: int, pad: bool = False, advice: str = "make them smaller"
) -> None:
    """`ConfigError` unless enlarged frames fit an mp4: even sides (or `pad`), up to `MAX_SIDE`,
    with `advice` for larger ones.
    """
    height, width = height * scale, width * scale
    if not pad and (width % 2 or height % 2):
        raise ConfigError(
            f"mp4 (yuv420p) needs even sides, got {width}x{height}; choose an even size or scale,"
            " or pad=True"
        )
    if max(height, width) > MAX_SIDE:
        raise ConfigError(
            f"frames of {height}x{width} (HxW) are too large for an mp4, {MAX_SIDE} a side at most;"
            f" {advice}"
        )


def write_mp4(
    path: str | Path | OutputFile,
    video: torch.Tensor,
    *,
    fps: float,
    scale: int = 1,
    crf: int = 12,
    pad: bool = False,
) -> Path:
    """Write `video` [3, F, H, W] in [-1, 1], as `Mp4Writer` does; returns the path."""
    with Mp4Writer(path, fps=fps, scale=scale, crf=crf, pad=pad) as writer:
        writer.append(video)
    return writer.path


def probe(path: str | Path) -> VideoInfo:
    """`VideoInfo` of a file as it is read (square pixels), its frames counted by decoding;
    `VideoError` if it is missing or not a video.
    """
    path = _existing(path)
    command = _decoder(path, "-progress", "pipe:1", "-f", "null", "-fps_mode", "cfr", log="info")
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    _require_whole(path, done.returncode, done.stderr)
    lines = [line for line in done.stderr.splitlines() if re.match(r"\s*Stream #.* Video: ", line)]
    sizes = [re.search(r" (\d+)x(\d+)[, ]", line) for line in lines]
    rate = re.search(r" ([\d.]+)(k?) fps", lines[0]) if lines else None
    count = re.findall(r"^frame=(\d+)$", done.stdout, re.M)
    if not (lines and sizes[-1] and count):
        raise VideoError(f"cannot decode {path}: no video stream was found")
    fps = 0.0 if rate is None else float(rate[1]) * (1000 if rate[2] else 1)
    return VideoInfo(fps, int(sizes[-1][1]), int(sizes[-1][2]), int(count[-1]))


def iter_frames(path: str | Path) -> Iterator[torch.Tensor]:
    """Frames uint8 [H, W, 3] of a file, one at a time, upright and of square pixels (wider ones are
    stretched to their shape).

    `VideoError` if the file is missing, cannot be decoded, ends early, or refers to other files.
    """
    path = _existing(path)
    command = _decoder(path, "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", log="error")
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
        assert process.stdout is not None  # a pipe
        try:
            while (frame := _next_ppm(process.stdout, path)) is not None:
                yield frame
            process.wait()
            log.seek(0)
            _require_whole(path, process.returncode, log.read().decode(errors="replace"))
        finally:
            process.stdout.close()
            process.kill()
            process.wait()


def _decoder(path: Path, *output: str, log: str) -> list[str]:
    """An ffmpeg that decodes the first video stream of one file: with an absolute path no part of a
    name is a protocol, and formats that are lists of other files are none.
    """
    quiet = f"-nostdin -hide_banner -nostats -loglevel {log} -format_whitelist {_FORMATS} -i"
    chosen = ["-map", "0:v:0", "-vf", _SQUARE_PIXELS, *output, "-"]
    return [require_ffmpeg(), *quiet.split(), str(path.absolute()), *chosen]


def _next_ppm(stream: IO[bytes], path: Path) -> torch.Tensor | None:
    """The next picture of a stream of binary PPMs; None at its end."""
    if not stream.readline():
        return None
    try:
        width, height = map(int, stream.readline().split())
    except ValueError as error:
        raise VideoError(f"cannot decode {path}: it ended inside a frame") from error
    if max(width, height) > MAX_SIDE:
        raise VideoError(
            f"cannot decode {path}: frames of {height}x{width} (HxW) are too large, at most"
            f" {MAX_SIDE} a side"
        )
    stream.readline()
    data = stream.read(width * height * 3)
    if len(data) < width * height * 3:
        raise VideoError(f"cannot decode {path}: it ended inside a frame")
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).reshape(height, width, 3).copy())


def _require_whole(path: Path, status: int, told: str) -> None:
    """`VideoError` with ffmpeg's reason where it failed, or met the end of the file before the end
    of the video.
    """
    lines = [re.sub(r"^\[[^]]*\] ", "", line.strip()) for line in told.splitlines() if line.strip()]
    if status:
        known = [line for line in lines if re.search(_KNOWN, line)]
        raise VideoError(f"cannot decode {path}: {(known or lines or ['ffmpeg stopped'])[0][:200]}")
    if "partial file" in told:
        raise VideoError(f"cannot decode {path}: the file is cut off, its last frames are missing")


def read_mp4(path: str | Path) -> torch.Tensor:
    """All frames of a file, float32 [3, F, H, W] in [-1, 1]."""
    frames = list(iter_frames(path))
    if not frames:
        raise VideoError(f"{path} holds no frame")
    return torch.stack(frames).permute(3, 0, 1, 2).float() / 127.5 - 1


def resize_frame(frame: torch.Tensor, *, height: int, width: int) -> torch.Tensor:
    """A frame uint8 [H, W, 3] scaled to cover (height, width), cut at the centre: float32 [3,
    height, width] in [-1, 1].
    """
    pixels = frame.permute(2, 0, 1).unsqueeze(0).float() / 127.5 - 1
    ratio = max(height / frame.shape[0], width / frame.shape[1])
    covering = (
        max(height, round(frame.shape[0] * ratio)),
        max(width, round(frame.shape[1] * ratio)),
    )
    scaled = torch.nn.functional.interpolate(
        pixels, size=covering, mode="bilinear", antialias=True, align_corners=False
    )
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return scaled[0, :, top : top + height, left : left + width].clamp(-1, 1)


def contact_sheet(
    path: str | Path | OutputFile,
    videos: torch.Tensor,
    *,
    labels: Sequence[str] | None = None,
    columns: int = 9,
    scale: int = 4,
) -> Path:
    """A PNG with one row per video of [B, 3, F, H, W]: `columns` frames spread evenly over time,
    its label above. Returns the path.
    """
    if videos.ndim != 5 or (labels is not None and len(labels) != len(videos)):
        raise ConfigError(
            "a contact sheet takes [B, 3, F, H, W] and one label per video, got"
            f" {tuple(videos.shape)} and {labels and len(labels)} labels"
        )
    picks = torch.linspace(0, videos.shape[2] - 1, min(columns, videos.shape[2])).round().long()
    tiles = enlarge(to_uint8(videos[:, :, picks]), scale)
    height, width, gap, title = tiles.shape[-2], tiles.shape[-1], 2, 12 if labels else 0
    sheet = Image.new(
        "RGB",
        (len(picks) * (width + gap) + gap, len(tiles) * (height + gap + title) + gap),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for row, video in enumerate(tiles):
        top = gap + row * (height + gap + title)
        if labels:
            draw.text((gap, top), labels[row], fill="black")
        for column, frame in enumerate(video.unbind(1)):
            sheet.paste(
                Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()),
                (gap + column * (width + gap), top + title),
            )
    return _save(sheet, path)


def _save(image: Image.Image, path: str | Path | OutputFile, **options: object) -> Path:
    """Save under a temporary name, then rename; an `OSError` carries the path."""
    target = OutputFile.claim(path)
    try:
        with target.replacing() as temporary:
            image.save(temporary, format=PICTURES.get(target.path.suffix.lower(), "PNG"), **options)
    except OSError as error:
        raise OSError(
            error.errno or errno.EIO,
            f"cannot write picture: {error.strerror or error}",
            target.given,
        ) from error
    return Path(target.given)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    try:
        if path.is_file():
            return path
    except (OSError, ValueError):
        pass  # a name that no file can have
    raise VideoError(f"no video file at {path}")
