"""The second time of a flow map (arXiv 2505.13447): a network that knows how far below its time
another one lies predicts the mean velocity between them. What it has beyond the network of one
time, and how it starts from that one's weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from rcm.core.errors import CheckpointError
from rcm.nets.layers import PromotedLinear
from rcm.nets.wan.config import WanConfig
from rcm.storage.state_dicts import LazyWeights, headers_of

SPAN = "span_embedding"
"""The module, and the lead of its keys."""


class SpanEmbedding(nn.Sequential):
    """t - s, as a sinusoid, to an addend of the time embedding, through an MLP like its own."""

    def __init__(self, config: WanConfig) -> None:
        sizes = (config.freq_dim, config.dim)
        super().__init__(PromotedLinear(*sizes), nn.SiLU(), PromotedLinear(config.dim, config.dim))

    @property
    def last(self) -> nn.Linear:
        """The layer that starts at zero."""
        return cast(nn.Linear, self[2])


def initial_span(config: WanConfig) -> dict[str, Tensor]:
    """First weights of the embedding by their keys: N(0, 0.02^2) and a last layer of zeros, so that
    the network computes what it did with one time. The same in every run.
    """
    draws = torch.randn(config.dim, config.freq_dim, generator=torch.Generator().manual_seed(0))
    values = {
        "0.weight": 0.02 * draws,
        "0.bias": torch.zeros(config.dim),
        "2.weight": torch.zeros(config.dim, config.dim),
        "2.bias": torch.zeros(config.dim),
    }
    return {f"{SPAN}.{name}": value for name, value in values.items()}


class StartedWeights(LazyWeights):
    """`weights` of one time, read when asked for, with the first weights of the second time."""

    def __init__(self, weights: Mapping[str, Tensor], config: WanConfig) -> None:
        self.weights, self.span = weights, initial_span(config)
        self.headers = {**headers_of(weights), **self.span}

    def __getitem__(self, name: str) -> Tensor:
        return self.span[name] if name in self.span else self.weights[name]


def with_second_time(weights: Mapping[str, Tensor], config: WanConfig) -> Mapping[str, Tensor]:
    """`weights` for a network of `config`: those of one time begin the second one, if it has it.
    Only its keys may be missing, and all of them: a part of them is `CheckpointError`, and so are
    those of two times for a network of one; any other key is the business of who loads.
    """
    own = initial_span(config).keys()
    missing = [name for name in own if name not in weights]
    if not config.two_times:
        if len(missing) < len(own):
            raise CheckpointError(
                f"it holds a network of two times ({SPAN}.*), whose velocity is a mean between"
                " both, and this network has one; two times are trained further by"
                " training_type=tf_meanflow alone, and sampled by rcm stream"
            )
        return weights
    if missing and len(missing) < len(own):
        raise CheckpointError(
            f"it holds a part of the second time's embedding and lacks {', '.join(missing)}; a"
            f" network of one time has no {SPAN}.* at all, one of two times all four"
        )
    return StartedWeights(weights, config) if missing else weights
