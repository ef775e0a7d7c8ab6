"""CLIP's image half: names, strict reading, preprocessing, and its formulas in float64."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch

from rcm.core.errors import CheckpointError, ConfigError
from rcm.encoders.clip_vision import CLIPShape, ClipVision, load_clip, open_clip, preprocess

# 2 heads of 80, images of 4 x 4 patches of 6 pixels
TINY = CLIPShape(dim=160, mlp_dim=96, layers=3, heads=2, patch=6, grid=4, projection=24)


def random_clip(shape: CLIPShape = TINY, *, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for name, size in shape.tensors().items():
        noise = torch.randn(size, generator=draw)
        if "norm" in name and name.endswith("weight"):
            noise = 1 + 0.3 * noise
        elif len(size) > 1 and "embedding" not in name:
            noise = 2 * noise / size[1] ** 0.5
        state[f"visual.{name}"] = noise
    return {**state, "textual.token_embedding.weight": torch.zeros(2, 2), "log_scale": torch.zeros(())}


def saved(tmp_path: Path, state: dict[str, torch.Tensor]) -> Path:
    torch.save(state, tmp_path / "clip.pth")
    return tmp_path / "clip.pth"


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(4)) * 2 - 1


def test_full_size_has_the_published_counts() -> None:
    shapes = CLIPShape().tensors()
    assert len(shapes) == 392
    assert sum(map(prod, shapes.values())) == 632_076_800
    assert (CLIPShape().image_size, shapes["pos_embedding"][1]) == (224, 257)
    assert [row.ours for row in CLIPShape().rows() if not row.theirs] == ["head"]


@torch.no_grad()
def oracle(state: dict[str, torch.Tensor], pixels: torch.Tensor, *, layers: int) -> torch.Tensor:
    """The first `layers` blocks in float64, from the original names.
    docs/reference/encoders.md#clip: pre-norm, exact GELU, eps 1e-5.
    """
    w = {name.removeprefix("visual."): value.double() for name, value in state.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    # B 3 g g p p
    patches = pixels.double().unfold(2, TINY.patch, TINY.patch).unfold(3, TINY.patch, TINY.patch)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ w["patch_embedding.weight"].flatten(1).T
    x = torch.cat([w["cls_embedding"].expand(len(x), 1, -1), x], 1) + w["pos_embedding"]
    x = norm(x, "pre_norm")
    for i in range(layers):
        p = f"transformer.{i}."
        h = norm(x, p + "norm1") @ w[p + "attn.to_qkv.weight"].T + w[p + "attn.to_qkv.bias"]
        q, k, v = (part.unflatten(2, (TINY.heads, -1)).transpose(1, 2) for part in h.split(TINY.dim, dim=2))
        h = (torch.softmax(q @ k.transpose(2, 3) / 80**0.5, -1) @ v).transpose(1, 2).flatten(2)
        x = x + h @ w[p + "attn.proj.weight"].T + w[p + "attn.proj.bias"]
        h = norm(x, p + "norm2") @ w[p + "mlp.0.weight"].T + w[p + "mlp.0.bias"]
        h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
        x = x + h @ w[p + "mlp.2.weight"].T + w[p + "mlp.2.bias"]
    return x


def test_features_equal_the_formulas_of_all_blocks_but_the_last(tmp_path: Path) -> None:
    state = random_clip()
    clip = ClipVision.from_file(saved(tmp_path, state), dtype=torch.float32)
    assert not clip.is_loaded
    batch = images(2, 3, 31, 50)
    out = clip.encode(batch)
    assert (out.shape, out.dtype) == ((2, 17, TINY.dim), torch.float32)
    expected = oracle(state, preprocess(batch, size=24), layers=TINY.layers - 1)
    assert expected.abs().max() > 1
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (expected - oracle(state, preprocess(batch, size=24), layers=TINY.layers)).abs().max() > 1e-1
    swapped = dict(state)
    for i in range(TINY.layers):
        name = f"visual.transformer.{i}.attn.to_qkv.weight"
        q, k, v = state[name].chunk(3)
        swapped[name] = torch.cat([q, v, k])
    wrong = ClipVision.from_file(saved(tmp_path, swapped), dtype=torch.float32).encode(batch)
    assert (wrong - expected).abs().max() > 1e-1


def test_every_weight_of_the_network_is_filled(tmp_path: Path) -> None:
    net = load_clip(open_clip(saved(tmp_path, random_clip())), device="cpu", dtype=torch.float16)
    assert not any(tensor.is_meta for tensor in (*net.parameters(), *net.buffers()))
    assert {p.dtype for p in net.parameters()} == {torch.float16}
    assert not net.training


def test_half_precision_follows_single_precision(tmp_path: Path) -> None:
    path = saved(tmp_path, random_clip())
    half, single = ClipVision.from_file(path), ClipVision.from_file(path, dtype=torch.float32)
    out = half.encode(images(1, 3, 24, 24))
    assert out.dtype == torch.float16
    reference = single.encode(images(1, 3, 24, 24))
    assert (out - reference).abs().max() < 2e-2 * reference.abs().max()
    half.unload()
    assert not half.is_loaded
    assert half.to("cpu").describe() == {"name": "clip_vision", "path": str(path)}


def test_preprocessing() -> None:
    """A constant image keeps its value at any size; a ramp is resized bicubically, without
    antialiasing, past the ends of [-1, 1].
    """
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    flat = preprocess(torch.full((1, 3, 30, 50), 0.5), size=24)
    assert flat.shape == (1, 3, 24, 24)
    assert (flat - ((0.75 - mean) / std)[None, :, None, None]).abs().max() < 1e-6
    # halving without antialiasing, pixel centres: taps at distances 1.5, 0.5, 0.5, 1.5 of the
    # kernel with a = -0.75
    row = torch.zeros(1, 3, 48, 48)
    row[..., 10] = 1
    column = (preprocess(row, size=24) * std[:, None, None] + mean[:, None, None] - 0.5)[0, 0, 5] * 2
    assert torch.allclose(column[3:8], torch.tensor([0.0, -0.09375, 0.59375, 0.0, 0.0]), atol=1e-5)
    # not clamped
    assert preprocess(torch.full((1, 3, 24, 24), 1.2), size=24).max() > (1 - mean.min()) / std.min()


def test_bad_images_are_refused() -> None:
    for bad in (torch.zeros(3, 24, 24), torch.zeros(1, 4, 24, 24), torch.zeros(1, 3, 24, 24, dtype=torch.uint8)):
        with pytest.raises(ConfigError, match=r"float images \[B, 3, H, W\]"):
            preprocess(bad, size=24)


def test_strict_reading(tmp_path: Path) -> None:
    state = random_clip()
    assert open_clip(saved(tmp_path, state)).shape == TINY
    lacking = {name: value for name, value in state.items() if name != "visual.transformer.2.mlp.0.bias"}
    with pytest.raises(CheckpointError, match=r"missing 1 key\(s\): transformer\.2\.mlp\.0\.bias"):
        open_clip(saved(tmp_path, lacking))
    with pytest.raises(CheckpointError, match=r"does not fit a CLIP vision encoder of .*1 unexpected key\(s\): extra"):
        open_clip(saved(tmp_path, {**state, "visual.extra": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"another shape: pre_norm\.bias has shape \(3,\), expected \(160,\)"):
        open_clip(saved(tmp_path, {**state, "visual.pre_norm.bias": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match="not tensors: step"):
        open_clip(saved(tmp_path, {**state, "step": 3}))
    with pytest.raises(CheckpointError, match="is not the CLIP file of Wan2.1: it holds vision_model.x"):
        open_clip(saved(tmp_path, {**state, "vision_model.x": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="holds no CLIP vision encoder"):
        open_clip(saved(tmp_path, {"log_scale": torch.zeros(())}))
    with pytest.raises(CheckpointError, match="not 1 \\+ a square"):
        open_clip(saved(tmp_path, {**state, "visual.pos_embedding": torch.zeros(1, 16, 160)}))
    with pytest.raises(CheckpointError, match=r"gone\.pth does not exist.*Wan2\.1-I2V-14B-480P"):
        open_clip(tmp_path / "gone.pth")
    with pytest.raises(ConfigError, match="float16, bfloat16 or float32"):
        ClipVision.from_file(saved(tmp_path, state), dtype=torch.float64)
    path = saved(tmp_path, state)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged, truncated"):
        ClipVision.from_file(path)
