"""Clustered residuals: tokens lose the mean of their cluster before they are quantised (Quant
VideoGen, arXiv 2602.02958).

Everything is batched matrix products, gathers and argmin: no atomics, so results repeat bit for bit
on one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rcm.kernels.kv_codec import fused_clusters

OFFICIAL_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Clusters:
    """Stages of clusters of one tensor.

    centroids    [stages, B, k, N, D]: bf16, or the dtype of the tensor in mode "official".
    assignments  [stages, B, S] with one map for all heads, else [stages, B, S, N]: uint8, int16 or
                 int32. None with one cluster: its mean.
    first_stage_first  order in which the stages are added back.
    """

    centroids: Tensor
    assignments: Tensor | None
    first_stage_first: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.centroids.nbytes + (0 if self.assignments is None else self.assignments.nbytes)


@dataclass(frozen=True)
class Clustering:
    """How to cluster: `clusters`, `iters`, `stages`, one map for all heads or one per head, the
    mode of the codec, and whether by kernels where they apply, whose sums differ in the last bits.
    """

    clusters: int
    iters: int
    stages: int
    shared: bool
    mode: str
    fused: bool = False


class Clustered(NamedTuple):
    """A tensor taken apart. `residual` of all stages but the last, whose `subtract` = (centroids
    [B, k, N, D], assignments) is still to be taken off (`members`); `centres` per stage, which
    start the next chunk where they fit.
    """

    residual: Tensor
    subtract: tuple[Tensor, Tensor] | None
    clusters: Clusters
    centres: list[Tensor]


def cluster(x: Tensor, how: Clustering, warm: Sequence[Tensor] | None = None) -> Clustered:
    """Clusters of `x` [B, S, N, D].

    The residual is float32, or of the dtype of `x` in mode "official" and before any stage. It is
    taken against the centroids as stored, except in mode "release", which subtracts them unrounded.
    """
    official = how.mode == "official"
    residual = x
    k = min(how.clusters, x.shape[1])
    if k <= 1 and not official:
        mean = x.float().mean(1, keepdim=True)
        stored = mean.to(torch.bfloat16)
        return Clustered(
            x.float() - (mean if how.mode == "release" else stored.float()),
            None,
            Clusters(stored[None], None),
            [],
        )
    centroids, assignments, centres, subtract = [], [], [], None
    for stage in range(how.stages):
        if subtract is not None:
            residual = (residual if official else residual.float()) - members(*subtract)
        start = warm[stage] if warm is not None and stage < len(warm) else None
        if official:
            means, assigned, centre = euclidean(residual, k, iters=how.iters, start=start)
            stored = means
        else:
            fused = (
                fused_clusters.spherical(residual, k, iters=how.iters, start=start)
                if how.fused and how.shared
                else None
            )
            assigned, centre = fused or spherical(
                features(residual.float(), shared=how.shared), k, iters=how.iters, start=start
            )
            means = member_means(residual, assigned, k, fused=how.fused)
            stored = means.to(torch.bfloat16)
        subtract = (means if official or how.mode == "release" else stored.float(), assigned)
        centroids.append(stored)
        assignments.append(assigned.to(index_dtype(k)))
        centres.append(centre)
    return Clustered(
        residual,
        subtract,
        Clusters(torch.stack(centroids), torch.stack(assignments), official),
        centres,
    )


def add_back(residual: Tensor, clusters: Clusters) -> Tensor:
    """`residual` float32 plus the centroids of every stage, one after another; a new tensor."""
    if clusters.assignments is None:
        return residual + clusters.centroids[0].float()
    stages = range(clusters.centroids.shape[0])
    for stage in stages if clusters.first_stage_first else reversed(stages):
        residual = (
            residual + members(clusters.centroids[stage], clusters.assignments[stage]).float()
        )
    return residual


def index_dtype(k: int) -> torch.dtype:
    """The narrowest type that counts `k` clusters."""
    return torch.uint8 if k <= 256 else torch.int16 if k <= 32767 else torch.int32


def features(x: Tensor, *, shared: bool) -> Tensor:
    """What tokens are compared by, of length 1: [B, 1, S, D] their mean over heads, or [B, N, S,
    D].
    """
    return F.normalize(x.mean(2).unsqueeze(1) if shared else x.transpose(1, 2), dim=-1)


def spherical(points: Tensor, k: int, *, iters: int, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """Assignments [B, S] (one map, G = 1) or [B, S, G], and unit centres [B, G, k, D], of unit
    `points` [B, G, S, D].

    Starts from `start` where its shape fits, else from tokens at even distances; at least one
    iteration; a cluster that loses its members becomes the zero vector.
    """
    b, g, s, d = points.shape
    if start is not None and start.shape == (b, g, k, d):
        centres = F.normalize(start.float(), dim=-1)
    else:
        centres = points[:, :, torch.linspace(0, s - 1, k, device=points.device).round().long()]
    for _ in range(max(1, iters)):
        nearest = nearest_centre(points, centres)
        centres = F.normalize(_means(points, nearest, k)[0], dim=-1)
    return (nearest[:, 0] if g == 1 else nearest.transpose(1, 2)), centres


def euclidean(
    x: Tensor, k: int, *, iters: int, start: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Lloyd's iterations per head, as "official" runs them: (centroids [B, k, N, D], assignments
    [B, S, N], centres [B, N, k, D]).

    At most `iters`, ending when less than a share of 1e-4 of the assignments changes; an empty
    cluster keeps its centre. The package starts from random tokens; here from tokens at even
    distances unless `start` is given, so that results repeat.
    """
    points = x.transpose(1, 2)
    b, n, s, d = points.shape
    if start is not None and start.shape == (b, n, k, d):
        centres = start.to(x.dtype)
    else:
        centres = points[:, :, torch.linspace(0, s - 1, k, device=x.device).round().long()]
    settled, previous = torch.zeros((), dtype=torch.bool, device=x.device), None
    # once settled nothing changes: the host, which may be capturing, does not wait to see it
    for _ in range(max(1, iters)):
        nearest = nearest_centre(points.float(), centres.float())
        if previous is not None:
            settled = settled | ((nearest != previous).float().mean() < OFFICIAL_TOLERANCE)
        means, counts = _means(points.float(), nearest, k)
        centres = torch.where((counts > 0) & ~settled, means.to(x.dtype), centres)
        previous = nearest
    return centres.transpose(1, 2).contiguous(), nearest.transpose(1, 2), centres


