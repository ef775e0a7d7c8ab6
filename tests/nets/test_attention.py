"""Back ends agree with each other for every mask and path, the choice is explicit, and the
dispatcher keeps structural zeros.
"""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest
import torch

from rcm.configs.schema_common import CommonModelConfig
from rcm.core.dual import jvp, unpack
from rcm.core.errors import ConfigError
from rcm.kernels.masks import BlockCausal, Full, TeacherForcing
from rcm.nets import attention, attention_dense
from rcm.nets.attention import BACKENDS, AttentionCore, attention_name, attention_record, configured, resolve
from rcm.nets.attention_auto import Auto
from rcm.nets.attention_dense import SDPA, Reference
from rcm.nets.wan.model import WanDiT
from tests.support.tiny_nets import pattern, tiny_config

MASKS = [
    None,
    Full(10, 10),
    BlockCausal(pattern("c1-4"), 5, 2),
    BlockCausal(pattern("c1-1"), 5, 2, window=2, sinks=1),
    BlockCausal(pattern("c1-1"), 5, 2, q_block_offset=3, window=2, sinks=1),
    TeacherForcing(pattern("c1-1"), 4, 2, window=2, sinks=1),
    TeacherForcing(pattern("c1-1"), 4, 2, queries="noisy"),
]


def inputs(mask, dtype=torch.float64) -> list[torch.Tensor]:
    q_len, kv_len = (10, 10) if mask is None else (mask.q_len, mask.kv_len)
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, n, 3, 8) for n in (q_len, kv_len, kv_len)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("limit", [0, 1 << 20], ids=["segments", "matrix"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_sdpa_equals_reference_in_value_and_gradient(mask, limit, monkeypatch):
    monkeypatch.setattr(attention_dense, "DENSE_MASK_LIMIT", limit)
    q, k, v = inputs(mask)
    results = []
    for backend in (Reference(), SDPA(), Auto()):
        o = backend(q, k, v, mask=mask, scale=0.3)
        results.append((o, *torch.autograd.grad(o.square().sum(), (q, k, v))))
    for expected, got, by_choice in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        assert torch.equal(by_choice, got), "on the CPU the choice is sdpa"


def test_tensors_that_do_not_fit_are_refused():
    """SDPA on the CPU takes fewer values than keys, and everything takes one row for all."""
    q, k, v = (x.detach() for x in inputs(None))
    core = AttentionCore(SDPA())
    for wrong in (
        (q, k[:1], v[:1]),
        (q, k[:, :, :1], v[:, :, :1]),
        (q, k, v[:, :3]),
        (q, k[..., :4], v),
        (q, k.float(), v),
        (q[0], k[0], v[0]),
    ):
        with pytest.raises(ValueError, match=r"attention takes q \[B, Lq, N, D\]"):
            core(*wrong)
    with pytest.raises(ValueError, match=r"Full\(q_len=10, kv_len=9\) does not fit 10 queries and 10 keys"):
        core(q, k, v, Full(10, 9))
    assert core(q[:, :4], k, v[..., :2], Full(4, 10)).shape == (2, 4, 3, 2)


@pytest.mark.parametrize("limit", [0, 1 << 20], ids=["segments", "matrix"])
def test_number_of_fused_calls(limit, monkeypatch):
    calls = []
    original = attention_dense._sdpa
    monkeypatch.setattr(
        attention_dense, "_sdpa", lambda *args, **options: calls.append(options.get("matrix")) or original(*args, **options)
    )
    for mask, runs in {None: 1, MASKS[1]: 1, MASKS[2]: 2, MASKS[4]: 2, MASKS[6]: 4}.items():
        calls.clear()
        SDPA(matrix_pairs=limit)(*inputs(mask), mask=mask, scale=1.0)
        assert len(calls) == (runs if limit == 0 else 1)
        assert (calls[0] is not None) == (limit > 0 and runs > 1)


@pytest.mark.parametrize("backend", [SDPA(), Reference()], ids=lambda backend: backend.name)
def test_matrices_survive_inference_mode(backend):
    mask = MASKS[2]
    with torch.inference_mode():
        backend(*(x.detach() for x in inputs(mask)), mask=mask, scale=1.0)
    q, k, v = inputs(mask)
    backend(q, k, v, mask=mask, scale=1.0).sum().backward()
    assert not backend._matrices.matrix(mask, q.device).is_inference(), "autograd refuses to save inference tensors"


def test_choice_of_the_backend(monkeypatch):
    monkeypatch.delenv("RCM_ATTENTION_BACKEND", raising=False)
    assert resolve("auto").name == "auto" and resolve("reference").name == "reference"
    monkeypatch.setenv("RCM_ATTENTION_BACKEND", "reference")
    assert resolve("auto").name == "reference"
    assert resolve("sdpa").name == "sdpa", "a named back end wins over the environment"
    assert WanDiT(tiny_config()).attention_backend == "reference"
    assert WanDiT(tiny_config(), attention="sdpa").attention_backend == "sdpa"
    monkeypatch.setenv("RCM_ATTENTION_BACKEND", "sdap")
    with pytest.raises(ConfigError, match="'sdap' from environment variable RCM_ATTENTION_BACKEND"):
        resolve("auto")
    with pytest.raises(ConfigError, match="choose from auto, reference, sdpa"):
        resolve("nonsense")


def test_the_configuration_takes_exactly_these_names():
    hints = get_type_hints(CommonModelConfig)
    assert set(get_args(hints["attention_backend"])) - {""} == set(BACKENDS)
    kernels = set(get_args(hints["flex_backend"])) - {"", "auto"}
    assert {f"flex_{kernel}" for kernel in kernels} | {"flex"} == {name for name in BACKENDS if name.startswith("flex")}


def test_flex_backend_has_its_effect_or_is_refused():
    assert attention_name("", flex_backend="") == attention_name("auto", flex_backend="auto") == "auto"
    assert attention_name("flex", flex_backend="") == "flex"
    assert attention_name("flex", flex_backend="flash") == attention_name("flex_flash", flex_backend="flash") == "flex_flash"
    assert attention_name("flex", flex_backend="triton") == "flex_triton"
    for backend in ("", "auto", "sdpa", "flex_triton"):
        with pytest.raises(ConfigError, match=r"flex_backend=flash \(or RCM_FLEX_BACKEND\) has no effect with attention_backend="):
            attention_name(backend, flex_backend="flash")


def test_the_configuration_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("RCM_ATTENTION_BACKEND", "reference")
    assert resolve("auto").name == "reference"
    chosen = configured("auto", flex_backend="auto")
    assert isinstance(chosen, Auto)
    assert resolve(chosen) is chosen
    assert WanDiT(tiny_config(), attention=chosen).attention_backend == "auto"
    assert configured("flex", flex_backend="triton").name == "flex_triton"


def test_dispatcher_passes_structural_zeros_and_the_constant_prefix(monkeypatch):
    """What reaches the fused call: None where an input has no tangent, and the number of constant
    keys; one call.
    """
    seen = []
    original = attention.flash_jvp

    def spy(q, k, v, q_dot, k_dot, v_dot, **options):
        seen.append(([x is None for x in (q_dot, k_dot, v_dot)], options["tangent_start"], options["implementation"]))
        return original(q, k, v, q_dot, k_dot, v_dot, **options)

    monkeypatch.setattr(attention, "flash_jvp", spy)
    core = AttentionCore(Reference())
    q, k, v = (x.detach() for x in inputs(None))
    dot = torch.randn_like(q)
    expected = torch.func.jvp(lambda y: Reference()(y, k, v, mask=None, scale=8**-0.5), (q,), (dot,))
    got = jvp(lambda y: core(y, k, v), (q,), (dot,))
    torch.testing.assert_close(got, expected)
    assert seen == [([False, True, True], 0, "reference")]

    jvp(lambda y: core(y, torch.cat([k, y], dim=1), torch.cat([v, y], dim=1), None, 10), (q,), (dot,))
    assert seen[1] == ([False, False, False], 10, "reference")

    def plain_attention_under_a_level(y):
        o = core(q, k, v)
        assert unpack(o)[1] is None
        return y * o

    jvp(plain_attention_under_a_level, (q,), (dot,))
    assert len(seen) == 2, "nothing dual: the ordinary back end"
    core.jvp_implementation = "nonsense"
    with pytest.raises(ValueError, match="nonsense"):
        jvp(lambda y: core(y, k, v), (q,), (dot,))


def test_the_record_says_what_served_each_kind_of_call():
    net = torch.nn.ModuleList([AttentionCore(backend := Auto()), AttentionCore(backend)])
    assert attention_record(net) == {"backend": "auto", "calls": {"dense": "sdpa"}}
    mask = MASKS[2]
    q, k, v = inputs(mask)
    net[0](q, k, v, mask)
    with torch.no_grad():
        net[1](q, k, v, mask)
        net[1](q, k, v, mask)
    calls = {"dense": "sdpa", "masked with gradient": "sdpa", "masked": "sdpa"}
    assert attention_record(net) == {"backend": "auto", "calls": calls}
    q, k, v = (x.detach() for x in (q, k, v))
    jvp(lambda y: net[0](y, k, v, mask), (q,), (q,))
    assert attention_record(net)["calls"] == {**calls, "tangent": "reference"}
    assert attention_record(AttentionCore(Reference())) == {"backend": "reference", "calls": {"all": "reference"}}


def test_reduced_precision_reference_computes_in_float32():
    q, k, v = (x.detach() for x in inputs(None, torch.bfloat16))
    exact = Reference()(q.double(), k.double(), v.double(), mask=None, scale=1.0)
    got = Reference()(q, k, v, mask=None, scale=1.0)
    assert got.dtype == torch.bfloat16
    # half a unit in the last place
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-5)
