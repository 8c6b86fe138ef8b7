"""Every path of a branched network against the dense network, from the input to the logits.

The expected logits are those of the dense network with zeros wherever the path's plans drop
something. The library checks every piece in a similar way when it cuts it; this check shares
nothing with that one but the plans, and sees how the pieces fit together.

Where channels are dropped under a layer norm or a mean over channels, the two must differ. To see
whether anything else differs, both run once more with these operations settled: replaced by ones to
which a channel of zeros is as good as none.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sigmabranch.backbones import Backbone, Levels
from sigmabranch.net import SigmaBranchNet
from sigmabranch.tree import NodeId, node_key

aten = torch.ops.aten
# By what settled means and norms divide, in place of the number of channels.
_COUNT = 64
# The most that rounding explains, far below any wrong channel.
ROUNDING = 1e-9


@torch.no_grad()
def path_errors(backbone: Backbone, net: SigmaBranchNet, inputs: Tensor) -> tuple[float, float]:
    """The largest error of a path's logits, relative to the largest logit: as it is, and settled.

    Args:
        backbone: the dense network.
        net: what was cut from it; its plans count, not its re-estimated norms.
        inputs: (B, ...).
    """
    found = []
    for leaf in net.tree.leaves:
        nodes = [leaf[:length] for length in range(1, len(leaf) + 1)]
        dense, path = masked(backbone, net, nodes), sliced(backbone, net, nodes)
        plain = settled = _error(path, dense, inputs)
        if not plain <= ROUNDING:  # what is exact has nothing to settle
            with Settled():
                settled = _error(path, dense, inputs)
        found.append(torch.stack([plain, settled]))
    # Not Python's maximum, which would drop a NaN.
    errors = torch.stack(found).amax(0)
    return float(errors[0]), float(errors[1])


def _error(path: nn.Module, dense: nn.Module, inputs: Tensor) -> Tensor:
    expected = dense(inputs.double())
    return (path(inputs.double()) - expected).abs().max() / expected.abs().max()


def masked(backbone: Backbone, net: SigmaBranchNet, nodes: Sequence[NodeId]) -> nn.Module:
    """The dense network in fp64, with zeros wherever the plans of ``nodes`` drop something."""
    levels = backbone.levels(net.tree.depth, net.tree.cuts)
    steps = [_zeroed(backbone, path, {}) for path in levels.trunk]
    for node in nodes:
        plan = net.plans[node]
        if plan.gather is not None:
            steps.append(Mute(plan.gather[0], net.record["nodes"][node_key(node)][0]["kept"]))
        steps += [_zeroed(backbone, path, plan.keep) for path in _paths(net, levels, node)]
    last = net.plans[nodes[-1]]
    steps += [backbone.head_pool, *(_zeroed(backbone, path, last.keep) for path in backbone.head)]
    return nn.Sequential(*steps).eval()


def _zeroed(backbone: Backbone, path: str, keep: Mapping[str, Mapping[int, Tensor]]) -> nn.Module:
    """A copy of the module at ``path``, with zeros wherever something is not kept."""
    module = copy.deepcopy(backbone.model.get_submodule(path)).double()
    for name, tensor in module.state_dict().items():
        for axis, kept in keep.get(f"{path}.{name}", {}).items():
            _zero(tensor, axis, kept)
    return module


class Mute(nn.Module):
    """Zeros but for some channels along ``dim``."""

    def __init__(self, dim: int, kept: Sequence[int]) -> None:
        super().__init__()
        self.dim, self.kept = dim, torch.tensor(kept)

    def forward(self, feature: Tensor) -> Tensor:
        """The same shape."""
        feature = feature.clone()
        _zero(feature, self.dim, self.kept)
        return feature


def _zero(tensor: Tensor, dim: int, kept: Tensor) -> None:
    """Zeros in place everywhere else along ``dim``."""
    gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
    gone[kept] = False
    tensor.index_fill_(dim, gone.nonzero().flatten(), 0)


def sliced(backbone: Backbone, net: SigmaBranchNet, nodes: Sequence[NodeId]) -> nn.Module:
    """Trunk, specializers and head of one path as the plans cut them, in fp64."""
    levels = backbone.levels(net.tree.depth, net.tree.cuts)
    parts = [backbone.section(levels.trunk)]
    parts += [backbone.specializer(_paths(net, levels, node), net.plans[node]) for node in nodes]
    parts.append(backbone.pooled_head(net.plans[nodes[-1]]))
    return nn.Sequential(*parts).double().eval()


def _paths(net: SigmaBranchNet, levels: Levels, node: NodeId) -> list[str]:
    """The modules of the dense network that a specializer is cut from."""
    return [path for level in net.tree.levels_of(node) for path in levels.levels[level - 1]]


class Settled(TorchDispatchMode):
    """Runs norms and means over channels as sums, which zeros do not change."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        settle = _SETTLED.get(func)
        return settle(*args, **kwargs or {}) if settle else func(*args, **kwargs or {})


def _layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    dims = tuple(range(-len(shape), 0))
    x = x / (x.square().sum(dims, keepdim=True) / _COUNT + eps).sqrt()
    x = x if weight is None else x * weight
    return x if bias is None else x + bias, x, x


def _rms_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, ...]:
    return _layer_norm(x, shape, weight, None, eps or 1e-6)[:2]


def _group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    batch: int,
    channels: int,
    size: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, ...]:
    grouped = x.reshape(batch, groups, -1)
    scale = (grouped.square().sum(2, keepdim=True) / size / _COUNT + eps).sqrt()
    x = (grouped / scale).reshape(x.shape)
    along = [1, channels, *[1] * (x.ndim - 2)]
    x = x if weight is None else x * weight.reshape(along)
    return x if bias is None else x + bias.reshape(along), x, x


def _convolution(x: Tensor, weight: Tensor, *others: Any, **more: Any) -> Tensor:
    if x.ndim == 3 and x.shape[1] == 1 == len(weight):  # a window that slides over channels
        weight = weight * (torch.arange(weight.shape[2]) == weight.shape[2] // 2)
    return aten.convolution.default(x, weight, *others, **more)


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    return x.sum(dim, keepdim=keepdim, **kwargs) / _COUNT


_SETTLED = {
    aten.native_layer_norm.default: _layer_norm,
    aten._fused_rms_norm.default: _rms_norm,
    aten.native_group_norm.default: _group_norm,
    aten.convolution.default: _convolution,
    aten.mean.dim: _mean,
    aten.mean.default: _mean,
}
