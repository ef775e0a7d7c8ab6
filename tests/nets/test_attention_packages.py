"""Bindings of packages that are not installed here, against stand-ins with the documented
signatures that compute the reference.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from rcm.core.errors import ConfigError
from rcm.kernels.masked_attention.budget import with_gradients
from rcm.kernels.masks import BlockCausal, Full, TeacherForcing
from rcm.nets import attention_packages
from rcm.nets.attention import resolve
from rcm.nets.attention_dense import Reference
from tests.support.tiny_nets import pattern

MASKS = {
    "none": None,
    "full": Full(12, 12),
    "causal": BlockCausal(pattern("c1-4"), 5, 2),
    "window": BlockCausal(pattern("c1-1"), 6, 2, window=2, sinks=1),
    "offset": BlockCausal(pattern("c1-1"), 6, 2, q_block_offset=3, window=2, sinks=1),
    "forced": TeacherForcing(pattern("c3-3"), 6, 2),
    "forced window": TeacherForcing(pattern("c1-1"), 4, 3, window=2, sinks=1),
}
INSTALL = {
    "flash2": "flash_attn.flash_attn_interface is not installed: pip install 'rcm\\[flash\\]'",
    "flash3": "flash_attn_interface is not installed: build FlashAttention-3",
    "flash4": "flash_attn.cute is not installed: pip install --pre 'flash-attn-4\\[cu13\\]'",
    "magi": "magi_attention.api is not installed: build MagiAttention",
    "te": "transformer_engine.pytorch is not installed: pip install 'rcm\\[te\\]'",
    "flex_flash": "flash_attn.cute is not installed: pip install --pre 'flash-attn-4\\[cu13\\]'",
}


def dense(q, k, v, scale):
    assert q.dtype == torch.float16 and q.stride(-1) == 1
    return Reference()(q, k, v, mask=None, scale=scale)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert not causal and dropout_p == 0
    return dense(q, k, v, softmax_scale)


def flash3_func(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
):  # fmt: skip
    assert not causal
    return dense(q, k, v, softmax_scale)


def flash3_func_with_lse(q, k, v, softmax_scale=None, causal=False, deterministic=False):
    return flash3_func(q, k, v, softmax_scale), torch.zeros(1)


def flash4_func(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, mask_mod=None, return_lse=False,
):  # fmt: skip
    assert not causal
    return dense(q, k, v, softmax_scale), None


def ranged(q, k, v, q_ranges, k_ranges, attn_type_map, softmax_scale):
    """[L, N, D] tokens: softmax over the union of the key ranges of each query."""
    assert q_ranges.dtype == k_ranges.dtype == attn_type_map.dtype == torch.int32 and not attn_type_map.any()
    allowed = torch.zeros(len(q), len(k), dtype=torch.int32)
    for (q_start, q_stop), (k_start, k_stop) in zip(q_ranges.tolist(), k_ranges.tolist(), strict=True):
        allowed[q_start:q_stop, k_start:k_stop] += 1
    assert allowed.max() == 1, "the pairs of two ranges overlap"
    scores = softmax_scale * torch.einsum("qnd,knd->nqk", q.float(), k.float())
    weights = scores.masked_fill(allowed == 0, float("-inf")).softmax(-1)
    return torch.einsum("nqk,knd->qnd", weights, v.float())


def flex_flash_attn_func_105(
    q, k, v, q_ranges, k_ranges, attn_type_map=None, sink=None, softmax_scale=None, softcap=0.0, deterministic=False, sm_margin=0,
    disable_fwd_atomic_reduction=False, auto_range_merge=False, ref_block_size=None,
):  # fmt: skip
    return ranged(q, k, v, q_ranges, k_ranges, attn_type_map, softmax_scale), object()


def flex_flash_attn_func_103(
    q, k, v, q_ranges, k_ranges, max_seqlen_q, max_seqlen_k, attn_type_map=None, softmax_scale=None, softcap=0.0, deterministic=False,
    sm_margin=0, disable_fwd_atomic_reduction=False, auto_range_merge=False, ref_block_size=None,
):  # fmt: skip
    assert max_seqlen_q == (q_ranges[:, 1] - q_ranges[:, 0]).max() and max_seqlen_k == (k_ranges[:, 1] - k_ranges[:, 0]).max()
    return ranged(q, k, v, q_ranges, k_ranges, attn_type_map, softmax_scale), torch.zeros(1)


class DotProductAttention(nn.Module):
    def __init__(
        self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0, qkv_format="sbhd", attn_mask_type="causal",
        window_size=None, softmax_scale=None,
    ):  # fmt: skip
        super().__init__()
        assert (qkv_format, attn_mask_type, attention_dropout) == ("bshd", "no_mask", 0.0)
        self.heads, self.width, self.scale = num_attention_heads, kv_channels, softmax_scale

    def forward(self, query_layer, key_layer, value_layer, attention_mask=None, qkv_format=None, attn_mask_type=None):
        assert tuple(query_layer.shape[2:]) == (self.heads, self.width)
        assert all(x.is_contiguous() and not x.storage_offset() for x in (query_layer, key_layer, value_layer)), "memory layout"
        if os.environ["NVTE_UNFUSED_ATTN"] == "0" and len(query_layer) == 3:
            raise ValueError("No dot product attention backend is available for the provided inputs.")
        return dense(query_layer, key_layer, value_layer, self.scale).flatten(2)


STAND_INS = {
    "flash2": ("flash2", {"flash_attn": {}, "flash_attn.flash_attn_interface": {"flash_attn_func": flash_attn_func}}),
    "flash3": ("flash3", {"flash_attn_interface": {"flash_attn_func": flash3_func}}),
    "flash3 with lse": ("flash3", {"flash_attn_interface": {"flash_attn_func": flash3_func_with_lse}}),
    "flash4": ("flash4", {"flash_attn": {}, "flash_attn.cute": {"flash_attn_func": flash4_func}}),
    "magi 1.0.5": ("magi", {"magi_attention": {}, "magi_attention.api": {"flex_flash_attn_func": flex_flash_attn_func_105}}),
    "magi 1.0.3": ("magi", {"magi_attention": {}, "magi_attention.api": {"flex_flash_attn_func": flex_flash_attn_func_103}}),
    "te": ("te", {"transformer_engine": {}, "transformer_engine.pytorch": {"DotProductAttention": DotProductAttention}}),
}


@pytest.fixture(params=STAND_INS)
def backend(request, monkeypatch):
    monkeypatch.delenv("NVTE_UNFUSED_ATTN", raising=False)
    name, modules = STAND_INS[request.param]
    for module_name, members in modules.items():
        module = types.ModuleType(module_name)
        module.__spec__ = types.SimpleNamespace(name=module_name)
        module.__path__ = []
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module_name, module)
    return resolve(name)


@pytest.mark.parametrize("name", MASKS)
def test_bindings_equal_the_reference_in_value_and_gradient(name, backend):
    mask = MASKS[name]
    q_len, kv_len = (12, 12) if mask is None else (mask.q_len, mask.kv_len)
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(2, length, 3, 8, generator=generator).half() for length in (q_len, kv_len, kv_len))
    grad_o = torch.randn(2, q_len, 3, 8, generator=generator).half()
    expected = with_gradients(lambda q, k, v: Reference()(q, k, v, mask=mask, scale=0.3), inputs, grad_o)
    got = with_gradients(lambda q, k, v: backend(q, k, v, mask=mask, scale=0.3), inputs, grad_o)
    for mine, exact in zip(got, expected, strict=True):
        # sums over keys and blocks are ordered differently in half precision
        torch.testing.assert_close(mine, exact, rtol=4e-3, atol=4e-3)


def test_bindings_refuse_other_dtypes(backend):
    q = torch.zeros(1, 4, 1, 8)
    backend(q.half(), q.half(), q.half(), mask=None, scale=1.0)
    with pytest.raises(ConfigError, match=f"'{backend.name}' needs bfloat16 or float16, got torch.float32"):
        backend(q, q, q, mask=None, scale=1.0)


@pytest.mark.parametrize("backend", ["te"], indirect=True)
def test_transformer_engine_never_holds_the_score_matrix_unasked(backend, monkeypatch):
    q = torch.zeros(3, 4, 1, 8).half()
    with pytest.raises(ConfigError, match=r"'te' has no fused attention .*No dot product.*NVTE_UNFUSED_ATTN=1 .*, or choose"):
        backend(q, q, q, mask=None, scale=1.0)
    monkeypatch.setenv("NVTE_UNFUSED_ATTN", "1")
    resolve("te")(q, q, q, mask=None, scale=1.0)


@pytest.mark.parametrize("name", INSTALL)
def test_missing_packages_say_what_to_install(name):
    with pytest.raises(ConfigError, match=f"attention backend '{name}' is not available: {INSTALL[name]}.*; or choose attention_backend"):
        resolve(name)


@pytest.fixture
def fresh():
    """None of FlashAttention's modules imported, before and after."""

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] in ("flash_attn", "flash_attn_interface")]:
            del sys.modules[name]

    forget()
    yield
    forget()


