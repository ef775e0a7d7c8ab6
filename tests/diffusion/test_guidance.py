import pytest
import torch

from rcm.diffusion.guidance import cfg


def test_formula():
    cond, uncond = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    assert torch.equal(cfg(cond, uncond, 5.0), torch.tensor([3.0, -22.0]))
    assert torch.equal(cfg(cond, uncond, 1.0), cond)
    assert torch.equal(cfg(cond, uncond, 0.0), uncond)


def test_is_an_extrapolation_beyond_the_conditional():
    """x(s) lies on the line through both, at s = 1 the conditional: Self-Forcing's scale is ours
    minus one.
    """
    cond, uncond = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).unbind()
    torch.testing.assert_close(cfg(cond, uncond, 4.0), cond + 3.0 * (cond - uncond))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3,\)"):
        cfg(torch.zeros(2, 3), torch.zeros(3), 2.0)
