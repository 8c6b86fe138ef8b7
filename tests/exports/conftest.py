"""Networks of a few thousand weights, for runtimes that take seconds to write one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pairs import Paired, Value
from sigmabranch.backbones import GlobalAveragePool
from sigmabranch.net import SigmaBranchNet
from sigmabranch.points import farthest_points, take_points
from sigmabranch.routing import Router
from sigmabranch.tree import TreeSpec

UNEVEN = TreeSpec(leaves=((0,), (1, 0), (1, 1)), projection_dim=4)
WIDTH, CLASSES = 64, 5


def block(inputs: int, width: int) -> nn.Module:
    conv = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


def branched(tree: TreeSpec, trunk: nn.Module, width: int, part=block, pool=GlobalAveragePool):
    """One part a node, between a trunk of that width and linear heads."""
    net = SigmaBranchNet(
        tree=tree,
        trunk=trunk,
        specializers={node: part(width, width) for node in tree.specializers},
        routers={node: Router(width, pool(), tree) for node in tree.inner},
        heads={leaf: nn.Sequential(pool(), nn.Linear(width, CLASSES)) for leaf in tree.leaves},
        plans={},
        source=None,
        record={},
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval()


@torch.no_grad()
def halve(net: SigmaBranchNet, x: Tensor) -> SigmaBranchNet:
    """Set the gates so that each node sends half of what it gets either way."""
    for number, node in enumerate(net.tree.inner):
        here = torch.isin(net.hard(x).leaf, torch.tensor(net.tree.leaves_under(node)))
        log_prob_BK = net.soft(x[here]).branch_log_prob[:, number]
        net.router(node).gate.bias[0] -= log_prob_BK.diff().neg().median() - 1e-3
    return net


class Sampled(nn.Module):
    def forward(self, cloud: Tensor) -> Tensor:
        return take_points(cloud, farthest_points(cloud, 4)).flatten(1)


@pytest.fixture(scope="session")
def x() -> Tensor:
    return torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def net(x) -> SigmaBranchNet:
    """Three leaves at two depths, norms whose folding changes the weights."""
    torch.manual_seed(0)
    return halve(branched(UNEVEN, nn.Sequential(block(3, WIDTH)), WIDTH), x)


@pytest.fixture(scope="session")
def equal_siblings(x) -> SigmaBranchNet:
    """Two leaves that hold the same values, as before any training."""
    torch.manual_seed(0)
    tree = TreeSpec.balanced(1, projection_dim=4)
    net = branched(tree, nn.Sequential(block(3, WIDTH)), WIDTH)
    net.specializer((1,)).load_state_dict(net.specializer((0,)).state_dict())
    net.head((1,)).load_state_dict(net.head((0,)).state_dict())
    return halve(net, x)


@pytest.fixture(scope="session")
def early() -> tuple[SigmaBranchNet, Tensor]:
    """A network that decides at the trunk's end, with features of two tensors; and inputs."""
    torch.manual_seed(0)
    tree = TreeSpec.balanced(1, projection_dim=4, decide_after="1")
    trunk = nn.Sequential(Paired(5, 8), Paired(8, 8))
    net, x = branched(tree, trunk, 8, part=Paired, pool=Value), torch.randn(8, 5)
    return halve(net, x), x


@pytest.fixture(scope="session")
def sampled() -> SigmaBranchNet:
    """A network with an operation of this library's own."""
    tree = TreeSpec.balanced(1, projection_dim=4)
    return branched(tree, Sampled(), 12, part=nn.Linear, pool=nn.Identity)
