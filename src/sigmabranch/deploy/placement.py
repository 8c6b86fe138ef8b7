"""Which nodes can do with four bits: those that are seldom used, or hardly mind.

Nodes exchange float features, so a node in eight bits can be replaced by itself in four without
touching the others.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sigmabranch import files
from sigmabranch.archive import MANIFEST
from sigmabranch.deploy.export.staging import listing, staged
from sigmabranch.deploy.onnx_path import OnnxPath, read_nodes
from sigmabranch.errors import ConfigError


def place_bits(
    eight: Path | str, four: Path | str, samples: Tensor, *, total: int
) -> dict[str, int]:
    """Bits of each node so that all nodes together take at most ``total`` bytes.

    A node's harm is how far its four bits move the answers, the divergence in nats averaged over
    all samples: how often it is used times how sensitive it is. Nodes give up their bits in the
    order of harm per byte saved, until the rest fits.

    Args:
        eight, four: folders of the same network's nodes in eight and in four bits.
        samples: (N, ...) float32 inputs.
        total: of all files.

    Returns:
        Node key → 8 or 4.

    Raises:
        ConfigError: four bits everywhere take more than ``total``; the message names how much.
    """
    large, small = _sizes(Path(eight)), _sizes(Path(four))
    if sum(small.values()) > total:
        raise ConfigError(
            f"{total} bytes are too few: in four bits the nodes take {sum(small.values())}"
        )
    bits = dict.fromkeys(large, 8)
    if sum(large.values()) <= total:
        return bits
    harm = _harm(Path(eight), Path(four), samples)
    order = sorted(large, key=lambda key: harm[key] / max(large[key] - small[key], 1))
    for key in order:
        taken = sum(large[key] if bits[key] == 8 else small[key] for key in bits)
        if taken > total:
            bits[key] = 4
    return bits


def mix_nodes(
    folders: Mapping[int, Path | str], bits: Mapping[str, int], out: Path | str
) -> dict[str, Any]:
    """Write a folder of nodes of which each comes from the folder of its bits.

    Args:
        folders: bits → folder of all nodes in so many.
        bits: node key → bits.
        out: another folder.

    Returns:
        The new manifest, whose ``bits`` are ``bits``.

    Raises:
        CheckpointError: no such folders, or ``out`` cannot be written or holds something else.
    """
    manifests = {count: read_nodes(Path(folder)) for count, folder in folders.items()}
    with staged(out) as stage:
        for key, count in bits.items():
            for name in _files(manifests[count], key):
                shutil.copyfile(Path(folders[count]) / name, stage / name)
        manifest = {**manifests[max(folders)], "bits": dict(bits), "files": listing(stage)}
        files.write_json(stage / MANIFEST, manifest)
    return manifest


def _harm(eight: Path, four: Path, samples: Tensor) -> dict[str, float]:
    """How far four bits in one node alone move the answers."""
    expected, keys = _answers(eight, samples), [*read_nodes(eight)["nodes"]]
    harm = {}
    for key in keys:
        bits = {**dict.fromkeys(keys, 8), key: 4}
        with tempfile.TemporaryDirectory() as folder:
            mix_nodes({8: eight, 4: four}, bits, folder)
            found = _answers(Path(folder), samples)
        harm[key] = float(F.kl_div(found, expected, reduction="batchmean", log_target=True))
    return harm


def _answers(folder: Path, samples: Tensor) -> Tensor:
    """log p of each sample: (N, V)."""
    with OnnxPath(folder) as path:
        logits = [path.predict(sample).logits for sample in samples.split(1)]
    return torch.stack(logits).log_softmax(1)


def _sizes(folder: Path) -> dict[str, int]:
    manifest = read_nodes(folder)
    return {
        key: sum(manifest["files"][name]["bytes"] for name in _files(manifest, key))
        for key in manifest["nodes"]
    }


def _files(manifest: Mapping[str, Any], key: str) -> list[str]:
    graph = manifest["nodes"][key]["file"]
    return [name for name in (graph, f"{graph}.data") if name in manifest["files"]]
