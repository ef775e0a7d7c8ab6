"""Streams that make NaN: each ends with one sentence that names chunk, stage and cause, whatever is
poisoned, and others go on.
"""

from __future__ import annotations

import math
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from rcm.core.dtypes import Precision
from rcm.core.errors import CheckpointError, ConfigError, NonFinite
from rcm.nets.denoiser import Denoiser, Guided
from rcm.nets.frozen_fp8 import round_linears_
from rcm.nets.lora import AdaptedNet, attach
from rcm.nets.wan.fp8 import quantise_linears_
from rcm.pipelines import engine
from rcm.pipelines.finite import Reading, bad_weight, largest
from rcm.pipelines.from_checkpoint import open_checkpoint
from rcm.pipelines.models import Models
from rcm.pipelines.part_clock import PartClock
from rcm.pipelines.residency import MemoryPolicy
from rcm.pipelines.scenes import parse_timeline, play
from rcm.pipelines.session import Session
from rcm.pipelines.session_pool import SessionPool, told_error
from rcm.pipelines.stream_spec import StreamCancelled, StreamSpec
from rcm.rollout.eviction.sliding_window import SlidingWindow
from tests.pipelines.test_session_codec import CODECS, NOISY, RECIPE
from tests.support.rerun_loop import RerunLoop
from tests.support.tiny_checkpoint import PROMPT, world_net, write_checkpoint
from tests.support.tiny_nets import HEIGHT, WIDTH, condition, tiny_config, tiny_net


class Decoder:
    """Latents as pixels; `poisoned`: not those."""

    def __init__(self, poisoned: bool = False) -> None:
        self.poisoned = poisoned

    def stream(self) -> Decoder:
        return self

    def decode_chunk(self, latents: torch.Tensor) -> torch.Tensor:
        frames = latents[:, :3].clone()
        if self.poisoned:
            frames.flatten()[-1] = math.inf
        return frames

    def state_copy(self) -> None:
        return None

    def load_state(self, state: None) -> None:
        pass


def fill(x: object) -> None:
    """NaN into every float of nested records."""
    if isinstance(x, torch.Tensor):
        if x.is_floating_point() and x.dtype.itemsize > 1:
            x.fill_(math.nan)
    elif isinstance(x, tuple | list):
        for part in x:
            fill(part)
    elif hasattr(x, "__dict__"):
        for part in vars(x).values():
            fill(part)


def poison_weight(session: Session) -> None:
    with torch.no_grad():
        session.loop.denoiser.net.blocks[1].ffn[0].weight[0, 0] = math.inf


def poison_prompt(session: Session) -> None:
    cond = condition(tiny_config(), dtype=torch.float32)
    cond.text[1, 2, 3] = math.nan
    session.set_condition(cond)


def poison_cache(session: Session) -> None:
    cache = session.loop.cache.branches[-1]
    start, _ = cache.chunks[-1].spans[0]
    cache.store.buffers[1][1][:, start] = math.nan


def poison_codes(session: Session) -> None:
    fill(session.loop.cache.store._blobs[1][session.loop.cache.chunks[-1].id])


def poison_decoder(session: Session) -> None:
    session._lane.codec.poisoned = True


AT_ONCE = "after step 1 of 2: "
CACHED = AT_ONCE + r"what the cache holds of chunk \d in layer 1 is not; restart\(\)"
POISONS = {
    "weight": (poison_weight, {}, AT_ONCE + r"the network's weight blocks\.1\.ffn\.0\.weight is not"),
    "prompt": (poison_prompt, {}, AT_ONCE + "the embedding of its prompt is not"),
    "cache": (poison_cache, {}, CACHED),
    "codes": (poison_codes, {"kv_codec": CODECS["int4"]}, CACHED),
    "clusters": (poison_codes, {"kv_codec": CODECS["int2 qvg"]}, CACHED),
    "decoder": (poison_decoder, {}, "the decoder made NaN or infinite pixels of finite latents"),
}


def opened(recipe=RECIPE, *, guided: bool = False, codec=None, prefix=None, **options) -> Session:
    net = tiny_net(dtype=torch.float32)
    model = Denoiser(net, Precision.preset("fp32")).eval_params()
    cond = condition(tiny_config(), dtype=torch.float32)
    if guided:
        model = Guided(model, condition(tiny_config(), batch=1, seed=9, dtype=torch.float32), 2.0)
    bounds = {} if "num_frames" in options else {"policy": SlidingWindow(3, 1)}
    return Session(model, codec, cond, StreamSpec(recipe, (4, HEIGHT, WIDTH), batch=2, **bounds, **options), prefix=prefix)


def poisoned_after(session: Session, poison, chunks: int) -> tuple[int, str]:
    """Steps that went well after a stream was poisoned, and how it ended."""
    for _ in range(chunks):
        session.step()
    session.settle()
    poison(session)
    for went in range(4):
        try:
            chunk = session.step()
        except NonFinite as error:
            return went, str(error)
        assert chunk.frames.isfinite().all() and chunk.latents.isfinite().all(), "no NaN is handed out"
    return 4, ""


