"""How one node's samples are split among its branches: by their latents, or by their classes.

Shapes: N samples, D latent length, V classes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sigmabranch.conversion.cluster import Clusters, spherical_kmeans
from sigmabranch.conversion.record import ConversionSpec, Split
from sigmabranch.errors import ConversionError


def split_latents(latent_ND: Tensor, branches: int, spec: ConversionSpec, seed: int) -> Split:
    """The split that clusters samples (paper, section III-C, phase 1).

    Raises:
        ConversionError: fewer samples, or fewer distinct latents, than branches.
        NumericError: a latent holds NaN or infinity.
    """
    return Split.of(_clusters(latent_ND, branches, spec, seed, balanced=spec.balanced))


def split_classes(
    latent_ND: Tensor, label_N: Tensor, classes: int, spec: ConversionSpec, seed: int
) -> Split:
    """The split that clusters the classes' mean latents into halves.

    Args:
        latent_ND: (N, D) float.
        label_N: (N,) int64 below ``classes``.
        classes: V; the ones without a sample here go where a zero latent would.
        spec: how to cluster.
        seed: of the clustering.

    Raises:
        ConversionError: one class only, or classes with the same mean.
        NumericError: a latent holds NaN or infinity.
    """
    mean_VD, seen_V = _class_means(latent_ND, label_N, classes)
    if int(seen_V.sum()) < 2:
        raise ConversionError(
            "a node of the tree holds one class only, so classes cannot split it: use a smaller "
            "tree or clusters=latents"
        )
    clusters = _clusters(mean_VD[seen_V], 2, spec, seed, balanced=True)
    class_branch_V = (mean_VD @ clusters.centroid.T + clusters.offset).argmax(1)
    sizes = torch.bincount(class_branch_V[label_N], minlength=2)
    return replace(Split.of(clusters), sizes=sizes.tolist(), class_branch=class_branch_V.tolist())


def _clusters(
    latent_ND: Tensor, branches: int, spec: ConversionSpec, seed: int, *, balanced: bool
) -> Clusters:
    return spherical_kmeans(
        latent_ND,
        branches,
        restarts=spec.restarts,
        centred=spec.centred,
        balanced=balanced,
        seed=seed,
    )


def _class_means(latent_ND: Tensor, label_N: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mean latent per class, (V, D) float64, and which classes were seen, (V,) bool."""
    size_V = torch.bincount(label_N, minlength=classes)
    sum_VD = torch.zeros(classes, latent_ND.shape[1], dtype=torch.float64, device=latent_ND.device)
    sum_VD.index_add_(0, label_N, latent_ND.double())
    return sum_VD / size_V.clamp(min=1)[:, None], size_V > 0
