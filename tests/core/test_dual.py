"""The dual pass through the whole network against functorch on eager attention and central
differences, and what happens when a tangent is lost.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from rcm.core.dtypes import Precision
from rcm.core.dual import guard_tangents, has_tangent, in_dual_level, jvp, pack, unpack
from rcm.core.errors import TangentLost
from rcm.nets import attention
from rcm.nets.denoiser import Denoiser
from rcm.nets.kv_cache import KVCache
from rcm.nets.layout import TokenLayout
from tests.support.tangent_oracle import central_difference, functorch_jvp, relative_error, with_eager_attention
from tests.support.tiny_nets import GRID, PATTERNS, condition, frame_times, latents, pattern, tiny_net

TOLERANCE = 1e-9
DIRECTIONS = [("x", "t"), ("x",), ("t",)]


def directions(which: tuple[str, ...], x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(5)
    x_dot, t_dot = (torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in (x, t))
    return x_dot if "x" in which else None, t_dot if "t" in which else None


def check_against_oracles(net, call, primals, tangents, *, step: float = 1e-3) -> torch.Tensor:
    """Compare `call(net, *primals)` under `jvp` with both oracles; the tangent."""
    with guard_tangents(net):
        value, tangent = jvp(lambda *args: call(net, *args), primals, tangents)
    eager = with_eager_attention(net)
    expected_value, expected = functorch_jvp(lambda *args: call(eager, *args), primals, tangents)
    assert not has_tangent(value) and not value.requires_grad and not tangent.requires_grad
    assert expected.abs().max() > 1e-2, "a vanishing tangent tests nothing"
    assert relative_error(value, expected_value) < 1e-12
    assert relative_error(tangent, expected) < TOLERANCE
    assert relative_error(tangent, central_difference(lambda *args: call(eager, *args), primals, tangents, step)) < TOLERANCE
    return tangent


@pytest.mark.parametrize("which", DIRECTIONS, ids="+".join)
@pytest.mark.parametrize("image_branch", [False, True], ids=["text", "image"])
def test_dense(which, image_branch):
    net = tiny_net(image_branch=image_branch)
    x, t, cond, layout = latents(3), frame_times(3), condition(net.config), TokenLayout.bidirectional(3, grid=GRID)
    check_against_oracles(net, lambda n, x, t: n(x, t, cond, layout), (x, t), directions(which, x, t))


@pytest.mark.parametrize("which", DIRECTIONS, ids="+".join)
@pytest.mark.parametrize("reach", [{}, {"window": 2, "sinks": 1}], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_teacher_forcing_packed_and_over_a_context_cache(name, reach, which):
    """Both forms of the tangent pass agree with the oracles and with each other; the clean half has
    tangent exactly zero in every block.
    """
    frames, net = PATTERNS[name], tiny_net()
    structure = {"grid": GRID, "pattern": pattern(name), **reach}
    clean, noisy, cond = latents(frames), latents(frames, seed=9), condition(net.config)
    t_clean, t = frame_times(frames, seed=4), frame_times(frames)
    x_dot, t_dot = directions(which, noisy, t)

    packed_layout = TokenLayout.teacher_forcing(frames, **structure)

    def packed(n, x, t):
        return n(torch.cat([clean, x], dim=2), torch.cat([t_clean, t], dim=1), cond, packed_layout)

    seen = []

    def watch(module, args, output):
        if in_dual_level():
            seen.append(unpack(output)[1])

    handles = [block.register_forward_hook(watch) for block in net.blocks]
    with torch.no_grad():
        jvp(lambda x, t: packed(net, x, t), (noisy, t), (x_dot, t_dot))
    for handle in handles:
        handle.remove()
    assert len(seen) == net.config.num_layers
    for tangent in seen:
        assert torch.count_nonzero(tangent[:, :frames]) == 0
        assert tangent[:, frames:].abs().min() > 0

    tangent = check_against_oracles(net, packed, (noisy, t), (x_dot, t_dot))

    cache = KVCache(net.config.num_layers, capacity_tokens=frames * GRID[0] * GRID[1])
    with torch.no_grad():
        net(clean, t_clean, cond, TokenLayout.context(frames, **structure), cache.append())
    layout = TokenLayout.noisy_over_context(frames, **structure)
    over_context = check_against_oracles(net, lambda n, x, t: n(x, t, cond, layout, cache.readonly()), (noisy, t), (x_dot, t_dot))
    assert relative_error(over_context, tangent) < 1e-12


def test_no_tangent_work_for_cached_keys_and_text(monkeypatch):
    """Over a context, self-attention has tangents from the first noisy key on; in cross-attention
    only the query has one.
    """
    net, frames, structure = tiny_net(), 3, {"grid": GRID, "pattern": pattern("c1-1")}
    x, t, cond = latents(frames), frame_times(frames), condition(net.config)
    cache = KVCache(net.config.num_layers, capacity_tokens=frames * GRID[0] * GRID[1])
    with torch.no_grad():
        net(x, t, cond, TokenLayout.context(frames, **structure), cache.append())
    seen, original = [], attention.flash_jvp

    def spy(q, k, v, q_dot, k_dot, v_dot, **options):
        seen.append((k_dot is None, v_dot is None, options["tangent_start"]))
        return original(q, k, v, q_dot, k_dot, v_dot, **options)

    monkeypatch.setattr(attention, "flash_jvp", spy)
    layout = TokenLayout.noisy_over_context(frames, **structure)
    jvp(lambda x: net(x, t, cond, layout, cache.readonly()), (x,), (x,))
    assert seen == [(False, False, cache.num_tokens), (True, True, 0)] * net.config.num_layers


@pytest.mark.parametrize("keys", ["post_rope", "pre_rope"])
def test_cached_chunk(keys):
    net, frames, structure = tiny_net(), 4, {"grid": GRID, "pattern": pattern("c1-1")}
    x, t, cond = latents(frames), frame_times(frames), condition(net.config)
    cache = KVCache(net.config.num_layers, capacity_tokens=frames * GRID[0] * GRID[1], keys=keys)
    with torch.no_grad():
        net(x, t, cond, TokenLayout.context(frames, **structure), cache.append())
    layout = TokenLayout.cached_chunk(2, num_frames=frames, **structure)
    primals = (x[:, :, 2:3].clone(), t[:, :1].clone())
    check_against_oracles(net, lambda n, x, t: n(x, t, cond, layout, cache.readonly(2)), primals, directions(("x", "t"), *primals))


def test_denoiser_velocity_and_trig_F():
    """Through the time maps and casts of the denoiser; a short step, because an RF time step is a
    thousandfold timestep.
    """
    net = tiny_net()
    x, cond, layout = latents(3), condition(net.config), TokenLayout.bidirectional(3, grid=GRID)
    for method, time in (("velocity", torch.tensor([[0.3], [0.8]])), ("trig_F", torch.tensor([[0.2], [1.3]]))):
        primals = (x, time.double())
        x_dot, t_dot = directions(("x", "t"), *primals)

        def call(n, x, t, method=method):
            return getattr(Denoiser(n, Precision.preset("fp64")), method)(x, t, cond, layout)

        check_against_oracles(net, call, primals, (x_dot, t_dot * 1e-2), step=1e-4)


def test_reduced_precision_keeps_the_tangent():
    net, reference = tiny_net(dtype=torch.bfloat16), tiny_net(dtype=torch.bfloat16).double()
    cond, layout, tau = condition(net.config), TokenLayout.bidirectional(3, grid=GRID), torch.tensor([[0.2], [1.3]], dtype=torch.float64)
    x, x_dot = latents(3, dtype=torch.float32), latents(3, seed=8, dtype=torch.float32)
    tangents = (x_dot, torch.full_like(tau, 0.01))
    results = {}
    for name, n in (("bf16_fp32_time", net), ("fp64", reference)):
        denoiser = Denoiser(n, Precision.preset(name))
        with guard_tangents(n):
            results[name] = jvp(lambda x, tau, d=denoiser: d.trig_F(x, tau, cond, layout), (x, tau), tangents)[1]
    assert relative_error(results["bf16_fp32_time"].double(), results["fp64"].double()) < 0.05


class Dropping(nn.Module):
    """A module that computes the right value and loses the tangent."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        out = self.inner(*args, **kwargs)
        return (out[0], out[1].detach()) if isinstance(out, tuple) else out.detach()


