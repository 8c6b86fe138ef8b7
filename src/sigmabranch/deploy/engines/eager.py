"""PyTorch without compilation: works wherever the network's own code does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import functional_call

from sigmabranch.deploy.blocks import Node
from sigmabranch.deploy.segment import Segment


class EagerEngine:
    """Runs the network's own modules, which hold no weights, on those that have arrived.

    Args:
        nodes: their modules, on the meta device.
    """

    #: A block runs as soon as it is there.
    whole_nodes: ClassVar[bool] = False

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._blocks = {
            (node.key, block.name): (block.module, tuple(block.reads()))
            for node in nodes
            for block in node.blocks
        }

    def run(self, segment: Segment, tensors: Mapping[str, Tensor], feature: Any) -> Any:
        """Feature → feature, logits or log p, as the segment's blocks compute it."""
        with torch.inference_mode():
            for name in segment.names:
                module, read = self._blocks[segment.node, name]
                feature = functional_call(module, {key: tensors[key] for key in read}, (feature,))
        return feature
