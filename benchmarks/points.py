"""Claim: farthest-point sampling and ball queries need no extension to be no bottleneck.

Farthest points of a batch of clouds: this library's, the loop that PyTorch ports of PointNet++
hold (batched, one gather and one sum over the coordinates a step), the definition cloud by cloud,
and the extensions that are installed (fpsample; torch_cluster, which torch_geometric uses;
pytorch3d). Ball query: this library's against sorting all P positions, as those ports do. Where a
network trains here, the last rows say which share of its step the two take.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from benchmarks.harness import interleaved, parser, publish
from torch import Tensor

from sigmabranch.backbones import PointNet2Spec
from sigmabranch.points import ball_query, farthest_points, in_farthest_order, take_points


def ported_farthest(xyz: Tensor, count: int) -> Tensor:
    rows = torch.arange(len(xyz), device=xyz.device)
    chosen = torch.zeros(len(xyz), count, dtype=torch.int64, device=xyz.device)
    nearest, last = torch.full_like(xyz[..., 0], 1e10), chosen[:, 0]
    for step in range(count):
        chosen[:, step] = last
        distance = ((xyz - xyz[rows, last][:, None]) ** 2).sum(-1)
        nearest = torch.where(distance < nearest, distance, nearest)
        last = nearest.max(-1).indices
    return chosen


def one_by_one(xyz: Tensor, count: int) -> Tensor:
    return torch.cat([ported_farthest(cloud[None], count) for cloud in xyz])


def sorted_ball(xyz: Tensor, centre: Tensor, radius: float, count: int) -> Tensor:
    points = xyz.shape[1]
    distance = ((centre[:, :, None] - xyz[:, None]) ** 2).sum(-1)
    place = torch.arange(points, device=xyz.device).expand(distance.shape)
    place = place.masked_fill(distance > radius**2, points).sort(-1).values[..., :count]
    return torch.where(place == points, place[..., :1], place)


def extensions(xyz: Tensor, count: int) -> dict[str, Callable[[], object]]:
    """Whatever is installed of the compiled alternatives; each starts at its first point."""
    found: dict[str, Callable[[], object]] = {}
    if importlib.util.find_spec("fpsample") and xyz.device.type == "cpu":
        import fpsample  # noqa: PLC0415

        arrays = xyz.numpy()
        found["fpsample"] = lambda: [fpsample.fps_sampling(a, count, start_idx=0) for a in arrays]
    if importlib.util.find_spec("torch_cluster"):
        import torch_cluster  # noqa: PLC0415

        batch = torch.arange(len(xyz), device=xyz.device).repeat_interleave(xyz.shape[1])
        flat, ratio = xyz.flatten(0, 1), count / xyz.shape[1]
        found["torch_cluster"] = lambda: torch_cluster.fps(flat, batch, ratio, random_start=False)
    if importlib.util.find_spec("pytorch3d"):
        from pytorch3d.ops import sample_farthest_points  # noqa: PLC0415

        found["pytorch3d"] = lambda: sample_farthest_points(xyz, K=count)
    return found


def training_step(xyz: Tensor) -> Callable[[], None]:
    model = PointNet2Spec().build().to(xyz.device).train()
    y = torch.arange(len(xyz), device=xyz.device) % 40
    return lambda: F.cross_entropy(model(xyz), y).backward()


def main() -> None:
    options = parser(__doc__, "points", rounds=5)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--points", type=int, default=1024)
    options = options.parse_args()
    generator = torch.Generator().manual_seed(0)
    xyz = torch.randn(options.batch, options.points, 3, generator=generator).to(options.device)
    xyz = xyz / xyz.norm(dim=-1).amax(1)[:, None, None]
    count = options.points // 2
    expected = ported_farthest(xyz, count)
    assert torch.equal(farthest_points(xyz, count), expected)
    centre = take_points(xyz, expected)
    assert torch.equal(ball_query(xyz, centre, 0.2, 32), sorted_ball(xyz, centre, 0.2, 32))
    kinds = {
        "farthest points": {
            "sigmabranch": lambda: farthest_points(xyz, count),
            "ported loop": lambda: ported_farthest(xyz, count),
            "cloud by cloud": lambda: one_by_one(xyz, count),
            "check of the order": lambda: in_farthest_order(centre, count),
            **extensions(xyz, count),
        },
        "ball query": {
            "sigmabranch": lambda: ball_query(xyz, centre, 0.2, 32),
            "sorting": lambda: sorted_ball(xyz, centre, 0.2, 32),
        },
        "training step": {
            "sigmabranch": training_step(xyz),
            "its farthest points": lambda: farthest_points(xyz, 512),
            "its first ball query": lambda: ball_query(xyz, centre[:, :512], 0.2, 32),
        },
    }
    rows = []
    for what, systems in kinds.items():
        timings = interleaved(systems, options.rounds)
        for system in systems:
            rows.append(
                {
                    "what": what,
                    "system": system,
                    "ms": 1e3 * timings.median(system),
                    "points_per_second": xyz.shape[0] * xyz.shape[1] / timings.median(system),
                    "time_ratio": timings.ratio(system, to="sigmabranch"),
                }
            )
    publish(options, rows)


if __name__ == "__main__":
    main()