@pytest.mark.parametrize("where", ["blocks.1.norm3", "blocks.0.self_attn.core.attention", "time_embedding.1", "blocks.1.ffn.2"])
def test_guard_names_the_module_that_lost_the_tangent(where):
    net = tiny_net()
    x, t, cond, layout = latents(3), frame_times(3), condition(net.config), TokenLayout.bidirectional(3, grid=GRID)
    parent, _, leaf = where.rpartition(".")
    setattr(net.get_submodule(parent), leaf, Dropping(net.get_submodule(where)))

    def run():
        return jvp(lambda x, t: net(x, t, cond, layout), (x, t), directions(("x", "t"), x, t))

    run()  # the output still has a tangent: only the guard notices
    with pytest.raises(TangentLost, match=where.replace(".", r"\.") + r"'"), guard_tangents(net):
        run()
    run()  # hooks are gone


@pytest.mark.parametrize("copied", [False, True])
def test_guard_lets_an_argument_without_tangent_pass_as_it_came(copied):
    class Passing(nn.Module):
        def forward(self, x, t):
            return x.clone() if copied else x, x * t

    net = Passing()
    x, t = torch.ones(2), torch.ones(2)
    expected = pytest.raises(TangentLost, match="Passing") if copied else nullcontext()
    with expected, guard_tangents(net):
        jvp(lambda t: net(x, t)[1], (t,), (t,))


