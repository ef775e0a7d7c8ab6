"""Compile the Hopper kernel for compute capability 9.0 without a GPU: shows that this Triton still
accepts it.
"""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from rcm.kernels.flash_jvp.hopper import hopper_forward
from rcm.kernels.flash_jvp.launch_hopper import REGISTERS, hopper_tiles

POINTERS = {"o_ptr": "*{}", "od_ptr": "*{}", "lse_ptr": "*fp32", "tiles": "*i32", "pieces": "*i32", "rows_table": "*i32"}


def compile_for_sm90(*, flags: int, classes: int, edge: int, d_qk: int = 128, d_v: int = 128, dtype: str = "bf16"):
    """The compiled kernel object (`.asm`, `.metadata`) for one choice of constants."""
    tiles = hopper_tiles(d_qk=d_qk, d_v=d_v, flags=flags)
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    rows = {"q": 64, "k": tiles.block_n, "v": tiles.block_n}
    signature = {}
    for name in hopper_forward.arg_names:
        if name.endswith("_desc"):
            width = d_v if name[0] == "v" else d_qk
            signature[name] = f"tensordesc<{dtype}[1, {rows[name[0]]}, 1, {width}],{layout!r}>"
        elif name in POINTERS:
            signature[name] = POINTERS[name].format(dtype)
        else:
            signature[name] = "constexpr" if name.isupper() else "fp32" if name.endswith("_scale") else "i32"
    constants = {
        "FLAGS": flags,
        "CLASSES": classes,
        "EDGE": edge,
        "BLOCK_N": tiles.block_n,
        "D_QK": d_qk,
        "D_V": d_v,
        "STAGES": tiles.num_stages,
    }
    index = hopper_forward.arg_names.index
    aligned = {(index(name),): [["tt.divisibility", 16]] for name in (*POINTERS, "stride_b", "stride_l", "stride_n")}
    source = GluonASTSource(hopper_forward, signature, {(index(name),): value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tiles.num_warps, "maxnreg": REGISTERS})
