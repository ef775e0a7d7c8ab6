"""`rcm doctor --compile`: kernels of a stream, compiled onto the disk before there is one."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from rcm.front import ahead, doctor
from rcm.kernels.precompile import Compiled


@pytest.mark.parametrize("text", ["480", "480x", "480x830", "0x16", "480x832x3", "-16x16", "99999x16", "480.0x832"])
def test_sizes_that_no_stream_has_are_refused(text: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--quick", f"--compile={text}"])
    assert ended.value.code == 2 and f"'{text}' is not HxW" in capsys.readouterr().err


def test_without_a_card_it_is_said(capsys: pytest.CaptureFixture) -> None:
    assert doctor.main(["--quick", "--compile", "480x832"]) == 0
    assert "compile      no CUDA device: nothing was compiled" in capsys.readouterr().out


def test_every_part_is_compiled_for_a_hopper_card_and_its_own_alone_for_others() -> None:
    device = torch.device("cuda", 0)
    for capability, parts in (((9, 0), 5), ((8, 0), 3)):
        with (
            patch.object(torch.cuda, "get_device_capability", lambda _, found=capability: found),
            patch.object(ahead, "precompile", lambda plan, *, device: Compiled(1, 0.5)),
            patch.object(ahead, "compile_decoder", lambda device, *, size: Compiled(size[0], 0.5)),
        ):
            found = dict(ahead.compiled(device, (480, 832)))
        assert len(found) == parts and found["decoder"].kernels == 480
        assert ("FP8 attention" in found) == (capability == (9, 0))


@pytest.mark.slow
def test_what_is_compiled_lies_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from rcm.kernels.persistent_attention import launch
    from tests.support.pretend_gpu import pretended

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with pretended() as loaded, patch.object(launch, "processors", lambda _: 132):
        found = dict(ahead.compiled(torch.device("cuda", 0), (16, 16)))
    assert all(done.kernels for done in found.values())
    assert len(loaded) == sum(done.kernels for done in found.values()) and len(list(tmp_path.rglob("*.cubin"))) >= len(set(loaded))
