"""A process that fine-tunes a tiny branched network; run by the resume tests, never imported.

It prints one JSON object: whether the run is complete, and the weights and curve to compare.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from sigmabranch.data import Share, own_rows
from sigmabranch.net import SigmaBranchNet
from sigmabranch.routing import Router
from sigmabranch.training import (
    BranchedObjective,
    FabricEngine,
    FinetuneRecipe,
    RoutedObjective,
    fit,
    loop,
)
from sigmabranch.tree import TreeSpec

CLASSES, PIXELS, SAMPLES = 5, 6, 91


def tiny_net(*, dropout: float, norm: bool) -> SigmaBranchNet:
    tree = TreeSpec(projection_dim=4, projection_dropout=dropout)

    def stage(inputs: int) -> nn.Module:
        conv = nn.Conv2d(inputs, 8, 3, padding=1)
        return nn.Sequential(conv, nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU())

    def pool() -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    return SigmaBranchNet(
        tree=tree,
        trunk=stage(1),
        specializers={node: stage(8) for node in tree.specializers},
        routers={node: Router(8, pool(), tree) for node in tree.inner},
        heads={leaf: nn.Sequential(pool(), nn.Linear(8, CLASSES)) for leaf in tree.leaves},
        plans={},
        source=None,
        record={},
    )


class Shuffled:
    """Each epoch's order is drawn from its number; the last batch is small and uneven."""

    identity: ClassVar = {}

    def __init__(self, batch_size: int, engine: FabricEngine, pause: float) -> None:
        draw = torch.Generator().manual_seed(0)
        self.y = torch.arange(SAMPLES) % CLASSES
        self.x = (
            torch.randn(SAMPLES, 1, PIXELS, PIXELS, generator=draw) + self.y[:, None, None, None]
        )
        self.batch_size, self.engine, self.pause = batch_size, engine, pause

    def __len__(self) -> int:
        return math.ceil(SAMPLES / self.batch_size)

    def epoch(self, number: int, start: int = 0):
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(number))
        for step in range(start, len(self)):
            time.sleep(self.pause)
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            mine = own_rows(batch, self.engine.rank, self.engine.world_size)
            yield Share(self.x[mine], self.y[mine], len(batch))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--no-norm", action="store_true")
    parser.add_argument("--upcycle", type=float, default=0.0)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--accumulate", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    loop.CHECKPOINT_SECONDS = 0.02
    engine = FabricEngine("cpu")
    net = tiny_net(dropout=args.dropout, norm=not args.no_norm)
    recipe = FinetuneRecipe(
        epochs=4,
        batch_size=8,
        lr=0.05,
        warmup_epochs=1,
        clip_norm=5.0,
        ema_decay=0.9,
        balance_weight=0.2,
        node_grad_scale=True,
        resp_weight_end=0.0,
        upcycle=args.upcycle,
    )
    objective = RoutedObjective(recipe, None, 4) if args.upcycle else BranchedObjective(recipe)
    result = fit(
        net,
        objective,
        Shuffled(8, engine, args.pause),
        recipe,
        folder=args.folder,
        engine=engine,
        accumulate=args.accumulate,
    )
    if engine.is_main:
        flat = torch.cat([p.detach().flatten() for p in net.parameters()])
        states = [tensor.numpy().tobytes() for tensor in net.state_dict().values()]
        curve = [{k: v for k, v in row.items() if k != "seconds"} for row in result.history]
        print(
            json.dumps(
                {
                    "complete": result.complete,
                    "reason": result.reason,
                    "digest": hashlib.sha256(b"".join(states)).hexdigest(),
                    "weights": flat.tolist(),
                    "curve": curve,
                }
            )
        )


main()
