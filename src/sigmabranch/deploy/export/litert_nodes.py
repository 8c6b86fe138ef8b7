"""``root.tflite``, ``0.tflite``, ``0-1.tflite``, …: one LiteRT model per node.

Images and features of images are channel-last at every boundary: (1, height, width, channels), the
layout in which LiteRT computes.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import litert_torch
import torch
from ai_edge_litert.interpreter import Interpreter
from torch import Tensor, nn

from sigmabranch.deploy.export.check import Run, Written
from sigmabranch.deploy.export.nodes import Part, Walk, node_parts, write_manifest
from sigmabranch.errors import UnsupportedOperation
from sigmabranch.net import SigmaBranchNet
from sigmabranch.tree import NodeId

FORMAT = "sigmabranch-litert"


class ChannelLast(nn.Module):
    """A function of flat tensors with its images and features of images channel-last."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What the function gives, channel-last."""
        outputs = self.function(*map(channel_first, tensors))
        return tuple(map(channel_last, outputs))


def channel_last(tensor: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H, W, C); any other number of axes as it is."""
    return tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor


def channel_first(tensor: Tensor) -> Tensor:
    """(B, H, W, C) → (B, C, H, W); any other number of axes as it is."""
    return tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor


def write(net: SigmaBranchNet, folder: Path, sample: Tensor) -> Written:
    """Write all nodes for inputs of the shape of ``sample`` (1, ...), and the manifest last.

    Raises:
        UnsupportedOperation: LiteRT has no word for an operation.
    """
    nodes = {part.key: _write_part(part, folder) for part in node_parts(net, sample)}
    write_manifest(net, folder, sample, format=FORMAT, nodes=nodes, arrange=channel_last)
    walk = Walk(net, _Interpreters(folder, nodes))

    def written(leaf: NodeId | None) -> Run:
        run = walk(leaf)
        return lambda sample: run(channel_last(sample))

    return written


def _write_part(part: Part, folder: Path) -> dict[str, Any]:
    """Its entry in the manifest."""
    inputs = tuple(channel_last(tensor).contiguous() for tensor in part.inputs)
    name = f"{part.key}.tflite"
    # The converter remarks on its own code, and prints its progress where a result may be expected.
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            litert_torch.convert(ChannelLast(part.function.folded()), inputs).export(
                str(folder / name)
            )
        except RuntimeError as error:
            reason = next(line for line in str(error).splitlines() if line.strip())
            raise UnsupportedOperation(f"LiteRT cannot say this network: {reason}") from error
    return {"file": name, "inputs": list(part.input_names), "outputs": list(part.outputs)}


class _Interpreters:
    """The written files, to be run by key."""

    def __init__(self, folder: Path, nodes: Mapping[str, Mapping[str, Any]]) -> None:
        self.interpreters = {
            key: Interpreter(str(folder / node["file"]), num_threads=1)
            for key, node in nodes.items()
        }

    def __call__(self, key: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        run = self.interpreters[key].get_signature_runner()
        names = [f"args_{number}" for number in range(len(tensors))]
        outputs = run(**{n: t.numpy() for n, t in zip(names, tensors, strict=True)})
        ordered = sorted(outputs, key=lambda name: int(name.removeprefix("output_")))
        return [torch.from_numpy(outputs[name]) for name in ordered]