def test_guard_sees_keywords_and_nested_outputs_and_ignores_plain_passes():
    class Pair(nn.Module):
        def forward(self, *, item):
            return {"kept": item["x"] * 2, "lost": [item["x"].detach()]}

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            return self.pair(item={"x": x})["kept"]

    net, x = Outer(), torch.randn(3)
    with guard_tangents(net):
        net(x)
        with pytest.raises(TangentLost, match="pair"):
            jvp(net, (x,), (torch.ones(3),))


def test_jvp_of_tuples_and_zero_tangents():
    x, y, dot = torch.tensor([2.0]), torch.tensor([3.0]), torch.tensor([1.0])
    (a, b), (a_dot, b_dot) = jvp(lambda x, y: (x * y, x**3), (x, y), (dot, None))
    assert (a.item(), b.item(), a_dot.item(), b_dot.item()) == (6, 8, 3, 12)
    assert not in_dual_level()


def test_compiled_code_runs_eagerly_inside_jvp():
    """The back end stands for Inductor: it compiles to something that loses tangents."""
    compiled = []

    def losing_backend(graph, inputs):
        compiled.append(graph)
        return lambda *args: [y.detach() for y in graph(*args)]

    fn = torch.compile(lambda x: x.sin() * 2, backend=losing_backend)
    x, dot = torch.randn(4), torch.randn(4)
    _, tangent = jvp(fn, (x,), (dot,))
    torch.testing.assert_close(tangent, 2 * x.cos() * dot)
    assert not compiled
    fn(x)
    assert compiled


def test_a_guard_is_not_compiled_in():
    """Compiled passes under the guard (the first step) are those after it: resuming stays exact."""
    net, x = nn.Sequential(nn.Linear(4, 4), nn.GELU()), torch.randn(2, 4)
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter)
    for context in (guard_tangents(net), nullcontext()):
        with context:
            compiled(x)
            jvp(compiled, (x,), (x,))
    assert counter.frame_count == 1


def test_refusals():
    x = torch.randn(3)
    with pytest.raises(TypeError, match="float64.*float32"):
        jvp(torch.sin, (x,), (torch.ones(3, dtype=torch.float64),))
    with pytest.raises(ValueError, match=r"\(1,\).*\(3,\)"):
        jvp(torch.sin, (x,), (torch.ones(1),))
    with pytest.raises(ValueError, match="1 primals and 2 tangents"):
        jvp(torch.sin, (x,), (x, x))
    with pytest.raises(ValueError, match="at least one tangent"):
        jvp(torch.sin, (x,), (None,))
    with pytest.raises(TangentLost, match="output 1"):
        jvp(lambda x: (x, x.detach()), (x,), (x,))
    with pytest.raises(TypeError, match="tuple of tensors"):
        jvp(lambda x: [x], (x,), (x,))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        jvp(torch.sin, (x,), (x,))
    with torch.inference_mode():
        made_there = torch.randn(3)
    with pytest.raises(RuntimeError, match="inference_mode"):
        jvp(torch.sin, (made_there,), (x,))
    with pytest.raises(RuntimeError, match="do not nest"):
        jvp(lambda y: jvp(torch.sin, (y,), (x,))[1], (x,), (x,))


def test_pack_and_unpack():
    x = torch.randn(3)
    assert pack(x, None) is x and unpack(x) == (x, None) and not has_tangent(x)
    with torch.autograd.forward_ad.dual_level():
        dual = pack(x, 2 * x)
        assert has_tangent(dual) and torch.equal(unpack(dual)[1], 2 * x)
