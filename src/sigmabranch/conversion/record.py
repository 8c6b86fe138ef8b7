"""What a conversion decided: enough to explain the network, and to build it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from sigmabranch.conversion.cluster import Clusters
from sigmabranch.errors import ConfigError
from sigmabranch.fields import from_fields
from sigmabranch.tree import NodeId, TreeSpec, node_key

SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionSpec:
    """How to choose clusters and channels; the defaults are the paper's, or our reading of it.

    Attributes:
        samples: at most this many calibration samples are read (N_max).
        clusters: ``"latents"`` (spherical k-means, the paper) or ``"classes"`` (balanced k-means
            on the class means of the latents; needs labels and a binary tree).
        channels: ``"activation"`` (the paper), ``"random"`` (its ablation), ``"uniform"`` (evenly
            spaced, the same for all branches), or ``"average"`` (the strongest over all samples,
            the same for all branches, as late upcycling needs them).
        shared_fraction: ρ, the part of a branch's channels that all branches share.
        projection: ``"random"`` (the paper) or ``"pca"``, the principal axes of the features that a
            router reads.
        centred: subtract the mean latent before clustering; the router's bias takes it up.
        balanced: force equally large clusters; needs a binary tree.
        restarts: seedings of k-means.
        norm_samples: samples per pass that re-estimate the batch norms of new nodes; 0 keeps the
            dense network's statistics.
        inner: how the channels inside a level's blocks are chosen: ``"norm"``, the same for all
            branches by L1 norm (the paper, for bottleneck planes), or ``"activation"``, as the
            level's outputs are. None chooses by norm where the outputs are cut and by activation
            where they are kept whole.
        affine_samples: samples on which layer norms that lost channels are fitted to what the dense
            ones give; 0 leaves their scales and shifts, None fits on ``norm_samples``.
        seed: of the random projections, the seedings and the random choice; a task adds its run's
            seed to it.
    """

    samples: int = 50_000
    clusters: str = "latents"
    channels: str = "activation"
    shared_fraction: float = 0.5
    projection: str = "random"
    centred: bool = False
    balanced: bool = False
    restarts: int = 10
    norm_samples: int = 4096
    inner: str | None = None
    affine_samples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {"clusters": _CLUSTERS, "channels": _CHANNELS, "projection": _PROJECTIONS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"unknown conversion {name} {getattr(self, name)!r}: choose from {known}"
                )
        if self.inner not in (None, *_INNER):
            raise ConfigError(f"unknown conversion inner {self.inner!r}: choose from {_INNER}")
        if not 0 <= self.shared_fraction <= 1:
            raise ConfigError(f"shared_fraction must be in [0, 1], got {self.shared_fraction}")
        if self.samples < 1 or self.restarts < 1 or self.norm_samples < 0:
            raise ConfigError("samples and restarts must be positive, norm_samples not negative")
        if self.affine_samples is not None and self.affine_samples < 0:
            raise ConfigError(f"affine_samples must not be negative, got {self.affine_samples}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ConversionSpec:
        """Inverse of :meth:`to_dict`; unknown keys raise :class:`ConfigError`."""
        return from_fields(cls, "conversion", value)


_CLUSTERS = ("latents", "classes")
_CHANNELS = ("activation", "random", "uniform", "average")
_INNER = ("norm", "activation")
_PROJECTIONS = ("random", "pca")


@dataclass(kw_only=True, slots=True)
class Split:
    """One inner node's decision.

    Attributes:
        gate_weight, gate_bias: the router's K×D weights and K biases.
        sizes: samples per cluster.
        margin, objective: see :class:`~sigmabranch.conversion.cluster.Clusters`.
        centroid_cosine: cosine of the two centroids; of more, the largest of two.
        class_branch: class → branch, where the clusters are made of classes.
        projection_weight, projection_bias: the latent's D×C weights and D biases, where they are
            not random.
        channel_mean: source stage → K×C mean pooled activations (the paper's Fig. 2).
    """

    gate_weight: list[list[float]]
    gate_bias: list[float]
    sizes: list[int]
    margin: float
    objective: float
    centroid_cosine: float
    class_branch: list[int] | None = None
    projection_weight: list[list[float]] | None = None
    projection_bias: list[float] | None = None
    channel_mean: dict[str, list[list[float]]] = field(default_factory=dict)

    @classmethod
    def of(cls, clusters: Clusters) -> Split:
        """The decision that these clusters stand for."""
        return cls(
            gate_weight=clusters.centroid.float().tolist(),
            gate_bias=clusters.offset.float().tolist(),
            sizes=list(clusters.sizes),
            margin=clusters.margin,
            objective=clusters.objective,
            centroid_cosine=max(float(a @ b) for a, b in combinations(clusters.centroid, 2)),
        )


@dataclass(kw_only=True, slots=True)
class NodeChannels:
    """One specializer's channels, as positions in its dense source.

    Attributes:
        stage: the module whose output channels are counted.
        shared, specific: see :class:`~sigmabranch.conversion.select.Selection`.
        kept: all output channels kept.
        inner: first tensor of each inner channel group → positions kept (bottleneck planes).
        max_error: largest deviation from the masked dense network, relative to its largest value.
        norm_reestimated: whether its batch norms saw the branch's own samples.
    """

    stage: str
    shared: list[int]
    specific: list[int]
    kept: list[int]
    inner: dict[str, list[int]]
    max_error: float = 0.0
    norm_reestimated: bool = False


@dataclass(kw_only=True, slots=True)
class ConversionRecord:
    """Every decision of one conversion (JSON through :meth:`to_dict`).

    Attributes:
        tree, conversion: what was asked for.
        source: SHA-256 of the dense network's tensor names and shapes.
        widths: output channels per level.
        shares: share of the inner channels kept per level.
        samples: calibration samples read.
        splits: inner node → its decision.
        nodes: specializer → its channels; of a single path, the root → those of all levels.
        proposal: JSON form of the :class:`~sigmabranch.conversion.Proposal` that the tree is of.
    """

    tree: TreeSpec
    conversion: ConversionSpec
    source: str
    widths: tuple[int, ...]
    shares: tuple[float, ...] = ()
    samples: int = 0
    splits: dict[NodeId, Split] = field(default_factory=dict)
    nodes: dict[NodeId, list[NodeChannels]] = field(default_factory=dict)
    proposal: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; :meth:`from_dict` is its inverse."""
        return {
            "schema": SCHEMA,
            "tree": self.tree.to_dict(),
            "conversion": self.conversion.to_dict(),
            "source": self.source,
            "widths": list(self.widths),
            "shares": list(self.shares),
            "samples": self.samples,
            "splits": {node_key(node): asdict(split) for node, split in self.splits.items()},
            "nodes": {
                node_key(node): [asdict(channels) for channels in stages]
                for node, stages in self.nodes.items()
            },
            **({"proposal": self.proposal} if self.proposal else {}),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ConversionRecord:
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: another schema, or keys this version does not know.
        """
        if value.get("schema") != SCHEMA:
            raise ConfigError(
                f"conversion record has schema {value.get('schema')}, this version reads {SCHEMA}"
            )
        tree = TreeSpec.from_dict(value["tree"])
        names = {node_key(node): node for node in (*tree.inner, *tree.leaves)}
        try:
            return cls(
                tree=tree,
                conversion=ConversionSpec.from_dict(value["conversion"]),
                source=value["source"],
                widths=tuple(value["widths"]),
                shares=tuple(value.get("shares", ())),
                samples=value["samples"],
                splits={names[key]: Split(**split) for key, split in value["splits"].items()},
                nodes={
                    names[key]: [NodeChannels(**channels) for channels in stages]
                    for key, stages in value["nodes"].items()
                },
                proposal=value.get("proposal"),
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(f"conversion record does not fit its tree: {error}") from error


def class_targets(record: Mapping[str, Any]) -> Tensor | None:
    """The leaf that class clusters assigned to each class, one-hot (V, L) float32.

    Args:
        record: JSON form of a conversion record.

    Returns:
        None if the clusters were not made of classes.
    """
    parsed = ConversionRecord.from_dict(record)
    root = parsed.splits[()].class_branch if parsed.splits else None
    if root is None:
        return None
    table_VL = torch.zeros(len(root), len(parsed.tree.leaves))
    for label in range(len(root)):
        node: NodeId = ()
        while node in parsed.splits:
            branches = parsed.splits[node].class_branch
            assert branches is not None
            node = (*node, branches[label])
        table_VL[label, parsed.tree.leaves.index(node)] = 1.0
    return table_VL
