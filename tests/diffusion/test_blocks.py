import pytest

from rcm.core.errors import ConfigError
from rcm.diffusion.blocks import BlockPattern


def test_published_patterns_at_21_frames():
    """Counts stated in Causal_rCM.md section 2."""
    assert [BlockPattern.parse(n).num_blocks(21) for n in ("c1-1", "c3-3", "c1-4")] == [21, 7, 6]
    assert BlockPattern.parse("c1-4").bounds(9) == ((0, 1), (1, 5), (5, 9))
    assert BlockPattern.parse("c3-3").bounds(6) == ((0, 3), (3, 6))
    assert BlockPattern(2, 3).block_of_frame(8) == (0, 0, 1, 1, 1, 2, 2, 2)


@pytest.mark.parametrize("name", ["c1-1", "c3-3", "c1-4", "c4-2", "c12-10"])
def test_against_the_frame_formula(name):
    """block = 0 if frame < first else 1 + floor((frame - first) / chunk), Causal_rCM.md section
    2.
    """
    pattern = BlockPattern.parse(name)
    frames = pattern.first + 3 * pattern.chunk
    expected = tuple(0 if f < pattern.first else 1 + (f - pattern.first) // pattern.chunk for f in range(frames))
    assert pattern.block_of_frame(frames) == expected
    assert pattern.num_blocks(frames) == 4 == len(pattern.bounds(frames))
    for i, (start, stop) in enumerate(pattern.bounds(frames)):
        assert pattern.frames_before(i) == start == expected.index(i)
        assert [expected[f] for f in range(start, stop)] == [i] * (stop - start)
    assert pattern.frames_before(4) == frames
    assert pattern.name == name


def test_one_block_video():
    assert BlockPattern(3, 3).bounds(3) == ((0, 3),)


@pytest.mark.parametrize(
    ("first", "chunk", "knob"), [(0, 1, "first_chunk_t"), (1, 0, "chunk_t"), (0, 0, "first_chunk_t"), (-1, 1, "first")]
)
def test_unset_or_negative_sizes(first, chunk, knob):
    with pytest.raises(ConfigError, match=knob):
        BlockPattern(first, chunk)


def test_unset_is_called_unset():
    with pytest.raises(ConfigError, match="unset.*_c3-3"):
        BlockPattern.parse("c0-0")


@pytest.mark.parametrize("value", [1.0, "1", True, None])
def test_sizes_are_integers(value):
    with pytest.raises(ConfigError, match="integer"):
        BlockPattern(value, 1)


@pytest.mark.parametrize(
    ("name", "frames", "fits"),
    [
        ("c3-3", 20, "18 or 21"),
        ("c1-4", 20, "17 or 21"),
        ("c3-3", 2, ": 3,"),
        ("c3-3", 4, "3 or 6"),
        ("c3-3", 0, ": 3,"),
        ("c4-2", 2, ": 4,"),
    ],
)
def test_remainders_raise_with_the_nearest_lengths(name, frames, fits):
    for call in ("num_blocks", "bounds", "block_of_frame"):
        with pytest.raises(ConfigError, match=rf"num_frames={frames}.*{fits}"):
            getattr(BlockPattern.parse(name), call)(frames)


@pytest.mark.parametrize("name", ["", "3-3", "c3", "c3-3x", "xc3-3", "c-1-1", "c3_3", "C3-3"])
def test_malformed_names(name):
    with pytest.raises(ConfigError, match="c<first>-<chunk>"):
        BlockPattern.parse(name)


def test_negative_block():
    with pytest.raises(ValueError, match="-1"):
        BlockPattern(1, 1).frames_before(-1)