@pytest.fixture
def cudnn(tmp_path, monkeypatch) -> Iterator[Path]:
    """Transformer Engine and torch's cuDNN as packages, the latter in parts; CUDNN_HOME unset."""
    folder = tmp_path / "nvidia" / "cudnn"
    for package in (tmp_path / "transformer_engine", folder.parent, folder):
        package.mkdir()
        (package / "__init__.py").touch()
    (folder / "lib").mkdir()
    for part in ("libcudnn.so.9", "libcudnn_graph.so.9", "libcudnn_heuristic.so.9", "other.so.9"):
        (folder / "lib" / part).touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.setenv("CUDNN_HOME", "")  # so that it is taken back
    monkeypatch.delenv("CUDNN_HOME")
    yield folder
    sys.modules.pop("nvidia", None)


@pytest.mark.parametrize("named", ["", "/opt/cudnn"])
def test_transformer_engine_is_given_the_cudnn_of_torch(named, cudnn, monkeypatch):
    """All parts of it, before the look for the package, whose parent is linked to every one: torch
    loads some when it needs them, and the toolkit's others may be of another version.
    """
    seen = []
    monkeypatch.setattr(attention_packages.ctypes, "CDLL", lambda path, mode: seen.append(Path(path).name))
    monkeypatch.setattr(attention_packages, "require_package", lambda *_, **__: seen.append(os.environ["CUDNN_HOME"]))
    if named:
        monkeypatch.setenv("CUDNN_HOME", named)
    attention_packages.TransformerEngine()
    parts = ["libcudnn.so.9", "libcudnn_graph.so.9", "libcudnn_heuristic.so.9"]
    assert seen == ([named] if named else [*parts, str(cudnn)])


