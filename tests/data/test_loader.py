from __future__ import annotations

import pytest

from rcm.core.errors import ConfigError
from rcm.data.loader import Loader


class Numbers:
    """A source whose batch is the list of its sample numbers."""

    def __init__(self, num: int, name: str = "numbers") -> None:
        self.num, self.name, self.fail_at = num, name, None

    def __len__(self) -> int:
        return self.num

    def fetch(self, indices):
        if self.fail_at in indices:
            raise RuntimeError(f"sample {self.fail_at} is bad")
        return list(indices)

    def fingerprint(self) -> str:
        return self.name


def take(loader: Loader, count: int) -> list[list[int]]:
    return [next(loader) for _ in range(count)]


@pytest.mark.parametrize("prefetch", [0, 3])
def test_an_epoch_visits_every_sample_once_then_in_another_order(prefetch):
    loader = Loader(Numbers(24), batch_size=4, prefetch=prefetch)
    first, second = (sum(take(loader, 6), []) for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second and first != list(range(24))
    assert first != sum(take(Loader(Numbers(24), batch_size=4, seed=1), 6), [])


def test_incomplete_batches_are_dropped_and_order_can_be_kept():
    loader = Loader(Numbers(11), batch_size=4, shuffle=False)
    assert take(loader, 3) == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]


@pytest.mark.parametrize("prefetch", [0, 1, 4])
@pytest.mark.parametrize("done", [0, 1, 5, 6, 7, 13])
def test_resume_is_exact_wherever_it_stopped(prefetch, done):
    """What was read ahead and not handed out is handed out after the resume."""
    straight = take(Loader(Numbers(26), batch_size=4, prefetch=prefetch), done + 9)
    stopped = Loader(Numbers(26), batch_size=4, prefetch=prefetch)
    take(stopped, done)
    state = stopped.state_dict()
    resumed = Loader(Numbers(26), batch_size=4, prefetch=2)
    take(resumed, 2)
    resumed.load_state_dict(state)
    assert take(resumed, 9) == straight[done:]
    assert resumed.state_dict() == {**state, **{k: resumed.state_dict()[k] for k in ("epoch", "position")}}
    stopped.close()
    assert take(stopped, 9) == straight[done:]


def test_data_ranks_share_the_epoch_and_cp_ranks_share_the_batch():
    whole = sum(take(Loader(Numbers(24), batch_size=6), 4), [])
    ranks = [take(Loader(Numbers(24), batch_size=2, data_rank=r, data_world=3), 4) for r in range(3)]
    interleaved = [n for step in range(4) for r in range(3) for n in ranks[r][step]]
    assert interleaved == whole
    assert take(Loader(Numbers(24), batch_size=2, data_rank=1, data_world=3), 4) == ranks[1]


def test_resume_on_another_world_size_continues_at_the_same_sample():
    one = Loader(Numbers(48), batch_size=6)
    before = sum(take(one, 3), [])
    state = one.state_dict()
    rest: list[int] = []
    for rank in range(2):
        loader = Loader(Numbers(48), batch_size=3, data_rank=rank, data_world=2)
        loader.load_state_dict(state)
        rest += sum(take(loader, 5), [])
    assert sorted(before + rest) == list(range(48))


@pytest.mark.parametrize(
    ("change", "word"),
    [({"num": 25}, "num_samples"), ({"name": "others"}, "fingerprint"), ({"seed": 9}, "seed"), ({"shuffle": False}, "shuffle")],
)
def test_a_position_in_other_data_is_refused(change, word):
    state = Loader(Numbers(24), batch_size=4).state_dict()
    source = Numbers(change.pop("num", 24), change.pop("name", "numbers"))
    with pytest.raises(ConfigError, match=word):
        Loader(source, batch_size=4, **change).load_state_dict(state)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_of_the_source_arrive_at_their_batch(prefetch):
    source = Numbers(8)
    source.fail_at = 5
    loader = Loader(source, batch_size=2, shuffle=False, prefetch=prefetch)
    assert take(loader, 2) == [[0, 1], [2, 3]]
    with pytest.raises(RuntimeError, match="sample 5 is bad"):
        next(loader)


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"batch_size": 1, "data_rank": 2, "data_world": 2}, {"batch_size": 5}, {"batch_size": 2, "data_world": 3}],
)
def test_impossible_loaders_are_refused(options):
    with pytest.raises(ConfigError):
        Loader(Numbers(4), **options)