def nearest_centre(points: Tensor, centres: Tensor) -> Tensor:
    """Index [B, G, S] of the centre [B, G, k, D] at the least Euclidean distance from each of
    `points` [B, G, S, D].
    """
    return torch.argmin(centres.square().sum(-1).unsqueeze(2) - 2 * (points @ centres.mT), dim=-1)


def member_means(x: Tensor, assigned: Tensor, k: int, *, fused: bool = False) -> Tensor:
    """Means float32 [B, k, N, D] of the members of every cluster of `x` [B, S, N, D]; zero where
    there are none.
    """
    if fused and (means := fused_clusters.member_means(x, assigned, k)) is not None:
        return means
    x = x.float()
    if assigned.dim() == 2:
        return (
            _means(x.flatten(2).unsqueeze(1), assigned.unsqueeze(1), k)[0]
            .squeeze(1)
            .unflatten(-1, x.shape[2:])
        )
    return _means(x.transpose(1, 2), assigned.transpose(1, 2), k)[0].transpose(1, 2)


def members(centroids: Tensor, assigned: Tensor) -> Tensor:
    """The centroid of every token: [B, S, N, D] of centroids [B, k, N, D] and assignments [B, S] or
    [B, S, N].
    """
    b, _, n, d = centroids.shape
    index = (
        assigned.long() if assigned.dim() == 3 else assigned.long().unsqueeze(2).expand(-1, -1, n)
    )
    return centroids.gather(1, index.unsqueeze(3).expand(b, -1, n, d))


def _means(points: Tensor, assigned: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Means [B, G, k, D] of points [B, G, S, D] by cluster, by a product with the indicator matrix,
    and member counts [B, G, k, 1].
    """
    belongs = (assigned.unsqueeze(2) == torch.arange(k, device=points.device).view(1, 1, k, 1)).to(
        points.dtype
    )
    counts = belongs.sum(-1, keepdim=True)
    return (belongs @ points) / counts.clamp(min=1), counts
