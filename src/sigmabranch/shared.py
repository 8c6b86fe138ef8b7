"""What siblings share: tensors that are one for all children of a node.

A tied layer makes its first channels with filters that all siblings share, and the rest with its
own. The outputs are put side by side, so that no weights are assembled when it runs. Shared filters
read all of a layer's input, so all siblings hold the same channels of the dense network.

Where layers are shared as a whole, each sibling adds a product of two thin layers of its own (a
delta of low rank: Hu et al., 2022), which is nothing at first; norms stay its own.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigmabranch.errors import ConversionError
from sigmabranch.tree import NodeId, TreeSpec, node_key

_CONVOLUTIONS = {nn.Conv1d: -2, nn.Conv2d: -3, nn.Conv3d: -4}  # and where their channels lie
_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.LayerNorm, nn.GroupNorm),
)


class Sibling(nn.Module):
    """A layer that uses a module of its siblings.

    It does not own that module: a network holds each one once, under the siblings' parent.

    Attributes:
        shared: what all siblings use.
    """

    shared: nn.Module

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.__dict__["shared"] = shared  # past nn.Module, which would make it a part of this


class TiedLayer(Sibling):
    """A convolution or linear layer, some of whose output channels are its siblings', too.

    Args:
        shared: makes the first channels.
        own: makes the rest; None if there is none.
        dim: of the channels.
        split: how many input channels the shared groups read; None where every filter reads all.
    """

    def __init__(
        self, shared: nn.Module, own: nn.Module | None, dim: int, split: int | None
    ) -> None:
        super().__init__(shared)
        self.own, self.dim, self.split = own, dim, split

    def forward(self, x: Tensor) -> Tensor:
        """As the whole layer."""
        if self.own is None:
            return self.shared(x)
        first = rest = x
        if self.split is not None:
            first, rest = x.tensor_split([self.split], dim=self.dim)
        return torch.cat([self.shared(first), self.own(rest)], dim=self.dim)


class DeltaLayer(Sibling):
    """A convolution or linear layer that all siblings share, and what this one adds to it.

    Args:
        shared: the whole layer.
        down: what this one reads, in few channels.
        up: from those to all output channels.
    """

    def __init__(self, shared: nn.Module, down: nn.Module, up: nn.Module) -> None:
        super().__init__(shared)
        self.down, self.up = down, up

    def forward(self, x: Tensor) -> Tensor:
        """As the whole layer."""
        return self.shared(x) + self.up(self.down(x))


class Affine(nn.Module):
    """Scales, and shifts if there are any: (C,) each."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)


class TiedNorm(Sibling):
    """A norm, some of whose scales and shifts are its siblings'; its statistics are its own.

    Args:
        shared: the scales and shifts of the first channels.
        own: those of the rest; None if there is none.
        norm: all channels' norm without scales and shifts.
    """

    def __init__(self, shared: Affine, own: Affine | None, norm: nn.Module) -> None:
        super().__init__(shared)
        self.own, self.norm = own, norm

    def forward(self, x: Tensor) -> Tensor:
        """As the whole norm."""
        parts = [self.shared] if self.own is None else [self.shared, self.own]
        joined: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in parts])
            for name, _ in self.shared.named_parameters()
        }
        weight, bias, norm = joined["weight"], joined.get("bias"), self.norm
        if isinstance(norm, nn.LayerNorm):
            return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)
        if isinstance(norm, nn.GroupNorm):
            return F.group_norm(x, norm.num_groups, weight, bias, norm.eps)
        mean, variance = norm.running_mean, norm.running_var
        if not norm.training and isinstance(mean, Tensor) and isinstance(variance, Tensor):
            return F.batch_norm(x, mean, variance, weight, bias, eps=float(norm.eps))  # type: ignore[arg-type]
        # Not put into the norm itself, which other threads may be running.
        whole = copy.copy(norm)
        whole._parameters = {**norm._parameters, **joined}
        return whole(x)


def tie(
    tree: TreeSpec, specializers: Mapping[NodeId, nn.Module], heads: Mapping[NodeId, nn.Module]
) -> dict[NodeId, nn.ModuleDict]:
    """Make siblings share what ``tree`` says, in place.

    What is shared becomes the mean of the siblings' values, which are equal unless a norm was
    fitted to each one's samples. Works on the meta device, too.

    Returns:
        Inner node → what its children share, by the layers' paths in them; empty if the tree shares
        nothing.

    Raises:
        ConversionError: the children of a node have no layer that can be shared.
    """
    return {node: _tie_children(tree, node, specializers, heads) for node in tree.sharing}


def _tie_children(
    tree: TreeSpec,
    node: NodeId,
    specializers: Mapping[NodeId, nn.Module],
    heads: Mapping[NodeId, nn.Module],
) -> nn.ModuleDict:
    children = tree.children(node)
    parts = {"": [specializers[child] for child in children]}
    if tree.delta and all(child in heads for child in children):
        parts["head-"] = [heads[child] for child in children]
    shared: dict[str, nn.Module] = {}
    for prefix, siblings in parts.items():
        for path, layers in _common_layers(siblings):
            made = _with_deltas(layers, tree.delta) if tree.delta else _tied(layers, tree.tied)
            if made:
                shared[prefix + path.replace(".", "-")] = made[0].shared
                for sibling, layer in zip(siblings, made, strict=True):
                    sibling.set_submodule(path, layer)
    if not shared:
        setting = f"delta={tree.delta}" if tree.delta else f"tied={tree.tied}"
        raise ConversionError(
            f"tree {setting} leaves the children of {node_key(node)} nothing to share: "
            f"{'lower' if tree.delta else 'raise'} it, or set it to 0"
        )
    return nn.ModuleDict(shared)


