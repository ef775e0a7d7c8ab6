"""Files that are not a network of this package, recognised by names and shapes so that the refusal
can say what they are. docs/reference/wan.md#files.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rcm.nets.wan.convert import PATCH_KEY, WRAPPERS
from rcm.nets.wan.lora import is_lora

LORA = "a low-rank update (LoRA), not a network; pass it as --lora beside the base network's file"
VAE = "Wan's VAE, not a network; pass it as --vae_path"
TEXT = "the umT5 text encoder, not a network; pass it as --text_encoder_path"
CLIP = "the CLIP image encoder of Wan2.1 image-to-video, not a network"

_ANCHORS = {
    ("decoder.conv1.weight", "decoder.conv_in.weight"): VAE,
    ("token_embedding.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"): TEXT,
}
# words of a key -> what the file is; the first that occurs
_WORDS = {
    "int8_weight qweight qzeros": (
        "quantised (as TurboDiffusion publishes it), and nothing here applies its scales; take the"
        " bf16 file of the same model"
    ),
    "scaled_fp8 scale_weight weight_scale scale_input": (
        "an fp8 repack with scales that nothing here applies; take the bf16 or fp32 file of the"
        " same model"
    ),
    "proj_l": (
        "a TurboDiffusion network with sparse-linear attention (proj_l), another architecture;"
        " take its file with plain attention"
    ),
    "vace_blocks vace_patch_embedding": (
        "a VACE network, which has control blocks that this architecture lacks"
    ),
    "control_adapter ref_conv audio_injector audio_proj face_adapter motion_encoder": (
        "a Wan network with a control, audio or motion branch that this architecture lacks"
    ),
}


def foreign(headers: Mapping[str, Tensor]) -> str | None:
    """What a file with these entries (meta tensors suffice) is, as the end of a sentence "it is
    ..."; None for a network to be tried.
    """
    if is_lora(headers):
        return LORA
    words = {word for key in headers for word in WRAPPERS.sub("", key).split(".")}
    for marks, told in _WORDS.items():
        if words.intersection(marks.split()):
            return told
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in headers.values()})
    if eight := ", ".join(name for name in dtypes if name.startswith("float8")):
        return (
            f"an fp8 repack ({eight}), whose rounding this package does not undo; take the bf16 or"
            " fp32 file of the same model"
        )
    for key, tensor in headers.items():
        is_patch = key.endswith(PATCH_KEY) and tensor.dim() in (2, 5)
        if is_patch and tensor.shape[0] == 3072 and tensor.shape[1] in (48, 192):
            return (
                "a network of the Wan2.2 TI2V-5B family (width 3072, 48 latent channels;"
                " LongLive-2.0 is one), which needs another VAE and per-token times; this package"
                " has Wan2.1 and Wan2.2-A14B"
            )
    for anchors, told in _ANCHORS.items():
        if any(anchor in headers for anchor in anchors):
            return told
    if any(k.startswith("visual.transformer.") or k.endswith("class_embedding") for k in headers):
        return CLIP
    return None
