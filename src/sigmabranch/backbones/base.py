"""What a network must tell about itself before it can be branched."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from sigmabranch.coupling import SlicePlan
from sigmabranch.errors import ConfigError, ConversionError, DataError


class GlobalAveragePool(nn.Module):
    """Mean over all positions: (B, C, ...) → (B, C); a pooled feature passes through."""

    def __init__(self) -> None:
        super().__init__()
        # A module, not mean(): the counter charges adaptive pooling, and so does the paper.
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, ...) → (B, C)."""
        return feature if feature.ndim == 2 else self.pool(feature).flatten(1)


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A dense network and the places where it may be cut.

    ``model(x)`` must equal ``head(pool(chain(x)))``; :meth:`check` proves it on an example.

    Attributes:
        model: the dense network.
        chain: paths of the modules applied one after the other, from the input to the last feature.
        stages: those members of ``chain`` at which a tree level may begin.
        head: paths of the modules from the pooled last feature to the (B, V) logits.
        pool: parameter-free module, feature → (B, C); what routers, statistics and heads see.
        whole: paths of modules inside the stages whose output channels every branch keeps.
        source: how to rebuild the network's skeleton (:func:`~sigmabranch.backbones.build`), or
            None if only its owner can.
    """

    model: nn.Module
    chain: tuple[str, ...]
    stages: tuple[str, ...]
    head: tuple[str, ...]
    pool: nn.Module = field(default_factory=GlobalAveragePool)
    whole: tuple[str, ...] = ()
    source: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for path in (*self.chain, *self.head, *self.whole):
            try:
                self.model.get_submodule(path)
            except AttributeError:
                raise ConfigError(
                    f"the backbone names {path!r}, which {type(self.model).__name__} lacks"
                ) from None
        for stage in self.stages:
            if stage not in self.chain:
                raise ConfigError(f"the backbone's stage {stage!r} is not in its chain")

    def levels(self, depth: int, cuts: Sequence[str] | None = None) -> Levels:
        """Split the chain into the trunk and ``depth`` levels.

        Args:
            depth: how many levels the tree has.
            cuts: the stage at which each level begins; the last ``depth`` stages if None.

        Raises:
            ConfigError: too few stages, or a cut that is no stage or out of order.
        """
        if cuts is None:
            if depth >= len(self.stages):
                raise ConfigError(
                    f"a tree of depth {depth} needs more than {depth} stages, but the network has "
                    f"{len(self.stages)} ({', '.join(self.stages)}): use a smaller depth"
                )
            cuts = self.stages[-depth:]
        for cut in cuts:
            if cut not in self.stages:
                raise ConfigError(f"cannot cut at {cut!r}: choose from {', '.join(self.stages)}")
        starts = [self.chain.index(cut) for cut in cuts]
        if starts != sorted(set(starts)) or starts[0] == 0:
            raise ConfigError(f"cuts {', '.join(cuts)} must follow the network's order")
        bounds = [*starts, len(self.chain)]
        return Levels(
            trunk=self.chain[: starts[0]],
            levels=tuple(self.chain[start:stop] for start, stop in pairwise(bounds)),
        )

    def modules(self, paths: Iterable[str]) -> list[nn.Module]:
        """The modules at ``paths``, in order (shared with the model, not copied)."""
        return [self.model.get_submodule(path) for path in paths]

    def section(self, paths: Iterable[str], plan: SlicePlan | None = None) -> nn.Sequential:
        """A copy of the modules at ``paths`` as one module, with only the channels of ``plan``."""
        copies = OrderedDict()
        for path in paths:
            module = copy.deepcopy(self.model.get_submodule(path))
            if plan is not None:
                plan.reshape(module, prefix=path)
            copies[path.replace(".", "_")] = module
        return nn.Sequential(copies)

    def pooled_head(self, plan: SlicePlan) -> nn.Sequential:
        """A copy of the pool and the head, with only the channels of ``plan``."""
        head = self.section(self.head, plan)
        return nn.Sequential(OrderedDict(pool=copy.deepcopy(self.pool), **head._modules))

    def check(self, example: Tensor) -> None:
        """Raise :class:`ConversionError` unless chain, pool and head reproduce the model."""
        model, training = self.model, self.model.training
        model.eval()
        try:
            expected, found = model(example), self._in_parts(example)
        finally:
            model.train(training)
        if (
            found is None
            or found.shape != expected.shape
            or not found.allclose(expected, rtol=1e-4, atol=1e-5, equal_nan=True)
        ):
            raise ConversionError(
                f"{type(model).__name__} is not its parts in a row ({' → '.join(self.chain)} → "
                f"pool → {' → '.join(self.head)}): describe it with a Backbone of its own"
            )

    def _in_parts(self, example: Tensor) -> Tensor | None:
        """Logits through chain, pool and head; None if they do not fit together."""
        try:
            feature = example
            for module in self.modules(self.chain):
                feature = module(feature)
            feature = self.pool(feature)
            for module in self.modules(self.head):
                feature = module(feature)
        except RuntimeError:
            return None
        return feature


@dataclass(frozen=True, kw_only=True, slots=True)
class Levels:
    """Module paths of the trunk and of each tree level, in order."""

    trunk: tuple[str, ...]
    levels: tuple[tuple[str, ...], ...]

    def outputs(self) -> tuple[str, ...]:
        """The module whose output ends the trunk, then the one that ends each level."""
        return (self.trunk[-1], *(level[-1] for level in self.levels))


def check_image(shape: tuple[int, ...], channels: int) -> None:
    """Raise :class:`DataError` unless ``shape`` is (C, H, W) with so many channels."""
    if len(shape) != 3:
        raise DataError(f"the network takes images, the data are of shape {shape}")
    if shape[0] != channels:
        raise DataError(
            f"the images have {shape[0]} channels but the network is made for "
            f"{channels}: use --set model.in_channels={shape[0]}"
        )