def _common_layers(siblings: Sequence[nn.Module]) -> Iterator[tuple[str, list[Any]]]:
    """The layers that can be shared and that all siblings have, by their path.

    A leaf above the last level runs layers that its siblings lack. A layer that runs twice, or
    whose tensors another one uses too, stays whole.
    """
    first = siblings[0]
    uses = Counter(
        id(parameter)
        for module in first.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    places = Counter(id(module) for _, module in first.named_modules(remove_duplicate=False))
    for path, module in list(first.named_modules()):
        if type(module) not in (*_CONVOLUTIONS, nn.Linear, *_NORMS):
            continue
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        if not own or places[id(module)] > 1 or any(uses[id(parameter)] > 1 for parameter in own):
            continue
        found = [dict(sibling.named_modules()).get(path) for sibling in siblings]
        if all(type(other) is type(module) for other in found):
            yield path, found


def _with_deltas(layers: Sequence[Any], rank: int) -> list[Sibling]:
    """Siblings' layers as one with deltas; none where those would be no smaller than the layer."""
    if isinstance(layers[0], _NORMS):
        return []
    thin = [_thin(layer, rank) for layer in layers]
    if sum(part.weight.numel() for part in thin[0]) >= layers[0].weight.numel():
        return []
    shared = _mean_of([_filters(layer, 0, len(layer.weight)) for layer in layers])
    return [DeltaLayer(shared, down, up) for down, up in thin]


def _thin(layer: Any, rank: int) -> tuple[Any, Any]:
    """Two layers in a row that read and give what ``layer`` does, through so many channels."""
    weight, kind = layer.weight, type(layer)
    # Drawn on the CPU, so that it is the same for every device.
    drawn_on = "meta" if weight.is_meta else "cpu"
    where = {"bias": False, "device": drawn_on, "dtype": weight.dtype}
    if isinstance(layer, nn.Linear):
        down: Any = nn.Linear(layer.in_features, rank, **where)
        up: Any = nn.Linear(rank, layer.out_features, **where)
    else:
        names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        form = {name: getattr(layer, name) for name in names}
        down = kind(layer.in_channels, rank, **form, **where)
        up = kind(rank, layer.out_channels, 1, **where)
    nn.init.zeros_(up.weight)
    for part in (down, up):
        part.to(weight.device).requires_grad_(weight.requires_grad)
    return down, up


def _tied(layers: Sequence[Any], share: float) -> list[TiedLayer] | list[TiedNorm]:
    """Siblings' layers with a share of their channels tied; none where rounding leaves none."""
    if isinstance(layers[0], _NORMS):
        return _tied_norms(layers, share)
    groups = getattr(layers[0], "groups", 1)
    channels = len(layers[0].weight)
    # Filters of a group read the same channels: they stay together.
    count = round(share * channels) if groups == 1 else round(share * groups) * channels // groups
    if not count:
        return []
    shared = _mean_of([_filters(layer, 0, count) for layer in layers])
    split = None if groups == 1 else layers[0].in_channels * count // channels
    return [
        TiedLayer(
            shared,
            _filters(layer, count, channels) if count < channels else None,
            _CONVOLUTIONS.get(type(layer), -1),
            split,
        )
        for layer in layers
    ]


def _filters(layer: Any, start: int, stop: int) -> Any:
    """A convolution or linear layer with the filters ``start`` to ``stop`` alone."""
    part, whole = copy.copy(layer), len(layer.weight)
    part._parameters = _rows(layer, start, stop)
    if isinstance(layer, nn.Linear):
        part.out_features = stop - start
        return part
    part.out_channels = stop - start
    if layer.groups > 1:
        part.groups = layer.groups * (stop - start) // whole
        part.in_channels = layer.in_channels * (stop - start) // whole
    return part


def _tied_norms(norms: Sequence[Any], share: float) -> list[TiedNorm]:
    channels = len(norms[0].weight)
    count = round(share * channels)
    if not count or norms[0].weight.ndim > 1:
        return []
    shared = _mean_of([Affine(_rows(norm, 0, count)) for norm in norms])
    tied = []
    for norm in norms:
        own = Affine(_rows(norm, count, channels)) if count < channels else None
        bare = copy.copy(norm)
        bare._parameters = dict.fromkeys(norm._parameters)
        tied.append(TiedNorm(shared, own, bare))
    return tied


def _rows(layer: nn.Module, start: int, stop: int) -> MutableMapping[str, Any]:
    """The layer's parameters for some of its channels; what it lacks stays None."""
    return {
        name: None
        if tensor is None
        else nn.Parameter(tensor.detach()[start:stop].clone(), requires_grad=tensor.requires_grad)
        for name, tensor in layer._parameters.items()
    }


@torch.no_grad()
def _mean_of(parts: Sequence[Any]) -> Any:
    """The first of the parts with the mean of all their values; exact where they are equal."""
    for tensor, *others in zip(*(part.parameters() for part in parts), strict=True):
        tensor.add_(sum((other - tensor for other in others), 0 * tensor) / len(parts))
    return parts[0]


# -- on a device ---------------------------------------------------------------------------------


def with_shared(module: nn.Module) -> nn.Module:
    """The module, in place, with everything that it uses of its siblings as a part of itself."""
    for part in list(module.modules()):
        if isinstance(part, Sibling) and "shared" in part.__dict__:
            part.add_module("shared", part.__dict__.pop("shared"))
    return module


def shared_tensors(module: nn.Module) -> set[str]:
    """Names of the tensors of a module after :func:`with_shared` that are its siblings', too."""
    return {
        f"{path}.shared.{name}" if path else f"shared.{name}"
        for path, part in module.named_modules()
        if isinstance(part, Sibling)
        for name in part.shared.state_dict()
    }
