"""The tensors of the published Wan networks as docs/reference/wan.md#tensors lists them, written
without the network's code.
"""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]


def published_tensors(*, dim: int, ffn: int, layers: int, channels: int, image: bool = False, positions: int = 0, out: int = 16) -> Shapes:
    """Name -> shape in the original form, the patch weight with five dimensions."""
    shapes: Shapes = {"patch_embedding.weight": (dim, channels, 1, 2, 2), "patch_embedding.bias": (dim,), "head.modulation": (1, 2, dim)}
    linears = {
        "text_embedding.0": (dim, 4096),
        "text_embedding.2": (dim, dim),
        "time_embedding.0": (dim, 256),
        "time_embedding.2": (dim, dim),
        "time_projection.1": (6 * dim, dim),
        "head.head": (4 * out, dim),
    }
    norms = {}
    for i in range(layers):
        lead = f"blocks.{i}."
        shapes[lead + "modulation"] = (1, 6, dim)
        linears |= {f"{lead}{part}_attn.{letter}": (dim, dim) for part in ("self", "cross") for letter in "qkvo"}
        linears |= {lead + "ffn.0": (ffn, dim), lead + "ffn.2": (dim, ffn)}
        norms |= {f"{lead}{part}_attn.norm_{letter}.weight": (dim,) for part in ("self", "cross") for letter in "qk"}
        norms |= {lead + "norm3.weight": (dim,), lead + "norm3.bias": (dim,)}
        if image:
            linears |= {f"{lead}cross_attn.{letter}_img": (dim, dim) for letter in "kv"}
            norms[lead + "cross_attn.norm_k_img.weight"] = (dim,)
    if image:
        linears |= {"img_emb.proj.1": (1280, 1280), "img_emb.proj.3": (dim, 1280)}
        norms |= {f"img_emb.proj.{n}.{kind}": (width,) for n, width in ((0, 1280), (4, dim)) for kind in ("weight", "bias")}
    if positions:
        shapes["img_emb.emb_pos"] = (1, positions, 1280)
    for name, (rows, columns) in linears.items():
        shapes |= {name + ".weight": (rows, columns), name + ".bias": (rows,)}
    return shapes | norms


LARGE = {"dim": 5120, "ffn": 13824, "layers": 40}
PUBLISHED = {
    "1.3B": (published_tensors(dim=1536, ffn=8960, layers=30, channels=16), 825, 1_418_996_800),
    "14B": (published_tensors(**LARGE, channels=16), 1095, 14_288_491_584),
    "A14B": (published_tensors(**LARGE, channels=36), 1095, 14_288_901_184),
    "i2v-14B": (published_tensors(**LARGE, channels=36, image=True), 1303, 16_394_878_784),
    "flf2v-14B": (published_tensors(**LARGE, channels=36, image=True, positions=514), 1304, 16_395_536_704),
}
"""Preset -> (tensors, their number, parameters)."""
