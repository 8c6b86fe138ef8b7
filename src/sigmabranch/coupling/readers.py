"""Where the units of a group are last read: the place to see what they do."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sigmabranch.coupling.map import CouplingMap, Space

# Which dimension of its input a layer's columns read.
_READ_DIM = {nn.Linear: -1, nn.Conv1d: 1, nn.Conv2d: 1, nn.Conv3d: 1}


class Reader(NamedTuple):
    """A layer that reads a group: its path, the dimension it reads, and the unit per channel."""

    path: str
    dim: int
    unit_C: Tensor


def last_reader(model: nn.Module, coupling: CouplingMap, space: Space) -> Reader | None:
    """The last convolution or linear layer that reads all units of ``space``; None without one.

    What it is given must have one entry per input of the network, so that it can be measured.

    ``unit_C`` holds positions in ``space.units``.
    """
    for name, axis in reversed(space.tensors):
        path = name.rpartition(".")[0]
        module = model.get_submodule(path)
        dim = next((dim for kind, dim in _READ_DIM.items() if isinstance(module, kind)), None)
        reads = coupling.roles[name, axis] == "reads" and getattr(module, "groups", 1) == 1
        if dim is not None and reads and path in coupling.per_input:
            units = coupling.axes[name][axis]
            if bool(torch.isin(space.units, units).all() & torch.isin(units, space.units).all()):
                return Reader(path, dim, torch.searchsorted(space.units, units))
    return None