def test_a_part_of_cudnn_that_does_not_load_is_named(cudnn):
    with pytest.raises(ConfigError, match=r"backend 'te' is not available: nvidia.cudnn is installed but does not load .*libcudnn\.so\.9"):
        attention_packages.TransformerEngine()


def test_cudnn_is_left_alone_without_the_package(cudnn, monkeypatch):
    (cudnn.parent.parent / "transformer_engine" / "__init__.py").unlink()
    (cudnn.parent.parent / "transformer_engine").rmdir()
    with pytest.raises(ConfigError, match="is not installed"):
        attention_packages.TransformerEngine()
    assert "CUDNN_HOME" not in os.environ


def test_flash4_alone_is_not_flash2(tmp_path, monkeypatch, fresh):
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    resolve("flash4")
    with pytest.raises(ConfigError, match="flash_attn.flash_attn_interface is not installed"):
        resolve("flash2")


@pytest.mark.parametrize("kind", ["ImportError", "RuntimeError"])
@pytest.mark.parametrize(("name", "module"), [("flash2", "flash_attn/__init__.py"), ("flash3", "flash_attn_interface.py")])
def test_a_package_that_does_not_load_says_for_which_torch_to_build_it(name, module, kind, tmp_path, monkeypatch, fresh):
    """Whatever it raises: without the sentence, "auto" would not go on to what does load."""
    (tmp_path / module).parent.mkdir(exist_ok=True)
    (tmp_path / module).write_text(f"raise {kind}('libcudart.so.12: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    q = torch.zeros(1, 4, 1, 8).half()
    with pytest.raises(ConfigError, match=rf"does not load \({kind}: libcudart.so.12.*\): install a build for torch .*; or choose"):
        resolve(name)(q, q, q, mask=None, scale=1.0)
