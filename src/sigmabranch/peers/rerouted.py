"""What the routers are worth: the branched network with its inputs sent elsewhere.

Shapes: B batch, C channels, D latent length, K branches, L leaves, N samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigmabranch.conversion import class_targets
from sigmabranch.errors import ConfigError
from sigmabranch.net import Choice, SigmaBranchNet, SoftOutput
from sigmabranch.peers.bench import Bench
from sigmabranch.peers.system import System, Trained
from sigmabranch.routing import Router, stacked
from sigmabranch.tasks import Task
from sigmabranch.tasks.counting import sketch
from sigmabranch.training import BranchedObjective, FinetuneRecipe
from sigmabranch.tree import NodeId, node_key

# Features are compared in steps so coarse that rounding hardly ever moves one across an edge.
_STEPS = 16.0
# log p of a branch not taken: its probability underflows, its product with 0 does not.
_NEVER = -1e4

_RULES = {
    "random": "each input to a leaf drawn at random: the mean of all leaves",
    "shuffled": "the routes, dealt out anew among the inputs",
    "class": "the leaf that suits the input's class best on training data",
    "oracle": "any leaf that happens to be right",
}


@dataclass(frozen=True, kw_only=True)
class Rerouted(System):
    """The trained leaves under another rule; nothing is trained anew.

    Attributes:
        rule: ``"random"``, ``"shuffled"``, ``"class"``, ``"oracle"``, or a leaf's number.
    """

    name: ClassVar[str] = "rerouted"
    summary: ClassVar[str] = "the trained leaves under another routing rule"

    rule: str = "random"

    def __post_init__(self) -> None:
        if self.rule not in _RULES and not self.rule.isdecimal():
            raise ConfigError(
                f"unknown routing rule {self.rule!r}: choose {', '.join(_RULES)} or a leaf's number"
            )

    def check(self, task: Task) -> None:
        """The tree must fit the network and have that leaf."""
        if self.rule.isdecimal() and int(self.rule) >= len(task.tree.leaves):
            last = len(task.tree.leaves) - 1
            raise ConfigError(f"there is no leaf {self.rule}: choose from 0 to {last}")
        sketch(task)

    def sketch(self, task: Task) -> nn.Module:
        """The branched network."""
        return sketch(task)[1]

    def run(self, bench: Bench) -> Trained:
        """Read the figures off the branched network's evaluations."""
        measured = bench.chain.measured()
        evaluations = {"test": measured["branched"]}
        if "held_out" in measured:
            evaluations["held-out"] = measured["held_out"]["branched"]
        return Trained(
            network=bench.chain.branched(),
            recipe=bench.recipe,
            epochs=bench.epochs,
            accuracy={split: self._figures(found) for split, found in evaluations.items()},
            notes={"rule": _RULES.get(self.rule, f"always leaf {self.rule}")},
        )

    def _figures(self, evaluation: Mapping[str, Any]) -> dict[str, Any]:
        top1 = {
            "random": evaluation["mean_leaf"],
            "shuffled": evaluation["shuffled_routes"],
            "class": evaluation["leaf_by_class"],
            "oracle": evaluation["oracle_leaf"],
        }.get(self.rule)
        if top1 is None:
            top1 = evaluation["always_leaf"][int(self.rule)]
        return {"samples": evaluation["samples"], "top1": top1}


@dataclass(frozen=True, kw_only=True)
class HashRouting(System):
    """The same tree with routers that know nothing: a fixed hash of the feature picks the branch.

    Trained as the branched network is, with hard routes; there is no router to train.
    """

    name: ClassVar[str] = "hash-routing"
    summary: ClassVar[str] = "the same tree, routed by a hash of the input"

    def check(self, task: Task) -> None:
        """The tree must fit the network."""
        sketch(task)

    def sketch(self, task: Task) -> nn.Module:
        """The branched network with hashes for routers."""
        return _with_hashes(sketch(task)[1], 0)

    def run(self, bench: Bench) -> Trained:
        """Convert as usual, replace the routers, fine-tune."""
        network = _with_hashes(bench.chain.converted(), bench.seed)
        recipe = replace(bench.recipe, resp_weight=0.0, balance_weight=0.0)
        bench.train(network.to(bench.device), _objective(network, bench, recipe), recipe=recipe)
        mark = "" if recipe == bench.recipe else "no router to train"
        return Trained(network=network, recipe=recipe, epochs=bench.epochs, mark=mark)


class HashRouter(nn.Module):
    """Stands in for a :class:`~sigmabranch.routing.Router`; has no parameters."""

    odd_C: Tensor

    def __init__(self, channels: int, pool: nn.Module, seed: int, branches: int = 2) -> None:
        super().__init__()
        self.channels, self.pool, self.branches = channels, pool, branches
        generator = torch.Generator().manual_seed(seed)
        odd_C = 2 * torch.randint(1 << 30, (channels,), generator=generator) + 1
        self.register_buffer("odd_C", odd_C)

    def forward(self, feature: Any) -> Tensor:
        """log p: (B, K) float32, one of them 0."""
        steps_BC = (self.pool(feature).detach().float() * _STEPS).round().long()
        branch_B = ((steps_BC * self.odd_C).sum(1) >> 17) % self.branches
        return (1.0 - F.one_hot(branch_B, self.branches).float()) * _NEVER


