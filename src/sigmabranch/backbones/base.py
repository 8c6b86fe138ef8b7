"""What a network must tell about itself before it can be branched."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sigmabranch.backbones.pools import GlobalAveragePool
from sigmabranch.coupling import SlicePlan, evaluating
from sigmabranch.errors import ConfigError, ConversionError, DataError


class Gather(nn.Module):
    """Some channels of a feature, along dimension ``dim``."""

    index: Tensor

    def __init__(self, dim: int, index: Tensor) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("index", index.clone())

    def forward(self, feature: Tensor) -> Tensor:
        """(B, ...) → (B, ...) with fewer channels."""
        return feature.index_select(self.dim, self.index)


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A dense network and the places where it may be cut.

    ``model(x)`` must equal ``head(pool(chain(x)))``, or ``head(chain(x))`` where the head does its
    own pooling; :meth:`check` proves it on an example.

    Attributes:
        model: the dense network.
        chain: paths of the modules applied one after the other, from the input to the last feature.
        stages: those members of ``chain`` at which tree levels begin unless the tree says where.
        head: paths of the modules from the pooled last feature to the (B, V) logits.
        pool: parameter-free module, feature → (B, C); what routers, statistics and heads see.
        head_pools: the head takes the last feature itself and does its own pooling.
        whole: paths of modules inside the stages whose output channels every branch keeps.
        source: how to rebuild the network's skeleton (:func:`~sigmabranch.backbones.build`), or
            None if only its owner can.
        original: what the parts must compute together; the model itself if None.
    """

    model: nn.Module
    chain: tuple[str, ...]
    stages: tuple[str, ...]
    head: tuple[str, ...]
    pool: nn.Module = field(default_factory=GlobalAveragePool)
    whole: tuple[str, ...] = ()
    head_pools: bool = False
    source: Mapping[str, Any] | None = None
    original: nn.Module | None = None

    def __post_init__(self) -> None:
        for path in (*self.chain, *self.head, *self.whole):
            try:
                self.model.get_submodule(path)
            except AttributeError:
                raise ConfigError(
                    f"the backbone names {path!r}, which {type(self.model).__name__} lacks"
                ) from None
        for parts in (self.chain, self.head):
            names = Counter(path.replace(".", "_") for path in parts)
            if twice := [path for path in parts if names[path.replace(".", "_")] > 1]:
                raise ConfigError(
                    f"the copies of {' and '.join(twice)} would share a name: rename one"
                )
        for stage in self.stages:
            if stage not in self.chain:
                raise ConfigError(f"the backbone's stage {stage!r} is not in its chain")

    def levels(self, depth: int, cuts: Sequence[str] | None = None) -> Levels:
        """Split the chain into the trunk and ``depth`` levels.

        Args:
            depth: how many levels the tree has.
            cuts: the stage at which each level begins; the last ``depth`` stages if None.

        Raises:
            ConfigError: too few stages, or a cut that is no part of the chain or out of order.
        """
        if cuts is None:
            if depth >= len(self.stages):
                raise ConfigError(
                    f"a tree of depth {depth} needs more than {depth} stages, but the network has "
                    f"{len(self.stages)} ({', '.join(self.stages)}): use a smaller depth"
                )
            cuts = self.stages[len(self.stages) - depth :]
        for cut in cuts:
            if cut not in self.chain:
                raise ConfigError(f"cannot cut at {cut!r}: choose from {', '.join(self.stages)}")
        starts = [self.chain.index(cut) for cut in cuts]
        if starts != sorted(set(starts)) or 0 in starts:
            raise ConfigError(f"cuts {', '.join(cuts)} must follow the network's order")
        bounds = [*starts, len(self.chain)]
        return Levels(
            trunk=self.chain[: bounds[0]],
            levels=tuple(self.chain[start:stop] for start, stop in pairwise(bounds)),
        )

    def modules(self, paths: Iterable[str]) -> list[nn.Module]:
        """The modules at ``paths``, in order (shared with the model, not copied)."""
        return [self.model.get_submodule(path) for path in paths]

    def section(self, paths: Iterable[str], plan: SlicePlan | None = None) -> nn.Sequential:
        """A copy of the modules at ``paths`` as one module, with only the channels of ``plan``."""
        copies: OrderedDict[str, nn.Module] = OrderedDict()
        for path in paths:
            if plan is not None and plan.gather is not None and path == plan.gathered_by:
                copies["gathered"] = Gather(*plan.gather)
            module = copy.deepcopy(self.model.get_submodule(path))
            if plan is not None:
                plan.reshape(module, prefix=path)
            copies[path.replace(".", "_")] = module
        return nn.Sequential(copies)

    def specializer(self, paths: Iterable[str], plan: SlicePlan) -> nn.Sequential:
        """A copy of the modules at ``paths`` as ``plan`` cuts them, and what it gathers before.

        None of its layers works in place, because its siblings read the same feature.
        """
        section = self.section(paths, plan)
        for module in section.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]
        if plan.gather is None or plan.gathered_by is not None:
            return section
        return nn.Sequential(OrderedDict(gathered=Gather(*plan.gather), **section._modules))

    def pooled_head(self, plan: SlicePlan | None = None) -> nn.Sequential:
        """A copy of what turns the last feature into logits, with only the channels of ``plan``."""
        name = "into_head" if self.head_pools else "pool"
        parts = {name: copy.deepcopy(self.head_pool), **self.section(self.head, plan)._modules}
        return nn.Sequential(OrderedDict(parts))

    @property
    def head_pool(self) -> nn.Module:
        """What stands before the head: the pool, or nothing where the head does its own."""
        return nn.Identity() if self.head_pools else self.pool

    def check(self, example: Tensor) -> None:
        """Raise :class:`ConversionError` unless chain, pool and head reproduce the model."""
        model = self.original or self.model
        with evaluating(model, self.model), torch.no_grad():
            expected, found = model(example), self._in_parts(example)
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
            feature = self.head_pool(feature)
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
