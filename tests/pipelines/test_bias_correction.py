"""Attention to coded keys with their bias taken off: against explicit logits in float64, in
streams, and on a trained network's keys.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rcm.core.dtypes import Precision
from rcm.core.errors import ConfigError
from rcm.kernels.kv_codec import bias
from rcm.kernels.kv_codec.codec import KVCodec
from rcm.kernels.kv_codec.spec import KVCodecSpec, SideSpec
from rcm.kernels.masks import BlockCausal
from rcm.nets.denoiser import Denoiser
from rcm.nets.kv_cache import KVCache
from rcm.nets.kv_coded import CodedStore
from rcm.nets.kv_memo import MemoisedCodec
from rcm.nets.layout import TokenLayout
from rcm.pipelines import engine
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamSpec
from rcm.rollout.eviction.infinity_rope import InfinityRope
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.rollout.recipe import SamplingRecipe
from scripts.bench_kv_bias import SHIPPED, corrected_errors, keys_of_a_stream
from tests.support.rerun_loop import RerunLoop
from tests.support.tiny_nets import GRID, HEIGHT, WIDTH, condition, frame_times, latents, pattern, tiny_config, tiny_net

RECIPE = SamplingRecipe("few_step", "c1-1", mids=((0.8, 0.5), (0.5,)))


def codec(*, correct: bool = True, **settings: object) -> KVCodec:
    side = SideSpec(dtype="int2", group_size=4, **settings)
    return KVCodec(KVCodecSpec(side, side, qvg_clusters=4, bias_correction=correct))


class Dense:
    """`CodedStore.attend` over one matrix of logits in float64, each coded key's column lowered by
    its chunk's gain.
    """

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, store, layer, q, pair, seen, *, mask) -> Tensor:
        self.calls += 1
        scale, at = q.shape[3] ** -0.5, 0
        logits = torch.einsum("blnd,bsnd->bnls", q.double(), pair[0].double()) * scale
        for chunk, tokens in seen.chunks:
            if chunk in store._blobs[layer]:
                variance = bias.error_variance(store._blobs[layer][chunk][0]).double().mean(1)
                if seen.rotated:
                    variance = variance.unflatten(-1, (-1, 2)).mean(-1, keepdim=True).expand(*variance.shape[:-1], -1, 2).flatten(-2)
                gain = scale**2 / 2 * torch.einsum("blnd,bnd->bnl", q.double().square(), variance)
                logits[..., at : at + tokens] -= gain.unsqueeze(-1)
            at += tokens
        if mask is not None and not mask.is_full:
            logits = logits.masked_fill(~mask.dense(), float("-inf"))
        return torch.einsum("bnls,bsnd->blnd", logits.softmax(-1), pair[1].double()).to(q.dtype)


@pytest.mark.parametrize("keys", ["pre_rope", "post_rope"])
@pytest.mark.parametrize(("hot", "settings"), [(0, {}), (1, {}), (0, {"asymmetric": True}), (0, {"smoothing": "qvg"})], ids=str)
def test_streams_equal_explicit_logits(monkeypatch, keys, hot, settings) -> None:
    net = Denoiser(tiny_net(), Precision.preset("fp64")).eval_params()
    spec = StreamSpec(RECIPE, (4, HEIGHT, WIDTH), batch=2, policy=SlidingWindow(3, 1), keys=keys)

    def stream(made: KVCodec) -> Tensor:
        session = Session(net, None, condition(tiny_config()), replace(spec, kv_codec=made, hot_chunks=hot))
        return torch.cat([session.step().latents for _ in range(6)], dim=2)

    corrected, as_coded = stream(codec(**settings)), stream(codec(correct=False, **settings))
    oracle = Dense()
    monkeypatch.setattr(CodedStore, "attend", lambda *args, **options: oracle(*args, **options))
    torch.testing.assert_close(corrected, stream(codec(**settings)), rtol=1e-5, atol=1e-6)
    assert oracle.calls > 0 and float((corrected - as_coded).norm() / as_coded.norm()) > 1e-3


def test_masks_cut_the_chunks(monkeypatch) -> None:
    """Two chunks appended at once behind two coded ones, the later of the new ones seeing the
    earlier.
    """
    net, blocks = tiny_net(), pattern("c1-1")
    made, oracle = {}, Dense()
    for name in ("segments", "oracle"):
        if name == "oracle":
            monkeypatch.setattr(CodedStore, "attend", lambda *args, **options: oracle(*args, **options))
        cache = KVCache(net.config.num_layers, capacity_tokens=64 * GRID[0] * GRID[1], codec=codec(), keys="pre_rope")
        x, cond = latents(4), condition(net.config)
        with torch.no_grad():
            for frames, after in ((1, 0), (1, 1), (2, 2)):
                mask = BlockCausal(blocks, after + frames, GRID[0] * GRID[1], q_block_offset=after)
                place = {"context_tokens": after * GRID[0] * GRID[1], "chunks": (1,) * frames}
                layout = TokenLayout(GRID, tuple(range(after, after + frames)), mask, (0, frames), **place)
                made[name] = net(x[:, :, after : after + frames], frame_times(frames), cond, layout, cache.append())
    torch.testing.assert_close(made["segments"], made["oracle"], rtol=1e-5, atol=1e-6)
    assert oracle.calls == 3 * net.config.num_layers


def test_restored_copies_and_snapshots_change_nothing() -> None:
    net = Denoiser(tiny_net(dtype=torch.float32), Precision.preset("fp32")).eval_params()
    spec = StreamSpec(RECIPE, (4, HEIGHT, WIDTH), batch=2, policy=InfinityRope(blocks=3, sinks=1, horizon=8))
    cond = condition(tiny_config(), dtype=torch.float32)
    plain = Session(net, None, cond, replace(spec, kv_codec=codec()))
    memo = Session(net, None, cond, replace(spec, kv_codec=MemoisedCodec(codec())))
    for _ in range(5):
        assert torch.equal(plain.step().latents, memo.step().latents)
    state, following = plain.snapshot(), plain.step().latents
    plain.restore(state)
    assert torch.equal(plain.step().latents, following)


def test_restored_copies_go_with_their_blobs() -> None:
    """Or a later blob in the same place would be read as the one before it."""
    memo = MemoisedCodec(codec())
    x = torch.randn(1, 8, 2, 8, generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 2.0, 3.0):
        blob = memo.encode(scale * x, side="key", layer=0)
        assert torch.equal(memo.decode(blob, side="key"), memo.codec.decode(blob, side="key"))
        assert memo.num_bytes() == x.nbytes
        del blob
        assert memo.num_bytes() == 0


def test_no_captured_pass_leaves_the_correction_out(monkeypatch) -> None:
    net = Denoiser(tiny_net(dtype=torch.float32), Precision.preset("fp32")).eval_params()
    spec = StreamSpec(RECIPE, (4, HEIGHT, WIDTH), batch=2, policy=SlidingWindow(3), kv_codec=codec())

    def stream() -> tuple[Tensor, Session]:
        session = Session(net, None, condition(tiny_config(), dtype=torch.float32), spec)
        return torch.cat([session.step().latents for _ in range(5)], dim=2), session

    eager, _ = stream()
    monkeypatch.setattr(engine, "ChunkLoop", RerunLoop)
    found, session = stream()
    assert torch.equal(found, eager) and session.loop.counts["replayed"] == 0 < session.loop.counts["eager"]


def test_only_coded_keys_have_a_bias() -> None:
    for key in (SideSpec(), SideSpec("bf16", "qvg")):
        with pytest.raises(ConfigError, match="--kv_bias_correction is for coded keys, and these stay in bf16; choose --kv_dtype_k"):
            KVCodecSpec(key=key, value=SideSpec("int2"), bias_correction=True)
    assert "bias of the keys taken off" in codec().spec.describe()


def test_keys_of_a_trained_network() -> None:
    """The shipped toy student: the mean gain goes, and the error of attention falls by what it
    cost, which is less than half of it.
    """
    found = corrected_errors(keys_of_a_stream(SHIPPED, frames=9, batch=4), KVCodecSpec(SideSpec("int2"), SideSpec()))
    assert found["gain"] > 0.2 and abs(found["gain left"]) < 0.1 * found["gain"]
    assert found["corrected"] < 0.85 * found["as coded"]
    assert found["corrected"] < 1.05 * found["possible"]