@pytest.mark.parametrize("loop", ["eager", "captured"])
@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("what", POISONS)
def test_a_poisoned_stream_ends_with_its_first_bad_chunk(monkeypatch, what, look_ahead, loop):
    """Chunk 3, or, where that was made ahead, the next one."""
    if loop == "captured":
        monkeypatch.setattr(engine, "ChunkLoop", RerunLoop)
    poison, options, words = POISONS[what]
    session = opened(NOISY if look_ahead else RECIPE, codec=Decoder(), look_ahead=look_ahead, **options)
    went, told = poisoned_after(session, poison, 3)
    assert went == (1 if look_ahead and what != "decoder" else 0)
    assert re.match(f"chunk {3 + went} of this stream is not finite.*{words}", told), told
    for use in (session.step, session.snapshot):
        with pytest.raises(StreamCancelled, match=r"failed \(NonFinite: chunk"):
            use()


@pytest.mark.parametrize("options", [{}, {"kv_codec": CODECS["int4"]}, {"first_alone": True}], ids=("plain", "coded", "first alone"))
def test_after_a_restart_or_a_snapshot_a_poisoned_cache_is_forgotten(options):
    """NaN that stays in free slots is not read."""
    session, alone = (opened(codec=Decoder(), **options) for _ in range(2))
    whole = [alone.step().latents for _ in range(9)]
    for _ in range(4):
        session.step()
    state = session.snapshot()
    _, told = poisoned_after(session, poison_codes if "kv_codec" in options else poison_cache, 0)
    assert told
    session.restore(state)
    assert all(torch.equal(session.step().latents, x) for x in whole[4:])
    session.restart()
    assert all(torch.equal(session.step().latents, x) for x in whole)


def test_both_branches_of_a_guided_stream_and_numbers_that_overflow():
    _, told = poisoned_after(opened(guided=True), poison_cache, 2)
    assert "what the cache holds of chunk 1" in told
    session = opened(prefix=torch.full((1, 4, 1, HEIGHT, WIDTH), 3e38))
    assert session.step().latents.isfinite().all(), "the given latents are"
    _, told = poisoned_after(session, lambda _: None, 0)
    assert told.startswith("chunk 1 ") and "in layer 0 is not" in told, "what was made of them is not"
    session = opened()
    with torch.no_grad():
        session.loop.denoiser.net.blocks[0].ffn[0].weight.mul_(1e38)
    assert "network's arithmetic overflowed; try a wider precision" in poisoned_after(session, lambda _: None, 0)[1]


ADAPTED = "blocks.0.self_attn.q"
STORED, PLAIN = partial(round_linears_, which="fp8_storage"), lambda net: net
ODD_SCALE = "NaN, infinite or not above 0"


def rounded(net):
    quantise_linears_(net)
    return net


def adapted(net, role: str | None = "student"):
    """One role's adapters on `net`; those of another hold NaN, and do not matter to it."""
    attach(net, [ADAPTED.split(".", 2)[2]], roles=["student", "fake"], rank=2, alpha=2)
    for name, x in net.named_parameters():
        if "adapters" in name:
            torch.nn.init.constant_(x, 0.0 if ".student." in name else math.nan)
    return AdaptedNet(net, role)


BAD = {
    "plain": (PLAIN, "blocks.1.norm3.weight", math.nan, "NaN or infinite"),
    "query norm": (PLAIN, "blocks.0.self_attn.norm_q.weight", math.nan, "NaN or infinite"),
    "query": (PLAIN, "blocks.1.cross_attn.q.weight", -math.inf, "NaN or infinite"),
    "codes": (rounded, "blocks.0.ffn.0.weight", math.nan, "NaN or infinite"),
    "joined codes": (rounded, "blocks.1.self_attn.q.whole.weight", math.nan, "NaN or infinite"),
    "bias of codes": (rounded, "blocks.1.ffn.0.bias", math.inf, "NaN or infinite"),
    "infinite scale": (rounded, "blocks.0.ffn.0.weight_scale", math.inf, ODD_SCALE),
    "scale of 0": (rounded, "blocks.0.ffn.0.weight_scale", 0.0, ODD_SCALE),
    "stored codes": (STORED, "blocks.0.ffn.0.weight", math.nan, "NaN or infinite"),
    "stored scale of 0": (STORED, "blocks.0.ffn.0.weight_scale", -0.0, ODD_SCALE),
    "stored scale": (STORED, "blocks.0.self_attn.k.weight_scale", math.nan, ODD_SCALE),
    "adapters": (adapted, f"{ADAPTED}.lora_B.weight", math.nan, "NaN or infinite"),
    "under adapters": (adapted, f"{ADAPTED}.weight", math.nan, "NaN or infinite"),
    "base alone": (lambda net: adapted(net, None), "blocks.1.ffn.2.bias", math.nan, "NaN or infinite"),
}


