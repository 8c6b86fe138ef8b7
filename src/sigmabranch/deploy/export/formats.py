"""The formats, and the one way into all of them: write, run what was written, compare, publish."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sigmabranch import files
from sigmabranch.archive import MANIFEST
from sigmabranch.backbones import Backbone
from sigmabranch.deploy.export.check import LeafCheck, Written, check_leaves
from sigmabranch.deploy.export.staging import listing, staged
from sigmabranch.errors import ConfigError, DataError, MissingDependency
from sigmabranch.net import SigmaBranchNet

Writer: TypeAlias = Callable[[SigmaBranchNet, Path, Tensor], Written]

# Format → the module whose ``write`` makes it, and the extra with its packages; loaded on use.
_HOMES = {
    "pt2": ("pt2", "deploy"),
    "onnx": ("onnx_tree", "deploy"),
    "onnx-nodes": ("onnx_nodes", "deploy"),
    "executorch": ("executorch_tree", "executorch"),
    "litert": ("litert_nodes", "litert"),
}
FORMATS = tuple(_HOMES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """What was written, and how it compares.

    Attributes:
        format: one of :data:`FORMATS`.
        folder: where it is.
        files: file name → ``bytes`` and ``sha256``.
        checks: one per leaf, in the order of ``tree.leaves``.
    """

    format: str
    folder: Path
    files: Mapping[str, Mapping[str, Any]]
    checks: tuple[LeafCheck, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "format": self.format,
            "folder": str(self.folder),
            "files": {name: dict(entry) for name, entry in self.files.items()},
            "checks": [check.to_dict() for check in self.checks],
        }


def export_net(
    net: SigmaBranchNet | nn.Module | Backbone,
    folder: Path | str,
    example: Tensor,
    *,
    format: str,
    notes: Mapping[str, Any] | None = None,
) -> Export:
    """Write the hard path at batch 1 for another runtime, and prove that it says the same.

    Every leaf is compared: on the inputs that the exported routers send there, and on a few that
    are forced there. Only then do the files get their names.

    Args:
        net: branched, or a single path, or a dense network; left as it is.
        folder: receives the files; created if absent.
        example: (N, ...) float32 inputs as the network takes them, N at least 1. Their shape is
            the only one that the export accepts, one at a time.
        format: ``"pt2"`` (torch.export, nested ``torch.cond``), ``"onnx"`` (one graph with nested
            ``If`` and one file of weights), ``"onnx-nodes"`` (a graph and a file of weights per
            node, and a manifest), ``"executorch"`` (one program, a file of weights per node, and a
            manifest) or ``"litert"`` (a model per node, channel-last, and a manifest).
        notes: anything JSON-able to keep in the manifest, such as the task.

    Raises:
        ConfigError: an unknown format.
        DataError: no example.
        MissingDependency: the format's packages are not installed.
        UnsupportedOperation: the network does something that the format cannot say.
        ConversionError: what was written says something else than the network.
        CheckpointError: the folder cannot be written, or holds something else.
    """
    if not len(example):
        raise DataError("an export needs at least one example input")
    write = _writer(format)
    if not isinstance(net, SigmaBranchNet):
        net = SigmaBranchNet.unbranched(net, example[:1])
    copied = copy.deepcopy(net).cpu().eval()
    example = example.detach().cpu().contiguous()
    with torch.no_grad(), staged(folder) as stage:
        written = write(copied, stage, example[:1])
        checks = check_leaves(copied, written, example)
        manifest = stage / MANIFEST
        if manifest.exists():
            described = files.read_json(manifest)
        else:
            described = {"format": f"sigmabranch-{format}", "schema": 1, "files": listing(stage)}
        files.write_json(manifest, described | ({"notes": dict(notes)} if notes else {}))
        listed = listing(stage)
    return Export(format=format, folder=Path(folder), files=listed, checks=checks)


def check_format(format: str) -> None:
    """Refuse a format that cannot be written, before anything is read for it.

    Raises:
        ConfigError: an unknown one.
        MissingDependency: its packages are not installed.
    """
    _writer(format)


def _writer(format: str) -> Writer:
    if format not in _HOMES:
        raise ConfigError(f"unknown format {format!r}: choose from {', '.join(FORMATS)}")
    home, extra = _HOMES[format]
    try:
        return importlib.import_module(f"{__package__}.{home}").write
    except ModuleNotFoundError as error:
        raise MissingDependency(error.name or extra, extra, f"The format {format}") from error
