"""The codec on a GPU: kernels against plain torch bit for bit, blobs written and read by address in
a captured graph, coded streams.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.kernels.cuda_graph import CudaGraph
from rcm.kernels.kv_codec.blob import reference
from rcm.kernels.kv_codec.codec import KVCodec
from rcm.kernels.kv_codec.spec import SMOOTHINGS, KVCodecSpec, SideSpec
from rcm.nets.denoiser import Denoiser
from rcm.pipelines.session import Session
from rcm.pipelines.stream_spec import StreamSpec
from rcm.rollout.eviction.sliding_window import SlidingWindow
from rcm.rollout.recipe import SamplingRecipe
from tests.support.tiny_nets import HEIGHT, WIDTH, condition, tiny_config, tiny_net

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SPECS = {
    **{f"int4 {smoothing}": KVCodecSpec(SideSpec("int4", smoothing), SideSpec("int2", smoothing)) for smoothing in SMOOTHINGS},
    **{f"{mode} qvg": KVCodecSpec(SideSpec("int2", "qvg"), SideSpec("int4", "qvg"), mode=mode) for mode in ("release", "official")},
    "fp8": KVCodecSpec(SideSpec("fp8"), SideSpec("fp4")),
    "searched": KVCodecSpec(SideSpec("int2", asymmetric=True, scale_fit="search"), SideSpec("int4", scale_fit="search")),
    "bf16 keys": KVCodecSpec(SideSpec(), SideSpec("int8", asymmetric=True)),
    "heads": KVCodecSpec(SideSpec("int4", granularity="head"), SideSpec("int8", granularity="tensor")),
}


def drawn(seed: int, tokens: int = 300) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    kinds = torch.randn(1, 40, 3, 128, generator=generator, device="cuda")
    which = torch.randint(40, (tokens,), generator=generator, device="cuda")
    return (kinds[:, which] + 0.3 * torch.randn(1, tokens, 3, 128, generator=generator, device="cuda")).to(torch.bfloat16)


@pytest.mark.parametrize("name", SPECS)
def test_blobs_by_address_in_a_graph_are_those_of_the_codec(name):
    """One graph encodes and one restores; chunks, their places and their blobs change."""
    codec, other = KVCodec(SPECS[name]), KVCodec(SPECS[name])
    first, x = drawn(0), torch.empty_like(drawn(0))
    for side in ("key", "value"):
        blobs = [codec.encode(first, side=side, layer=0)]
        other.encode(first, side=side, layer=0)
        targets = blobs[0].likes(3, "cuda")
        table = codec.addresses(targets).cuda()
        row = table[0].clone()
        starts, room = torch.arange(3, device="cuda") * 300, torch.zeros(1, 900, 3, 128, dtype=torch.bfloat16, device="cuda")
        x.copy_(first)
        codec.encode_to(row, x, side=side, layer=0)
        other.encode(first, side=side, layer=0)
        encode = CudaGraph(lambda row=row, side=side: codec.encode_to(row, x, side=side, layer=0), x.device)
        arguments = (blobs[0], table, starts, room)
        restore = CudaGraph(lambda arguments=arguments, side=side: codec.restore(*arguments, side=side), x.device)
        wanted = []
        for i in range(3):
            x.copy_(drawn(i + 1))
            row.copy_(codec.addresses([targets[i]])[0])
            encode.replay()
            wanted.append(other.encode(x, side=side, layer=0))
        for order in ((0, 1, 2), (2, 0, 1)):
            table.copy_(codec.addresses([targets[i] for i in order]))
            restore.replay()
            expected = torch.cat([reference(wanted[i]).to(torch.bfloat16) for i in order], dim=1)
            assert torch.equal(room, expected)
            assert torch.equal(codec.decode(wanted[0], side=side), reference(wanted[0]).to(torch.bfloat16))


@pytest.mark.parametrize("fused", ["off", "on"])
@pytest.mark.parametrize(("name", "keys", "noisy"), [("int4 none", "pre_rope", True), ("release qvg", "post_rope", False)])
def test_captured_streams_over_codes_are_the_eager_ones(name, keys, noisy, fused):
    """Restored keys are turned in another kernel where layers are fused, so a few codes differ; a
    wrong chunk is far off.
    """

    def run(graphs: str) -> torch.Tensor:
        precision = Precision.preset("bf16")
        net = tiny_net(dtype=torch.bfloat16)
        net.set_fused(fused)
        with torch.no_grad():
            for weight in net.parameters():
                weight.mul_(0.3 if weight.dim() > 1 else 1)
        denoiser = Denoiser(net.cuda(), precision).eval_params()
        recipe = SamplingRecipe("few_step", "c1-3", mids=((0.8, 0.5), (0.5,)), noisy_context=noisy)
        codec = KVCodec(KVCodecSpec(SPECS[name].key, SPECS[name].value, mode=SPECS[name].mode, qvg_clusters=4))
        spec = StreamSpec(recipe, (4, HEIGHT, WIDTH), batch=2, policy=SlidingWindow(3, 1), keys=keys, kv_codec=codec, graphs=graphs)
        with Session(denoiser, None, denoiser.prepare(condition(tiny_config())), spec, device="cuda") as session:
            found = torch.cat([chunk.latents for chunk in itertools.islice(session, 8)], dim=2)
            if graphs == "on":
                counts = session.loop.counts
                assert counts["replayed"] > counts["captured"] > 0
                assert counts["eager"] <= 4
        return found

    eager = run("off")
    assert float((run("on") - eager).norm() / eager.norm()) < 0.05
