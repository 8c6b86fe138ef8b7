"""Claim: finding where a network may be cut and what belongs together takes seconds at full size.

Each network of timm, untrained, at its own input size: its forward is followed, its channels are
traced, and one input passes through it, in turn.

    python -m benchmarks.tracing
    python -m benchmarks.tracing --models resnet50 convnext_tiny
"""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.harness import interleaved, parser, publish

from sigmabranch.backbones import as_backbone
from sigmabranch.backbones.timm import create_timm
from sigmabranch.coupling import trace

MODELS = ("resnet50", "convnext_tiny", "vit_base_patch16_224", "swin_tiny_patch4_window7_224")


@torch.no_grad()
def measured(name: str, rounds: int) -> dict[str, Any]:
    model = create_timm(name).eval()
    example = torch.zeros(1, *model.pretrained_cfg["input_size"])
    backbone = as_backbone(model, example)
    timings = interleaved(
        {
            "follow": lambda: as_backbone(model, example),
            "trace": lambda: trace(backbone.model, example, watch=backbone.chain),
            "input": lambda: model(example),
        },
        rounds,
    )
    return {
        "model": name,
        "input": "x".join(map(str, example.shape[1:])),
        "places to cut": len(backbone.chain),
        "follow_s": timings.median("follow"),
        "trace_s": timings.median("trace"),
        "input_s": timings.median("input"),
        "trace_over_input": timings.ratio("trace", to="input"),
    }


def main() -> None:
    options = parser(__doc__, "tracing", rounds=3)
    options.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    chosen = options.parse_args()
    publish(chosen, [measured(name, chosen.rounds) for name in chosen.models])


if __name__ == "__main__":
    main()
