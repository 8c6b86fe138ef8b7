"""PointNet++ with single-scale grouping (Qi et al., 2017), and where it may be cut.

Shared layers are linear layers without bias over the last axis, each followed by batch norm and
ReLU; fully connected layers have a bias. The paper's counts require both.

Shapes: B clouds, P points, S sampled points, K neighbours, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigmabranch.backbones.base import Backbone
from sigmabranch.errors import ConfigError, DataError
from sigmabranch.fields import from_fields, to_fields
from sigmabranch.points import ball_query, farthest_points, take_points


@dataclass(frozen=True, kw_only=True, slots=True)
class PointNet2Spec:
    """Shape of a PointNet++; the paper's by default.

    Attributes:
        centroids: points sampled by each set abstraction.
        radii: of their balls, for clouds in the unit sphere.
        neighbours: points grouped in each ball. The paper's counts ask for 32 in the second set
            abstraction; the public recipe has 64.
        widths: layers of each set abstraction, and last those of the one over all points.
        connected: widths of the fully connected layers before the logits.
        dropout: after each fully connected layer.
        channels: numbers a point; the first three are its coordinates.
        classes: length of the output.
    """

    family: ClassVar[str] = "pointnet2"

    centroids: tuple[int, ...] = (512, 128)
    radii: tuple[float, ...] = (0.2, 0.4)
    neighbours: tuple[int, ...] = (32, 32)
    widths: tuple[tuple[int, ...], ...] = ((64, 64, 128), (128, 128, 256), (256, 512, 1024))
    connected: tuple[int, ...] = (512, 256)
    dropout: float = 0.4
    channels: int = 3
    classes: int = 40

    def __post_init__(self) -> None:
        steps = len(self.centroids)
        if not len(self.radii) == len(self.neighbours) == len(self.widths) - 1 == steps > 0:
            raise ConfigError(
                "a PointNet++ needs as many centroids as radii and neighbours, at least one, and "
                "one entry of widths more"
            )
        layers = [width for stage in self.widths for width in stage]
        sizes = (*self.centroids, *self.neighbours, *layers, *self.connected, self.classes)
        if min(sizes) < 1 or not all(self.widths) or not self.connected or min(self.radii) <= 0:
            raise ConfigError("every size, radius and layer list of a PointNet++ must be positive")
        if list(self.centroids) != sorted(self.centroids, reverse=True):
            raise ConfigError(f"PointNet++ centroids must not increase, got {self.centroids}")
        if self.channels < 3 or not 0 <= self.dropout < 1:
            raise ConfigError("a PointNet++ takes 3 or more channels and a dropout in [0, 1)")

    def build(self) -> PointNet2:
        """A freshly initialised network of this shape."""
        return PointNet2(self)

    def check_input(self, shape: tuple[int, ...]) -> None:
        """Raise :class:`DataError` unless one input of ``shape`` fits the network."""
        if len(shape) != 2:
            raise DataError(f"the network takes clouds of points, the data are of shape {shape}")
        points, channels = shape
        if channels != self.channels:
            raise DataError(
                f"the points have {channels} channels but the network is made for "
                f"{self.channels}: use --set model.channels={channels}"
            )
        if points < self.centroids[0]:
            raise DataError(
                f"the clouds have {points} points but the network samples {self.centroids[0]}: "
                "use smaller model.centroids"
            )

    def narrowed(self, factor: float, nudge: int) -> PointNet2Spec:
        """All widths times ``factor``; the widest layer ``nudge`` channels wider."""

        def scaled(widths: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(max(1, round(width * factor)) for width in widths)

        *local, last = (scaled(stage) for stage in self.widths)
        last = (*last[:-1], max(1, last[-1] + nudge))
        return replace(self, widths=(*local, last), connected=scaled(self.connected))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; :meth:`from_dict` is its inverse."""
        return {name: to_fields(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> PointNet2Spec:
        """Inverse of :meth:`to_dict`; unknown keys raise :class:`ConfigError`."""
        return from_fields(cls, "PointNet++", value)


class PointSet(NamedTuple):
    """Points and what is known of each: xyz (B, P, 3) and feature (B, P, C), C possibly 0."""

    xyz: Tensor
    feature: Tensor


class Points(nn.Module):
    """A cloud (B, P, 3 + C) as a point set."""

    def forward(self, cloud: Tensor) -> PointSet:
        """(B, P, 3 + C) → xyz (B, P, 3), feature (B, P, C)."""
        return PointSet(cloud[..., :3], cloud[..., 3:])


class SharedLayers(nn.Sequential):
    """Linear, batch norm and ReLU, the same for every point: (..., C) → (..., C')."""

    def __init__(self, inputs: int, widths: tuple[int, ...]) -> None:
        super().__init__(
            *(
                nn.Sequential(nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU(inplace=True))
                for a, b in pairwise((inputs, *widths))
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) → (..., C'); statistics are taken over all points of the batch."""
        rows = super().forward(x.flatten(0, -2))
        return rows.view(*x.shape[:-1], -1)


class SetAbstraction(nn.Module):
    """Sample points, group the neighbours of each, and describe every group by one maximum."""

    def __init__(
        self, inputs: int, widths: tuple[int, ...], centroids: int, radius: float, neighbours: int
    ) -> None:
        super().__init__()
        self.centroids, self.radius, self.neighbours = centroids, radius, neighbours
        self.layers = SharedLayers(3 + inputs, widths)

    def forward(self, points: PointSet) -> PointSet:
        """xyz (B, P, 3), feature (B, P, C) → xyz (B, S, 3), feature (B, S, C')."""
        xyz, feature = points
        centre = take_points(xyz, farthest_points(xyz, self.centroids))
        near = ball_query(xyz, centre, self.radius, self.neighbours)
        relative = take_points(xyz, near) - centre[:, :, None]
        groups = torch.cat([relative, take_points(feature, near)], dim=-1)
        return PointSet(centre, self.layers(groups).amax(2))


class GlobalAbstraction(nn.Module):
    """Set abstraction over all points at once."""

    def __init__(self, inputs: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = SharedLayers(3 + inputs, widths)

    def forward(self, points: PointSet) -> Tensor:
        """xyz (B, P, 3), feature (B, P, C) → (B, C')."""
        return self.layers(torch.cat(tuple(points), dim=-1)).amax(1)


class PointPool(nn.Module):
    """Mean over the points; the feature of a whole cloud passes through."""

    def forward(self, feature: PointSet | Tensor) -> Tensor:
        """Point set with (B, P, C) features, or (B, C) → (B, C)."""
        return feature if isinstance(feature, Tensor) else feature[1].mean(1)


class VectorNorm(nn.BatchNorm1d):
    """Batch norm of (B, C) that trains on a batch of one, too: by its running statistics.

    One vector has no deviation, and an epoch's last batch may hold a single cloud.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) → (B, C)."""
        if len(x) > 1 or not self.training:
            return super().forward(x)
        mean, variance = self.running_mean, self.running_var
        return F.batch_norm(x, mean, variance, self.weight, self.bias, eps=self.eps)


class PointNet2(nn.Module):
    """A PointNet++ of the given shape: (B, P, channels) float → (B, classes) logits.

    The input lies in the unit sphere and has at least as many points as the first ``centroids``.
    """

    def __init__(self, spec: PointNet2Spec) -> None:
        super().__init__()
        self.skeleton_source = {"builder": spec.family, "config": spec.to_dict()}
        self.points = Points()
        width = spec.channels - 3
        grouping = zip(spec.widths, spec.centroids, spec.radii, spec.neighbours, strict=False)
        for number, (widths, centroids, radius, neighbours) in enumerate(grouping, start=1):
            abstraction = SetAbstraction(width, widths, centroids, radius, neighbours)
            self.add_module(f"sa{number}", abstraction)
            width = widths[-1]
        self.add_module(f"sa{len(spec.widths)}", GlobalAbstraction(width, spec.widths[-1]))
        layers = pairwise((spec.widths[-1][-1], *spec.connected))
        for number, (inputs, outputs) in enumerate(layers, start=1):
            self.add_module(f"fc{number}", _connected(inputs, outputs, spec.dropout))
        self.classifier = nn.Linear(spec.connected[-1], spec.classes)

    def forward(self, cloud: Tensor) -> Tensor:
        """(B, P, channels) → (B, classes)."""
        feature: Any = cloud
        for module in self.children():
            feature = module(feature)
        return feature


def pointnet2_backbone(model: nn.Module) -> Backbone | None:
    """Where to cut a :class:`PointNet2`; None for any other module.

    The first layer over all points keeps its channels in every branch: it is cheap, and the paper's
    counts show it whole.
    """
    if not isinstance(model, PointNet2):
        return None
    names = [name for name, _ in model.named_children()]
    body = tuple(name for name in names if name.startswith("sa"))
    return Backbone(
        model=model,
        chain=("points", *body, "fc1"),
        stages=(*body[1:], "fc1"),
        pool=PointPool(),
        head=tuple(names[names.index("fc1") + 1 :]),
        whole=(f"{body[-1]}.layers.0",),
        source=model.skeleton_source,
    )


def build_pointnet2(config: Mapping[str, Any]) -> PointNet2:
    """A freshly initialised PointNet++ from the JSON form of its spec."""
    return PointNet2(PointNet2Spec.from_dict(config))


def _connected(inputs: int, outputs: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, outputs),
        VectorNorm(outputs),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
    )
