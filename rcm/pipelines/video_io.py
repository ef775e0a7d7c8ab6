"""Videos in files: mp4 reading and writing through the ffmpeg that imageio-ffmpeg ships, contact sheets and GIFs for the eye.

Pixels are float tensors in [-1, 1], time before height and width ([3, F, H, W]); files hold 8 bits, yuv420p, so their sides are even.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageDraw

from rcm.core.errors import ConfigError

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
    """Pixels in [-1, 1] (clamped) to uint8, rounded to nearest; any shape. `ConfigError` for NaN."""
    if not torch.isfinite(video).all():
        raise ConfigError("video holds NaN or infinite pixels; nothing was written")
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def enlarge(video: torch.Tensor, factor: int) -> torch.Tensor:
    """Every pixel of [..., H, W] as a `factor` x `factor` square: toy videos are too small for the eye."""
    return video.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)


def comfortable_scale(height: int, width: int) -> int:
    """Whole factor for `enlarge` that makes the shorter side at least `COMFORTABLE`; 1 for a video that has more than a quarter of it."""
    side = min(height, width)
    return 1 if 4 * side > COMFORTABLE else math.ceil(COMFORTABLE / side)


class Mp4Writer:
    """A file that grows by chunks: `append` frames while they are made; the file appears under its name when the `with` block ends well.

    `fps` frames per second; `scale` enlarges by an integer; `crf` x264 quality (0 lossless, 18 visually lossless); `pad` repeats the last
    row or column of odd sizes, which otherwise raise `ConfigError`. An `OSError` (no folder, disk full) carries the path; a failed write
    leaves no file and an older one as it was.
    """

    def __init__(self, path: str | Path, *, fps: float, scale: int = 1, crf: int = 12, pad: bool = False) -> None:
        if fps <= 0 or scale < 1:
            raise ConfigError(f"mp4 needs fps > 0 and an integer scale >= 1, got fps={fps}, scale={scale}")
        self.path = Path(path)
        self._temporary = self.path.with_name(f".{self.path.name}.partial")
        self._fps, self._scale, self._crf, self._pad = fps, scale, crf, pad
        self._size: tuple[int, int] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the writer

    def __enter__(self) -> Mp4Writer:
        return self

    def append(self, video: torch.Tensor) -> None:
        """Write frames [3, f, H, W] in [-1, 1]; all chunks have one size."""
        if video.ndim != 4 or video.shape[0] != 3:
            raise ConfigError(f"mp4 frames are [3, F, H, W], got {tuple(video.shape)}; write one video of a batch at a time")
        frames = enlarge(to_uint8(video), self._scale)
        if self._pad:
            height, width = frames.shape[-2:]
            frames = torch.cat([frames, frames[..., -1:, :]], dim=-2) if height % 2 else frames
            frames = torch.cat([frames, frames[..., -1:]], dim=-1) if width % 2 else frames
        size = (frames.shape[-1], frames.shape[-2])
        if size[0] % 2 or size[1] % 2:
            raise ConfigError(f"mp4 (yuv420p) needs even sides, got {size[0]}x{size[1]}; choose an even size or scale, or pad=True")
        if self._size is None:
            self._open(size)
        if size != self._size:
            raise ConfigError(f"frame size changed from {self._size} to {size} inside {self.path}")
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(frames.permute(1, 2, 3, 0).contiguous().cpu().numpy().tobytes())
        except OSError as error:
            raise self._failure() from error

    def _open(self, size: tuple[int, int]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(error.errno, f"cannot make the folder of a video: {error.strerror}", str(self.path)) from error
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}", "-r", f"{self._fps}", "-i", "-"]
        target = ["-an", "-vcodec", "libx264", "-pix_fmt", "yuv420p", "-crf", f"{self._crf}", "-movflags", "+faststart", "-f", "mp4"]
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *source, *target, str(self._temporary)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._log)
        self._size = size

    def _failure(self) -> OSError:
        if self._process is not None:
            self._process.wait()
        self._log.seek(0)
        told = " ".join(self._log.read().decode(errors="replace").split())[-300:]
        return OSError(errno.EIO, f"cannot write video: {told or 'ffmpeg stopped'}", str(self.path))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self._process is None:
                if kind is None:
                    raise ConfigError(f"no frames were given for {self.path}")
                return
            assert self._process.stdin is not None
            if kind is not None:
                self._process.kill()
                self._process.wait()
                return
            try:
                self._process.stdin.close()
            except OSError as error:
                raise self._failure() from error
            if self._process.wait():
                raise self._failure()
            os.replace(self._temporary, self.path)
        finally:
            self._log.close()
            with contextlib.suppress(OSError):  # the reason it cannot be removed is the one already being raised
                self._temporary.unlink(missing_ok=True)


def write_mp4(path: str | Path, video: torch.Tensor, *, fps: float, scale: int = 1, crf: int = 12, pad: bool = False) -> Path:
    """Write `video` [3, F, H, W] in [-1, 1]; arguments and errors of `Mp4Writer`. Returns the path."""
    with Mp4Writer(path, fps=fps, scale=scale, crf=crf, pad=pad) as writer:
        writer.append(video)
    return Path(path)


def probe(path: str | Path) -> VideoInfo:
    """`VideoInfo` of a file, its frames counted by decoding; `VideoError` if it is missing or not a video."""
    path = _existing(path)
    try:
        stream = imageio_ffmpeg.read_frames(str(path))
        meta = next(stream)
        stream.close()
        count, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
    except (OSError, RuntimeError, KeyError, ValueError, IndexError) as error:
        raise _unreadable(path, error) from error
    width, height = meta["size"]
    return VideoInfo(float(meta["fps"]), width, height, count)


def iter_frames(path: str | Path) -> Iterator[torch.Tensor]:
    """Frames uint8 [H, W, 3] of a file, one at a time; `VideoError` if it is missing or cannot be decoded."""
    path = _existing(path)
    stream = imageio_ffmpeg.read_frames(str(path))
    try:
        width, height = next(stream)["size"]
        for data in stream:
            yield torch.from_numpy(np.frombuffer(data, dtype=np.uint8).reshape(height, width, 3).copy())
    except (OSError, RuntimeError, KeyError, ValueError, IndexError) as error:
        raise _unreadable(path, error) from error
    finally:
        stream.close()


def read_mp4(path: str | Path) -> torch.Tensor:
    """All frames of a file, float32 [3, F, H, W] in [-1, 1]."""
    frames = list(iter_frames(path))
    if not frames:
        raise VideoError(f"{path} holds no frame")
    return torch.stack(frames).permute(3, 0, 1, 2).float() / 127.5 - 1


def resize_frame(frame: torch.Tensor, *, height: int, width: int) -> torch.Tensor:
    """A frame uint8 [H, W, 3] scaled to cover (height, width), cut at the centre: float32 [3, height, width] in [-1, 1]."""
    pixels = frame.permute(2, 0, 1).unsqueeze(0).float() / 127.5 - 1
    ratio = max(height / frame.shape[0], width / frame.shape[1])
    covering = (max(height, round(frame.shape[0] * ratio)), max(width, round(frame.shape[1] * ratio)))
    scaled = torch.nn.functional.interpolate(pixels, size=covering, mode="bilinear", antialias=True, align_corners=False)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return scaled[0, :, top : top + height, left : left + width].clamp(-1, 1)


def contact_sheet(path: str | Path, videos: torch.Tensor, *, labels: Sequence[str] | None = None, columns: int = 9, scale: int = 4) -> Path:
    """A PNG with one row per video of [B, 3, F, H, W]: `columns` frames spread evenly over time, its label above. Returns the path."""
    if videos.ndim != 5 or (labels is not None and len(labels) != len(videos)):
        raise ConfigError(
            f"a contact sheet takes [B, 3, F, H, W] and one label per video, got {tuple(videos.shape)} and {labels and len(labels)} labels"
        )
    picks = torch.linspace(0, videos.shape[2] - 1, min(columns, videos.shape[2])).round().long()
    tiles = enlarge(to_uint8(videos[:, :, picks]), scale)
    height, width, gap, title = tiles.shape[-2], tiles.shape[-1], 2, 12 if labels else 0
    sheet = Image.new("RGB", (len(picks) * (width + gap) + gap, len(tiles) * (height + gap + title) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for row, video in enumerate(tiles):
        top = gap + row * (height + gap + title)
        if labels:
            draw.text((gap, top), labels[row], fill="black")
        for column, frame in enumerate(video.unbind(1)):
            sheet.paste(Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()), (gap + column * (width + gap), top + title))
    return _save(sheet, path)


def write_gif(path: str | Path, video: torch.Tensor, *, fps: float, scale: int = 4) -> Path:
    """An endless GIF of `video` [3, F, H, W]; returns the path."""
    frames = enlarge(to_uint8(video), scale).permute(1, 2, 3, 0).contiguous().cpu().numpy()
    first, *rest = [Image.fromarray(frame) for frame in frames]
    return _save(first, path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


def _save(image: Image.Image, path: str | Path, **options: object) -> Path:
    """Save under a temporary name, then rename; an `OSError` carries the path."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(temporary, **options)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno or errno.EIO, f"cannot write picture: {error.strerror or error}", str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise VideoError(f"no video file at {path}")
    return path


def _unreadable(path: Path, error: Exception) -> VideoError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return VideoError(f"cannot decode {path}: {lines[-1] if lines else type(error).__name__}")