@pytest.mark.parametrize("case", BAD)
def test_weights_that_are_not_finite_are_refused(case):
    """Also those whose NaN a CPU's attention hides, as they reach queries alone; codes, scales, and
    every part of an adapted network.
    """
    change, name, value, words = BAD[case]
    net = change(tiny_net(dtype=torch.float32).requires_grad_(False))
    assert bad_weight(net) is None
    base = dict(AdaptedNet(net.net, None).named_parameters()) if isinstance(net, AdaptedNet) else {}
    tensor = (base | dict(net.named_buffers()) | dict(net.named_parameters()))[name]
    if tensor.itemsize == 1:
        tensor.data.view(torch.uint8).flatten()[0] = 0x7F  # e4m3's NaN
    else:
        tensor.data.flatten()[0] = value
    model = Denoiser(net, Precision.preset("fp32"))
    with pytest.raises(NonFinite, match=f"weight {name} is {words}; load the checkpoint again"):
        Session(model, None, condition(tiny_config()), StreamSpec(RECIPE, (4, HEIGHT, WIDTH), batch=2, num_frames=2))


def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path):
    net = world_net()
    net.blocks[0].cross_attn.norm_q.weight.data[3] = math.nan
    write_checkpoint(tmp_path / "job", RECIPE, net=net)
    with pytest.raises(CheckpointError, match=r"weight blocks\.0\.cross_attn\.norm_q\.weight is NaN or infinite as torch\.float32"):
        open_checkpoint(tmp_path / "job")


def test_a_prefix_that_is_not_finite_is_refused():
    with pytest.raises(ConfigError, match="prefix has NaN or infinite values"):
        opened(prefix=torch.full((1, 4, 1, HEIGHT, WIDTH), math.nan))


def test_what_is_known_late_is_told_late_and_at_the_end_at_the_latest(monkeypatch):
    """Where nothing waits for the device: latents alone, on CUDA."""
    known = []
    monkeypatch.setattr(Reading, "ready", property(lambda _: bool(known)))
    session = opened()
    poison_weight(session)
    assert session.step().latents.isnan().any() and session.step() is not None
    known.append(1)
    with pytest.raises(NonFinite, match="chunk 0 "):
        session.step()
    known.clear()
    session = opened(num_frames=2)
    poison_weight(session)
    with pytest.raises(NonFinite, match="chunk 0 "):
        list(play(session, parse_timeline("a street"), lambda _: pytest.fail("one prompt")))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    job = tmp_path_factory.mktemp("finite") / "job"
    write_checkpoint(job, RECIPE)
    return open_checkpoint(job)


def test_one_session_of_a_pool_ends_and_the_others_go_on(model):
    pool = SessionPool(model)
    seats = [pool.open([PROMPT], seed=seed, policy=SlidingWindow(3, 1)) for seed in (1, 2, 3)]
    for _ in range(6):
        pool.turn()
    seats[1].session.settle()
    poison_cache(seats[1].session)
    turns = [pool.turn() for _ in range(8)]
    ended = [turn for turn in turns if turn.error is not None]
    assert [turn.seat for turn in ended] == [seats[1]] and ended[0].chunk is None
    assert re.fullmatch(f"chunk 2 .*{CACHED}.*or restore\\(\\) a snapshot", told_error(ended[0].error))
    for seed, seat in ((1, seats[0]), (3, seats[2])):
        with model.open([PROMPT], seed=seed, policy=SlidingWindow(3, 1)) as alone:
            whole = [alone.step().latents for _ in range(6)]
        found = [turn.chunk.latents for turn in turns if turn.seat is seat]
        assert len(found) >= 3 and all(map(torch.equal, found, whole[2:]))


def test_a_model_hands_out_no_nan(model):
    stream = model.stream([PROMPT], num_frames=5)
    next(stream)
    weight = model.denoiser.net.head.head.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] = math.nan
        with pytest.raises(NonFinite, match=r"chunk 1 .* the network's weight head\.head\.weight is not; load"):
            next(stream)
    finally:
        weight.data.copy_(before)
    assert len(list(model.stream([PROMPT], num_frames=5))) == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_whole_videos_are_not_decoded_to_nan(bad):
    codec = SimpleNamespace(decode=lambda latents: latents.mul(bad), rest=None)
    lent = SimpleNamespace(lend=lambda use, then: use(codec))
    models = SimpleNamespace(memory=MemoryPolicy(), device="cpu", clock=PartClock(torch.device("cpu")), codec=lent)
    with pytest.raises(NonFinite, match="the decoder made NaN or infinite pixels of finite latents"):
        Models.decode(models, torch.ones(2, 3, 1, 4, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_magnitude_is_finite_where_all_are(dtype):
    x = torch.full((3, 37), torch.finfo(dtype).max, dtype=dtype)
    assert float(largest(x)) == torch.finfo(dtype).max, "nothing is summed"
    for bad in (math.nan, math.inf, -math.inf):
        for at in (0, 60, 110):
            y = torch.zeros(111, dtype=dtype)
            y[at] = bad
            assert not math.isfinite(float(largest(y)))
