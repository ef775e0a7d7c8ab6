"""One ffmpeg that writes pixels into an mp4, and where frames are kept when it cannot."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import imageio_ffmpeg
import numpy as np
import torch

from rcm.core.errors import ConfigError


def find_ffmpeg() -> str:
    """The program that reads and writes videos; `ConfigError` where there is none."""
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise ConfigError(
            "videos are read and written by ffmpeg, and none was found: `pip install"
            " imageio-ffmpeg` brings one along, IMAGEIO_FFMPEG_EXE names one of yours"
        ) from error


def require_ffmpeg() -> str:
    """`find_ffmpeg`; `ConfigError`, too, where IMAGEIO_FFMPEG_EXE names what cannot be run."""
    found = find_ffmpeg()
    if shutil.which(found) is None:
        raise ConfigError(
            f"videos are read and written by ffmpeg, and IMAGEIO_FFMPEG_EXE={found} is no program"
            " that can be run; name another, or unset it"
        )
    return found


def enlarge(video: torch.Tensor, factor: int) -> torch.Tensor:
    """Every pixel of [..., H, W] as a `factor` x `factor` square: toy videos are too small for the
    eye.
    """
    return video.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)


class Encoder:
    """One ffmpeg that writes `path` from pixels; failures are `OSError`s of what it told."""

    def __init__(self, path: Path, *, fps: float, scale: int, crf: int, pad: bool) -> None:
        self.path, self._fps, self._scale, self._crf, self._pad = path, fps, scale, crf, pad
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the encoder

    def write(self, pixels: torch.Tensor) -> None:
        """Frames uint8 [3, f, H, W]."""
        frames = enlarge(pixels, self._scale)
        height, width = frames.shape[-2:]
        if self._pad:
            frames = torch.cat([frames, frames[..., -1:, :]], dim=-2) if height % 2 else frames
            frames = torch.cat([frames, frames[..., -1:]], dim=-1) if width % 2 else frames
        if self._process is None:
            self._process = self._started(frames.shape[-1], frames.shape[-2])
        try:
            _input(self._process).write(frames.permute(1, 2, 3, 0).contiguous().numpy().tobytes())
        except OSError as error:
            raise self._told() from error

    def _started(self, width: int, height: int) -> subprocess.Popen[bytes]:
        source = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {self._fps} -i -"
        target = (
            f"-an -vcodec libx264 -pix_fmt yuv420p -crf {self._crf} -movflags +faststart -f mp4"
        )
        command = [find_ffmpeg(), "-y", "-loglevel", "error"]
        command += [*source.split(), *target.split(), str(self.path.absolute())]
        # in a session of its own: Ctrl-C is for this process to answer
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            start_new_session=True,
        )

    def finish(self) -> None:
        """The file is whole after this."""
        if self._process is None:  # it did not start
            raise self._told()
        try:
            _input(self._process).close()
        except OSError as error:
            raise self._told() from error
        if self._process.wait():
            raise self._told()

    def place(self, path: Path) -> None:
        """The whole file stands at `path` after this."""
        self.finish()
        os.replace(self.path, path)

    def _told(self) -> OSError:
        if self._process is not None:
            self._process.wait()
        self._log.seek(0)
        words = " ".join(self._log.read().decode(errors="replace").split())[-300:]
        return OSError(
            errno.ENOSPC if os.strerror(errno.ENOSPC) in words else errno.EIO,
            words or ("ffmpeg stopped" if self._process else "ffmpeg did not start"),
        )

    def remove(self) -> None:
        """End the process; no file is left."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                _input(self._process).close()
            self._process.kill()
            self._process.wait()
        self._log.close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


def _input(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdin is not None  # a pipe
    return process.stdin


def keep_somewhere(chunks: Sequence[torch.Tensor], *, name: str, **settings: Any) -> Path | None:
    """Write chunks where there is room: an mp4, or an array [F, H, W, 3] if encoding fails."""
    for folder in (tempfile.gettempdir(), os.curdir, os.path.expanduser("~")):
        try:
            made = Path(tempfile.mkdtemp(prefix="rcm-kept-", dir=os.path.abspath(folder)))
        except OSError:
            continue
        encoder = Encoder(made / f"{name}.mp4", **settings)
        try:
            for chunk in chunks:
                encoder.write(chunk)
            encoder.finish()
            return encoder.path
        except OSError:
            encoder.remove()
        try:
            np.save(
                made / f"{name}.npy", torch.cat(list(chunks), dim=1).permute(1, 2, 3, 0).numpy()
            )
            return made / f"{name}.npy"
        except OSError:
            shutil.rmtree(made, ignore_errors=True)
    return None
