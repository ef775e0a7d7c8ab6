"""The codec as the cache calls it: protocol, smoothing, clusters against loops, warm start,
selection, bytes, flags.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rcm.core.errors import ConfigError
from rcm.kernels.kv_codec.clusters import Clustering, cluster, members
from rcm.kernels.kv_codec.codec import KVCodec
from rcm.kernels.kv_codec.smoothing import hadamard, quantile
from rcm.kernels.kv_codec.spec import DTYPES, FLAGS, SMOOTHINGS, KVCodecSpec, SideSpec, kivi

LIMITS = {"bf16": 0.005, "fp8": 0.06, "int8": 0.02, "fp4": 0.25, "int4": 0.3, "int2": 0.9}


def sample(seed: int = 0, shape: tuple[int, ...] = (2, 24, 3, 16)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, *shape[2:], generator=generator)
    x = centres[torch.randint(5, shape[:2], generator=generator)] + 0.3 * torch.randn(shape, generator=generator)
    return x.to(torch.bfloat16)


def codec(dtype: str = "int4", smoothing: str = "none", **settings: object) -> KVCodec:
    side = SideSpec(dtype, smoothing, 8)
    return KVCodec(KVCodecSpec(side, side, **{"qvg_clusters": 4, **settings}))


@pytest.mark.parametrize(("dtype", "smoothing"), list(itertools.product(DTYPES, [s for s in SMOOTHINGS if s != "clip"])))
@pytest.mark.parametrize("mode", ["rcm", "release"])
def test_every_pair_restores_within_its_type(dtype, smoothing, mode):
    c, x = codec(dtype, smoothing, mode=mode), sample()
    for side in ("key", "value"):
        blob = c.encode(x, side=side, layer=0)
        y = c.decode(blob, side=side)
        assert y.dtype == x.dtype
        # its e4m3 scales have steps of 2^-9
        coarse = 0.25 if mode == "release" and dtype in ("fp8", "int8") else 0.0
        assert (y.float() - x.float()).norm() <= max(LIMITS[dtype], coarse) * x.float().norm()
        room = torch.full((2, 30, 3, 16), 7.0, dtype=torch.bfloat16)
        c.decode_into(blob, room[:, 2:26], side=side)
        assert torch.equal(room[:, 2:26], y)
        assert (room[:, :2] == 7).all()
        assert (room[:, 26:] == 7).all()


def test_a_blob_is_cut_loose_from_its_source():
    c, x = codec("bf16"), sample()
    blob, before = c.encode(x, side="key", layer=0), x.clone()
    x.zero_()
    assert torch.equal(c.decode(blob, side="key"), before)


def test_smoothings_by_their_definition():
    x = sample().float()
    h = torch.tensor([[1.0]])
    for _ in range(4):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    torch.testing.assert_close(hadamard(x), x @ h / 4)
    for share in (0.0, 0.37, 0.999, 1.0):
        torch.testing.assert_close(quantile(x.flatten(2), share), torch.quantile(x.flatten(2), share, dim=-1))
    clipped = codec("bf16", "clip", clip_percentile=0.9).encode(x, side="key", layer=0)
    bound = torch.quantile(x[1, :, 2].abs(), 0.9)
    torch.testing.assert_close(clipped.codes[1, :, 2].float(), x[1, :, 2].clamp(-bound, bound), rtol=0.01, atol=1e-3)


def by_hand(x: Tensor, k: int, iters: int, start: Tensor | None) -> tuple[list[int], Tensor, Tensor]:
    """One shared clustering of one sample [S, N, D], token by token: assignments, unit centres,
    means [k, N, D].
    """
    points = torch.nn.functional.normalize(x.double().mean(1), dim=-1)
    places = [round(i * (len(x) - 1) / (k - 1)) for i in range(k)]
    centres = points[places] if start is None else torch.nn.functional.normalize(start.double(), dim=-1)
    for _ in range(iters):
        assigned = [min(range(k), key=lambda c, p=p: float((p - centres[c]).norm())) for p in points]
        groups = [[points[i] for i, a in enumerate(assigned) if a == c] for c in range(k)]
        means = torch.stack([torch.stack(g).mean(0) if g else torch.zeros(x.shape[2]).double() for g in groups])
        centres = torch.nn.functional.normalize(means, dim=-1)
    raw = [[x[i].double() for i, a in enumerate(assigned) if a == c] for c in range(k)]
    return assigned, centres, torch.stack([torch.stack(g).mean(0) if g else torch.zeros(x.shape[1:]).double() for g in raw])


@pytest.mark.parametrize("warm", [False, True])
def test_shared_clusters_equal_the_loop(warm):
    x = sample().float()
    first = cluster(x, Clustering(4, 3, 1, True, "rcm"))
    start = first.centres if warm else None
    x = sample(1).float() if warm else x
    found = cluster(x, Clustering(4, 3, 1, True, "rcm"), start)
    for b in range(2):
        assigned, centres, means = by_hand(x[b], 4, 3, first.centres[0][b, 0] if warm else None)
        assert found.clusters.assignments[0, b].tolist() == assigned
        torch.testing.assert_close(found.centres[0][b, 0].double(), centres, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.clusters.centroids[0, b].double(), means, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize(("mode", "rounded"), [("rcm", True), ("release", False)])
def test_what_is_subtracted_is_what_is_stored_except_in_release(mode, rounded):
    x = sample().float()
    found = cluster(x, Clustering(4, 2, 1, False, mode))
    assert torch.equal(found.subtract[0], found.clusters.centroids[0].float()) == rounded
    # every head by itself equals a clustering of that head alone
    alone = cluster(x[:, :, 1:2], Clustering(4, 2, 1, True, mode))
    assert torch.equal(found.clusters.assignments[0, :, :, 1], alone.clusters.assignments[0])
    assert torch.equal(members(*found.subtract)[:, :, 1:2], members(*alone.subtract))


def test_more_stages_leave_less():
    x = sample().float()
    left = []
    for stages in (1, 2, 3):
        found = cluster(x, Clustering(4, 3, stages, True, "rcm"))
        left.append(float((found.residual - members(*found.subtract)).norm()))
    assert left[0] > left[1] > left[2]


def test_narrow_assignments_and_one_cluster():
    x = torch.randn(1, 300, 1, 8)
    kinds = [cluster(x, Clustering(k, 1, 1, True, "rcm")).clusters.assignments.dtype for k in (256, 257)]
    assert kinds == [torch.uint8, torch.int16]
    single = codec("int8", "qvg", qvg_clusters=1)
    y = single.decode(single.encode(x, side="key", layer=0), side="key")
    torch.testing.assert_close(y, x, rtol=0.02, atol=0.03)


def test_warm_start_is_per_layer_side_and_stream_and_goes_with_the_state():
    c, first, second = codec("int2", "qvg", qvg_iters=1), sample(0), sample(1)
    cold = c.decode(c.fork().encode(second, side="key", layer=0), side="key")
    c.encode(first, side="key", layer=0)
    saved = c.state()
    for other in ({"side": "value", "layer": 0}, {"side": "key", "layer": 1}):
        fresh = c.fork().encode(second, **other)
        assert torch.equal(c.encode(second, **other).clusters.centroids, fresh.clusters.centroids)
    warm = c.decode(c.encode(second, side="key", layer=0), side="key")
    assert not torch.equal(warm, cold)
    again = c.fork()
    again.load_state(saved)
    assert torch.equal(again.decode(again.encode(second, side="key", layer=0), side="key"), warm)
    c.reset()
    assert torch.equal(c.decode(c.encode(second, side="key", layer=0), side="key"), cold)
    off = codec("int2", "qvg", qvg_iters=1, qvg_warm_start=False)
    off.encode(first, side="key", layer=0)
    assert torch.equal(off.decode(off.encode(second, side="key", layer=0), side="key"), cold)


def test_centres_stay_where_captured_passes_read_them_or_are_told_to_have_moved():
    """Through chunks of one size, a new video and a snapshot; a chunk of fewer tokens than clusters
    has centres of another shape.
    """
    c = codec("int2", "qvg")
    c.encode(sample(0), side="key", layer=0)
    place, moves = c._centres["key", 0][0].data_ptr(), c.generation
    state = c.state()
    c.encode(sample(1), side="key", layer=0)
    c.reset()
    c.encode(sample(2), side="key", layer=0)
    c.load_state(state)
    assert (c._centres["key", 0][0].data_ptr(), c.generation) == (place, moves)
    assert torch.equal(c._centres["key", 0][0], state["centres"]["key", 0][0])
    c.encode(sample(3, (2, 2, 3, 16)), side="key", layer=0)
    assert c.generation == moves + 1


def test_bytes_are_those_of_the_tensors_and_of_the_arithmetic():
    """Chunk of 480p: 4,680 tokens, 12 heads of 128, groups of 64: bits per element without and with
    clusters.
    """
    x = torch.randn(1, 4680, 12, 128).to(torch.bfloat16)
    for dtype, bits in (("int8", 8.25), ("int4", 4.125), ("int2", 2.125)):
        side = SideSpec(dtype)
        blob = KVCodec(KVCodecSpec(side, side)).encode(x, side="value", layer=0)
        assert blob.nbytes == x.numel() * bits / 8 + (0 if dtype == "int8" else 4)
    blob = KVCodec(KVCodecSpec(SideSpec("int2", "qvg"), qvg_iters=1)).encode(x, side="key", layer=0)
    groups = -(-4680 // 64)
    assert blob.nbytes == x.numel() / 4 + groups * 1536 + 4 + 256 * 1536 * 2 + 4680
    assert x.nbytes / blob.nbytes > 5.2


ERRORS = [
    ({"kv_dtype_k": "int3"}, "--kv_dtype_k must be one of bf16, fp8, fp4, int8, int4, int2, got 'int3'"),
    ({"kv_smoothing_v": "svd"}, "--kv_smoothing_v must be one of"),
    ({"kv_granularity_k": "row"}, "--kv_granularity_k must be one of auto, token"),
    ({"kv_group_size_k": 1.5}, "--kv_group_size_k must be a whole number"),
    ({"kv_qvg_clusters": 0}, "--kv_qvg_clusters must be at least 1, got 0"),
    ({"kv_qvg_stages": 0}, "--kv_qvg_stages must be at least 1, got 0"),
    ({"kv_qvg_iters": -1}, "--kv_qvg_iters must not be negative"),
    ({"kv_clip_percentile": 99.9}, "--kv_clip_percentile is a share"),
    ({"kv_smooth_alpha": -0.1}, "--kv_smooth_alpha must lie in 0..1"),
    ({"kv_mode": "exact"}, "--kv_mode must be one of rcm, release, official"),
    ({"kv_dtype_k": "int4", "kv_asymmetric_k": "no"}, "kv_asymmetric_k='no' must be True or False"),
    ({"kv_asymmetric_k": True}, "--kv_asymmetric_k needs an integer type"),
    ({"kv_dtype_v": "int4", "kv_asymmetric_v": True, "kv_mode": "release"}, "--kv_asymmetric_v is not known to --kv_mode release"),
    ({"kv_dtype_k": "int2", "kv_scale_fit_k": "mse"}, "--kv_scale_fit_k must be one of none, search, got 'mse'"),
    ({"kv_dtype_v": "fp8", "kv_scale_fit_v": "search"}, "--kv_scale_fit_v is for types of 4 and 2 bits, got --kv_dtype_v fp8"),
    ({"kv_scale_fit_k": "search"}, "--kv_scale_fit_k is for types of 4 and 2 bits, got --kv_dtype_k bf16"),
    ({"kv_dtype_k": "int2", "kv_scale_fit_k": "search", "kv_mode": "release"}, "--kv_scale_fit_k is not known to --kv_mode release; use"),
    (
        {"kv_dtype_k": "int2", "kv_scale_fit_k": "search", "kv_bias_correction": True},
        "--kv_scale_fit_k search leaves none of it; give one of them",
    ),
    ({"kv_dtype_k": "fp8", "kv_mode": "official"}, "--kv_mode official stores int8, int4 or int2"),
    ({"kv_dtype_k": "int2", "kv_smoothing_k": "balance", "kv_mode": "official"}, "--kv_mode official smooths with none or qvg"),
    ({"kv_dtype_k": "int2", "kv_granularity_k": "channel", "kv_mode": "official"}, "--kv_mode official groups channels of a token"),
]


@pytest.mark.parametrize(("flags", "message"), ERRORS)
def test_bad_settings_name_their_flag_in_one_sentence(flags, message):
    with pytest.raises(ConfigError) as error:
        KVCodecSpec.from_flags(flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_shapes_that_do_not_fit_name_the_flag():
    with pytest.raises(ConfigError, match="--kv_smoothing_k"):
        codec("int4", "hadamard").encode(torch.randn(1, 8, 1, 12), side="key", layer=0)
    side = SideSpec("int4", group_size=10)
    with pytest.raises(ConfigError, match=r"--kv_group_size_v=10 must divide the 16 channels"):
        KVCodec(KVCodecSpec(side, side, mode="official")).encode(sample(), side="value", layer=0)


def test_flags_and_the_rule_for_granularity():
    spec = KVCodecSpec.from_flags({"kv_dtype_k": "int2", "kv_smoothing_k": "qvg", "kv_dtype_v": "int4", "seed": 3})
    assert (spec.granularity("key"), spec.granularity("value")) == ("channel", "token")
    assert spec.keys_before_rotation
    assert KVCodecSpec.from_flags({}) == KVCodecSpec()
    assert not KVCodecSpec().keys_before_rotation
    assert KVCodecSpec().granularity("key") == "token"
    assert FLAGS["kv_qvg_clusters"] == 256
    assert FLAGS["kv_group_size_v"] == 64
    assert kivi().key.asymmetric
    assert "int2 by channel, groups of 64, qvg 256 clusters x 1" in spec.describe()
