"""A tree that the data propose: where to cut the dense network, and into how many parts.

The dense network runs once. What is judged at a place is what a router there would read, the pooled
feature behind a random projection and its norm. Below the root that is an approximation: a router
of the branched network will read its own node's output, not the dense network's.

Shapes: B batch, N samples, C channels, D latent length.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sigmabranch.backbones import Backbone, as_backbone
from sigmabranch.conversion.calibrate import stream
from sigmabranch.conversion.cluster import Clusters, spherical_kmeans
from sigmabranch.conversion.shape import SplitScores, split_scores
from sigmabranch.conversion.shards import Loader
from sigmabranch.errors import ConfigError
from sigmabranch.routing import Router
from sigmabranch.tree import NodeId, TreeSpec, node_key

# What a tree says of each of its levels, its cuts apart.
_PER_LEVEL = ("widths", "shares", "heads")


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """A tree, and what speaks for it; ``str`` gives a table.

    Attributes:
        tree: ready for :func:`~sigmabranch.conversion.convert`, which takes the proposal as well,
            and then keeps it in its record.
        scores: node key → the scores of the node's samples, level by level.
        cuts: stage → the scores of all samples before it, split in two, in the network's order;
            empty where the places were given.
        samples: calibration samples read.
    """

    tree: TreeSpec
    scores: Mapping[str, SplitScores]
    cuts: Mapping[str, SplitScores]
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; :meth:`from_dict` is its inverse."""
        return {
            "tree": self.tree.to_dict(),
            "scores": {key: scores.to_dict() for key, scores in self.scores.items()},
            "cuts": {stage: scores.to_dict() for stage, scores in self.cuts.items()},
            "samples": self.samples,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Proposal:
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: an unknown or missing key, or values that make no proposal.
        """
        try:
            found = dict(value)
            proposal = cls(
                tree=TreeSpec.from_dict(found.pop("tree")),
                scores={k: SplitScores.from_dict(v) for k, v in found.pop("scores").items()},
                cuts={k: SplitScores.from_dict(v) for k, v in found.pop("cuts").items()},
                samples=int(found.pop("samples")),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"not a proposal of a tree: {error!r}") from error
        if found:
            raise ConfigError(f"unknown proposal key {next(iter(found))!r}: use the same version")
        return proposal

    def __str__(self) -> str:
        rows = [("", "samples", "silhouettes of 2, 3, …", "votes", "")]
        for stage, scores in self.cuts.items():
            taken = "cut here" if stage in (self.tree.cuts or ()) else ""
            rows.append((f"before {stage}", *_cells(scores), taken))
        for key, scores in self.scores.items():
            rows.append((key, *_cells(scores), scores.reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(lines)


def _cells(scores: SplitScores) -> tuple[str, str, str]:
    silhouettes = " ".join(f"{value:.2f}" for value in scores.silhouette[1:])
    return f"{scores.samples:,}", silhouettes, " ".join(map(str, scores.votes[1:]))


@torch.no_grad()
def propose_tree(
    dense: nn.Module | Backbone,
    loader: Loader,
    tree: TreeSpec | None = None,
    *,
    max_depth: int = 2,
    max_branches: int = 4,
    min_samples: int = 256,
    samples: int = 10_000,
    centred: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Proposal:
    """Propose a tree for a dense network from its own features.

    Each node splits as :mod:`~sigmabranch.conversion.shape` says, its children at the next level,
    and so on; a node that does not is a leaf. The root always splits, because a tree needs two
    leaves; its reason says so where the data do not ask for it.

    Args:
        dense: as for :func:`~sigmabranch.conversion.convert`.
        loader: (inputs, labels) batches, or inputs alone, without augmentation.
        tree: all but its leaves is kept, ``cuts`` included; what it says of each level only if the
            proposal is as deep. Without ``cuts`` and ``decide_after``, levels begin where all
            samples fall into two parts best: by votes, then by how far the silhouette exceeds
            chance.
        max_depth: levels at most.
        max_branches: children of a node at most.
        min_samples: nodes with fewer are leaves.
        samples: calibration samples read at most.
        centred: as in the conversion's settings.
        seed: of the projections and of whatever is drawn.
        device: where to run; the dense network's device if None.
        progress: called with (what, samples done, samples in all).

    Raises:
        ConfigError: the network cannot be cut like that, or a limit allows no split at all.
        ConversionError: too few samples, or too much alike, to split the root.
        DataError: no samples.
        NumericError: NaN or infinity in a latent.
    """
    if max_depth < 1:
        raise ConfigError(f"max_depth must be at least 1, got {max_depth}")
    tree = tree or TreeSpec()
    home = _model(dense)
    backbone = as_backbone(dense, next(stream(loader, 1, _device(home)))[0])
    device = torch.device(device or _device(home))
    backbone = replace(backbone, model=copy.deepcopy(backbone.model).eval().to(device))
    candidates = _candidates(backbone, tree, max_depth)
    places = _places(backbone, tree, candidates)
    inputs = (x for x, _ in _told(stream(loader, samples, device), samples, progress))
    latents = _latents(backbone, tree, places, inputs, seed)
    judge = partial(split_scores, min_samples=min_samples, centred=centred, seed=seed)
    split = partial(spherical_kmeans, centred=centred, seed=seed)
    cut_scores: dict[str, SplitScores] = {}
    if tree.cuts is None and tree.decide_after is None:
        cut_scores = {
            stage: judge(latents[place], most=2)
            for stage, place in zip(candidates, places, strict=True)
        }
    cuts = _best(cut_scores, max_depth) or candidates
    by_level = [latents[places[candidates.index(cut)]] for cut in cuts]
    scores = _grown(by_level, partial(judge, most=max_branches), split)
    return Proposal(
        tree=_shaped(tree, scores, cuts),
        scores={node_key(node): found for node, found in scores.items()},
        cuts=cut_scores,
        samples=len(by_level[0]),
    )


def _model(dense: nn.Module | Backbone) -> nn.Module:
    return dense.model if isinstance(dense, Backbone) else dense


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _candidates(backbone: Backbone, tree: TreeSpec, max_depth: int) -> tuple[str, ...]:
    """Where levels may begin: as the tree says, else at any stage but the first."""
    if tree.cuts is not None:
        return tree.cuts[:max_depth]
    if len(backbone.stages) < 2:
        raise ConfigError(
            f"the network has {len(backbone.stages)} stages, and a tree needs two: set tree.cuts"
        )
    return backbone.stages[1:] if tree.decide_after is None else backbone.stages[1:][-max_depth:]


def _places(backbone: Backbone, tree: TreeSpec, candidates: Sequence[str]) -> list[str]:
    """For each candidate the module whose output its level's routers read.

    Raises:
        ConfigError: candidates that are no cuts, or a decision that is not made in the trunk.
    """
    levels = backbone.levels(len(candidates), candidates)
    if tree.decide_after is None:
        return list(levels.outputs()[:-1])
    if tree.decide_after not in levels.trunk:
        raise ConfigError(
            f"tree decide_after={tree.decide_after!r} is no module of the trunk: choose from "
            f"{', '.join(levels.trunk)}"
        )
    return [tree.decide_after] * len(candidates)


def _told(
    batches: Iterator[tuple[Tensor, Tensor]],
    samples: int,
    progress: Callable[[str, int, int], None] | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, with their progress told."""
    done = 0
    for x, y in batches:
        yield x, y
        done += len(x)
        if progress is not None:
            progress("features for the tree's shape", min(done, samples), samples)


def _latents(
    backbone: Backbone, tree: TreeSpec, places: Sequence[str], inputs: Iterable[Tensor], seed: int
) -> dict[str, Tensor]:
    """What a router at each of the places would read of every sample: (N, D) float32."""
    parts: dict[str, list[Tensor]] = {place: [] for place in places}
    routers: dict[str, Router] = {}
    last = max(map(backbone.chain.index, parts))
    for x in inputs:
        feature = x
        for path in backbone.chain[: last + 1]:
            feature = backbone.model.get_submodule(path)(feature)
            if path in parts:
                if path not in routers:
                    routers[path] = _router(backbone, tree, feature, seed + len(routers))
                parts[path].append(routers[path].latent(feature))
    return {place: torch.cat(latents) for place, latents in parts.items()}


def _router(backbone: Backbone, tree: TreeSpec, feature: Any, seed: int) -> Router:
    """A router for such features, its projection drawn by the seed."""
    pooled_BC = backbone.pool(feature)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        router = Router(pooled_BC.shape[1], copy.deepcopy(backbone.pool), tree)
    return router.eval().to(pooled_BC.device)


def _best(scores: Mapping[str, SplitScores], count: int) -> tuple[str, ...]:
    """So many stages with most votes for two parts, in order; of equals, the least by chance.

    A silhouette alone would prefer early stages: few directions hold most of what is seen there,
    and any input that is long in a few directions has a large one.
    """
    order = list(scores)

    def worth(stage: str) -> tuple[int, float, int]:
        votes, excess = 0, 0.0
        if len(scores[stage].votes) > 1:
            votes = scores[stage].votes[1]
            excess = scores[stage].silhouette[1] - scores[stage].silhouette_floor[1]
        return votes, excess, order.index(stage)

    return tuple(sorted(sorted(order, key=worth)[-count:], key=order.index))


def _grown(
    latents: Sequence[Tensor],
    judge: Callable[[Tensor], SplitScores],
    split: Callable[[Tensor, int], Clusters],
) -> dict[NodeId, SplitScores]:
    """The scores of every node of a tree, level by level; a node whose choice is 1 is a leaf.

    Args:
        latents: (N, D) for each level.
        judge: whether a node's latents fall into parts.
        split: into how many they shall.
    """
    root: NodeId = ()
    scores: dict[NodeId, SplitScores] = {}
    frontier = {root: torch.arange(len(latents[0]), device=latents[0].device)}
    for latent_ND in latents:
        below: dict[NodeId, Tensor] = {}
        for node, rows in frontier.items():
            found = judge(latent_ND[rows])
            scores[node] = found = found if node or found.chosen > 1 else _in_two(found)
            if found.chosen > 1:
                part = split(latent_ND[rows], found.chosen).assignment
                below |= {(*node, k): rows[part == k] for k in range(found.chosen)}
        frontier = below
    ends = {
        node: SplitScores(samples=len(rows), reason="leaf: the last level")
        for node, rows in frontier.items()
    }
    return scores | ends


def _in_two(scores: SplitScores) -> SplitScores:
    """The root's choice where the data ask for none."""
    reason = f"split in 2, as a tree needs two leaves, although: {scores.reason}"
    return replace(scores, chosen=2, reason=reason)


def _shaped(tree: TreeSpec, scores: Mapping[NodeId, SplitScores], cuts: Sequence[str]) -> TreeSpec:
    """``tree`` with the leaves that the scores give it."""
    leaves = tuple(sorted(node for node, found in scores.items() if found.chosen == 1))
    depth = max(map(len, leaves))
    kept: Any = {name: getattr(tree, name) if depth == tree.depth else None for name in _PER_LEVEL}
    chosen = None if tree.cuts is None and tree.decide_after is not None else tuple(cuts[:depth])
    return replace(
        tree,
        leaves=leaves,
        cuts=chosen,
        **kept,
    )
