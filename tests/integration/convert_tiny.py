"""Converts and measures a small network, alone or under a launcher; run by tests, never imported.

Every process writes one JSON file into the given folder: what it decided and what it measured.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import nn

from sigmabranch import ConversionSpec, TreeSpec, convert, evaluate, evaluate_dense
from sigmabranch.backbones import ResNet, ResNetSpec
from sigmabranch.training import FabricEngine

CLASSES = 5


def dense() -> nn.Module:
    torch.manual_seed(0)
    net = ResNet(
        ResNetSpec(
            layers=(1, 1, 1),
            planes=(4, 6, 8),
            strides=(1, 2, 1),
            stem="cifar",
            stem_width=8,
            in_channels=1,
            classes=CLASSES,
        )
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
    return net.eval()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Five batches, the last smaller: an odd number and an uneven end."""
    y = torch.arange(150) % CLASSES
    centre = torch.randn(CLASSES, 1, 8, 8)
    x = centre[y] + torch.randn(150, 1, 8, 8)
    return list(zip(x.split(32), y.split(32), strict=True))


def main() -> None:
    torch.set_num_threads(1)
    engine = FabricEngine("cpu")
    model, data = dense(), batches()
    told = {}
    for clusters in ("latents", "classes"):
        spec = ConversionSpec(clusters=clusters, samples=140, norm_samples=50, restarts=3)
        net = convert(model, data, TreeSpec(projection_dim=8), spec=spec, shards=engine.shards)
        state = b"".join(tensor.numpy().tobytes() for tensor in net.state_dict().values())
        told[clusters] = {
            "record": net.record,
            "digest": hashlib.sha256(state).hexdigest(),
            "statistics": torch.cat([b.flatten().double() for b in net.buffers()]).tolist(),
            "evaluation": evaluate(net, data, shards=engine.shards),
        }
    told["dense"] = evaluate_dense(model, data, shards=engine.shards)
    (Path(sys.argv[1]) / f"{engine.rank}.json").write_text(json.dumps(told))


main()