def _with_hashes(net: SigmaBranchNet, seed: int) -> SigmaBranchNet:
    for number, node in enumerate(net.tree.inner):
        router = net.router(node)
        branches = len(net.tree.children(node))
        hashed = HashRouter(router.channels, router.projection[0], 1000 * seed + number, branches)
        net.routers[node_key(node)] = hashed
    return net


def _objective(net: SigmaBranchNet, bench: Bench, recipe: FinetuneRecipe) -> BranchedObjective:
    return BranchedObjective(recipe, bench.teacher(recipe), class_targets(net.record))


@dataclass(frozen=True, kw_only=True)
class FlatRouting(System):
    """The same leaves, chosen by one router on the trunk's feature instead of level by level."""

    name: ClassVar[str] = "flat-routing"
    summary: ClassVar[str] = "the same leaves behind one flat router"

    def check(self, task: Task) -> None:
        """The tree must fit the network."""
        sketch(task)

    def sketch(self, task: Task) -> nn.Module:
        """The branched network with a router at the trunk alone."""
        return FlatNet(sketch(task)[1])

    def run(self, bench: Bench) -> Trained:
        """Convert as usual, aim the flat router at the leaves' centroids, fine-tune."""
        tree = bench.chain.converted()
        with bench.seeded():
            network = FlatNet(tree).to(bench.device)
        network.aim(tree, bench)
        bench.train(network, _objective(network, bench, bench.recipe))
        return Trained(network=network, recipe=bench.recipe, epochs=bench.epochs)


class FlatNet(SigmaBranchNet):
    """A branched network that decides once, on what the root's router would read.

    Args:
        net: shares its trunk, specializers and heads.
    """

    early = True

    def __init__(self, net: SigmaBranchNet) -> None:
        root, tree = net.router(()), net.tree
        router = Router(root.channels, root.projection[0], tree)
        router.gate = nn.Linear(tree.projection_dim, len(tree.leaves))
        super().__init__(
            tree=tree,
            trunk=net.trunk,
            specializers={node: net.specializer(node) for node in tree.specializers},
            routers={(): router},
            heads={leaf: net.head(leaf) for leaf in tree.leaves},
            plans=net.plans,
            source=net.source,
            record=net.record,
            shared={node: net.shared[node_key(node)] for node in tree.sharing},
        )

    @torch.no_grad()
    def aim(self, net: SigmaBranchNet, bench: Bench) -> None:
        """Set the gate to the mean direction of the latents that ``net`` sends to each leaf.

        Seen from the origin, or from the mean of all latents where clusters are centred.
        """
        router, spec = self.router(()).eval(), bench.task.conversion
        leaves, latents = [], []
        for x, _ in bench.calibration().part(0, 1, spec.samples):
            leaves.append(net.hard(x.to(bench.device)).leaf)
            latents.append(router.latent(self.trunk_parts()[0](x.to(bench.device))))
        latent_ND = torch.cat(latents)
        mean_D = latent_ND.mean(0) if spec.centred else torch.zeros_like(latent_ND[0])
        sum_LD = torch.zeros_like(router.gate.weight)
        sum_LD.index_add_(0, torch.cat(leaves), F.normalize(latent_ND - mean_D, dim=1))
        router.gate.weight.copy_(F.normalize(sum_LD, dim=1))
        router.gate.bias.copy_(-router.gate.weight @ mean_D)

    def soft(self, x: Tensor) -> SoftOutput:
        """Run every node once; see :meth:`SigmaBranchNet.soft`."""
        until, rest = self.trunk_parts()
        seen = until(x)
        log_prob_BL = self.router(())(seen)
        features: dict[NodeId, Any] = {(): rest(seen)}
        for node in self.tree.specializers:
            features[node] = self.specializer(node)(features[node[:-1]])
        leaves = self.tree.leaves
        below = self.node_log_prob(log_prob_BL)
        branches = [
            torch.stack([below[node_key(child)] for child in self.tree.children(node)], dim=1)
            - below[node_key(node)][:, None]
            for node in self.tree.inner
        ]
        return SoftOutput(
            logits=torch.stack([self.head(leaf)(features[leaf]) for leaf in leaves], dim=1),
            log_prob=log_prob_BL,
            branch_log_prob=stacked(branches),
        )

    def leaf_of(self, soft: SoftOutput) -> Tensor:
        """The likeliest leaf."""
        return soft.log_prob.argmax(dim=1)

    def _decided(self, seen: Any, rows: Tensor) -> dict[NodeId, Choice]:
        best_B, leaf_B = self.router(())(seen).max(dim=1)
        decided = {}
        for node in self.tree.inner:
            under_KB = torch.stack(
                [
                    torch.isin(leaf_B, rows.new_tensor(self.tree.leaves_under(child)))
                    for child in self.tree.children(node)
                ]
            )
            # The whole choice is made, and its log p given, at the root.
            gain_B = torch.zeros_like(best_B) if node else best_B
            decided[node] = gain_B, under_KB.long().argmax(0)
        return decided

    def no_weight_decay(self) -> set[str]:
        """See :meth:`SigmaBranchNet.no_weight_decay`."""
        return {"routers.root.gate.weight"}
