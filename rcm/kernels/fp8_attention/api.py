"""FP8 attention over coded keys and values: kernels on Hopper, the formula on a CPU. Inference
only: no gradient, no tangent, no mask.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from rcm.kernels.fp8_attention import codes as formulas
from rcm.kernels.fp8_attention.codes import GROUP, Codes, Scales
from rcm.kernels.fp8_attention.reference import attend_reference
from rcm.kernels.launching import unit_stride
from rcm.kernels.persistent_attention.api import CAPABILITY, WIDTH


def obstacle(device: torch.device, *, width: int) -> str | None:
    """Why heads of `width` channels on `device` cannot be attended to in FP8; None if they can. A
    CPU computes the formula, any width.
    """
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"it has kernels for CUDA, the device is {device}"
    if (found := torch.cuda.get_device_capability(device)) != CAPABILITY:
        return (
            f"its kernels are for compute capability {_dotted(CAPABILITY)} (H100, H200), this card"
            f" has {_dotted(found)}"
        )
    if width != WIDTH:
        return f"its kernels are for heads of {WIDTH} channels, the network's have {width}"
    return (
        None
        if importlib.util.find_spec("triton")
        else "its kernels need the package triton, which is not installed"
    )


def write(codes: Codes, slots: Tensor, k: Tensor, v: Tensor, *, at_slots: bool = False) -> None:
    """Code keys and values into `slots` int64 [L]: `k`, `v` [B, L, N, D], or with `at_slots` what
    lies in those slots of [B, S, N, D].
    """
    if k.is_cuda:
        from rcm.kernels.fp8_attention import launch  # Triton is imported only on CUDA

        launch.write(codes, slots, unit_stride(k), unit_stride(v), at_slots=at_slots)
    else:
        formulas.write_reference(codes, slots, k, v, at_slots=at_slots)


def attend(q: Tensor, codes: Codes, *, count: int, scale: float) -> Tensor:
    """softmax(scale q k^T) v over the first `count` tokens of `codes`; `q` [B, L, N, D], as is the
    result.
    """
    if not q.is_cuda:
        queries = formulas.code_queries_reference(q, codes.scales, scale=scale)
        return attend_reference(queries, codes, count=count, dtype=q.dtype)
    from rcm.kernels.fp8_attention import launch
    from rcm.kernels.fp8_attention.schedule import PortableTiles, chosen_tiles

    queries = launch.code_queries(unit_stride(q), codes.scales, scale=scale)
    tiles = chosen_tiles(kv_len=count)
    if isinstance(tiles, PortableTiles):
        return launch.attend_portable(
            queries, codes, count=count, dtype=q.dtype, tiles=tiles, parts=1
        )
    return launch.attend_hopper(queries, codes, count=count, dtype=q.dtype, tiles=tiles)


def attend_plain(q: Tensor, k: Tensor, v: Tensor, scales: Scales, *, scale: float) -> Tensor:
    """The same over keys and values [B, S, N, D] that are coded for this call, under scales at
    hand.
    """
    count = k.shape[1]
    coded = _room_for(scales, batch=k.shape[0], count=count)
    write(coded, torch.arange(count, device=k.device), k, v)
    return attend(q, coded, count=count, scale=scale)


def _room_for(scales: Scales, *, batch: int, count: int) -> Codes:
    """As `new_codes`, for `count` tokens that will be written all: only what lies behind them must
    be set.
    """
    heads, width = scales.key_center.shape
    room, device = -(-count // GROUP) * GROUP, scales.key_scale.device
    keys = torch.empty(batch, heads, room, width, dtype=torch.uint8, device=device)
    values = torch.empty(batch, heads, width, room, dtype=torch.uint8, device=device)
    keys[:, :, room - GROUP :] = 0
    values[..., room - GROUP :] = 0
    return Codes(keys.view(formulas.E4M3), values.view(formulas.E4M3), scales)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
