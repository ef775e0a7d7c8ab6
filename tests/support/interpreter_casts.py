"""Casts of floating-point types in Triton's interpreter as the hardware does them: to the nearest,
halves to even.

The interpreter (triton 3.6 and 3.7) cuts off what does not fit into bf16 and loses a carry when it
rounds to e4m3 (0.487 becomes 0.25).
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}
RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def install() -> None:
    """Replace the interpreter's casts by torch's, for the types that torch knows."""
    before = interpreter._convert_float

    def convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: object) -> np.ndarray:
        if str(source) not in TORCH or str(target) not in TORCH:
            return before(data, source, target, rounding)
        plain = torch.frombuffer(bytearray(data.tobytes()), dtype=TORCH[str(source)])
        if target == tl.float8e4nv:
            plain = plain.float().clamp(-448, 448)
        cast = plain.to(TORCH[str(target)])
        return np.frombuffer(cast.view(torch.uint8).numpy().tobytes(), dtype=RAW[cast.element_size()]).reshape(data.shape)

    interpreter._convert_float = convert
