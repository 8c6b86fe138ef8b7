"""How often a network is right, and how much of that its routing earns.

One pass over the data runs every node once, and all figures come from it: the hard path's answer
is read off the soft pass, whose leaves are the very modules the hard path would run. A few numbers
per sample stay on the device; the host waits for them once, at the end.

A loader may tell under which condition each sample was taken: it then has ``conditions``, their
names, and what its ``part`` yields has a third tensor, (B,) int64 numbers among them.

Shapes: N samples, B batch, V classes, L leaves, K conditions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigmabranch.conversion import Shards
from sigmabranch.coupling import evaluating
from sigmabranch.errors import ConfigError, DataError, NumericError
from sigmabranch.measure.load import Dynamic
from sigmabranch.measure.routes import (
    agreement,
    balance,
    leaf_class_information,
    shuffled_accuracy,
)
from sigmabranch.net import is_branched
from sigmabranch.tree import node_key

Batches = Iterable[Sequence[Tensor]]


def evaluate(
    net: nn.Module,
    batches: Batches,
    *,
    class_leaf: Sequence[int] | None = None,
    seed: int = 0,
    shards: Shards = Shards(),
) -> dict[str, Any]:
    """Measure a network on (inputs, labels) batches, moved to its device.

    The routes are the sequential decisions of :meth:`SigmaBranchNet.hard`, taken from the same
    routers' outputs; the two differ only where a router's choice, or a leaf's, is a tie to within
    rounding.

    Args:
        net: the network; its training mode is restored. One without branches is measured as
            :func:`evaluate_dense` does, because there is no routing to measure.
        batches: read once.
        class_leaf: the leaf to which ``leaf_by_class`` sends each class, normally
            ``best_leaf_of_class`` of the training split; this split's own best if None.
        seed: of the shuffled routes.
        shards: the processes that divide the batches, given the same ones; all get all figures.

    Returns:
        JSON-able; accuracies in percent, the rest as fractions. ``samples``; ``top1`` and ``top5``
        on the hard path; ``soft_top1`` of Σ P_j f_j (paper, eq. 3); ``oracle_leaf`` (any leaf is
        right: flattered by lucky guesses); ``leaf_by_class`` and ``leaf_by_class_from`` (the
        accuracy of a router that knew only the class); ``always_leaf`` per leaf and ``mean_leaf``;
        ``shuffled_routes`` and ``routing_gain`` (``top1`` minus that); ``agreement`` of two leaves;
        ``mean_max_p``; ``leaf_class_mi``; ``usage`` and ``balance``; ``class_leaf_share`` (V rows
        of L); ``best_leaf_of_class``; ``leaves``. Where batches tell conditions, also
        ``accuracy_by_condition`` (``top1`` of each), ``leaf_condition_mi`` and
        ``condition_leaf_share`` (K rows of L).

    Raises:
        DataError: no samples, or labels outside the network's classes.
        NumericError: a NaN or infinite logit.
        ConfigError: ``class_leaf`` does not name one leaf per class.
    """
    if not is_branched(net):
        if class_leaf is not None:
            raise ConfigError("a network without branches has no leaf by class: drop class_leaf")
        return evaluate_dense(net, batches, shards=shards)
    facts = _Facts(shards, batches)
    with torch.no_grad(), evaluating(net):
        for x, y, given in _on_device(net, shards.own(batches)):
            soft = net.soft(x)
            leaf_B = net.leaf_of(soft)
            logits_BLV = soft.logits.float()
            routed = _routed_facts(logits_BLV, soft.log_prob, leaf_B, y)
            facts.add(logits_BLV, y, **routed, **given)
    samples, classes = facts.checked()
    leaves = len(net.tree.leaves)
    y_N, leaf_N, correct_NL = facts["y"], facts["leaf"], facts["correct"]
    routed_VL = _per_class(F.one_hot(leaf_N, leaves), y_N, classes)
    right_VL = _per_class(correct_NL.long(), y_N, classes)
    usage_L = routed_VL.sum(dim=0)
    best_leaf_V = right_VL.argmax(dim=1)
    sent_V = best_leaf_V if class_leaf is None else _one_leaf_each(class_leaf, right_VL)
    top1 = facts.percent("top1")
    always_L = 100 * right_VL.sum(dim=0).double() / samples
    shuffled = 100 * shuffled_accuracy(correct_NL, leaf_N, seed)
    return {
        "samples": samples,
        "top1": top1,
        **{key: facts.percent(key) for key in ("top5", "soft_top1", "oracle_leaf")},
        "leaf_by_class": 100 * right_VL.gather(1, sent_V[:, None]).sum().item() / samples,
        "leaf_by_class_from": "this split" if class_leaf is None else "training split",
        "always_leaf": always_L.tolist(),
        "mean_leaf": always_L.mean().item(),
        "shuffled_routes": shuffled,
        "routing_gain": top1 - shuffled,
        "agreement": facts.mean("agreement"),
        "mean_max_p": facts.mean("mean_max_p"),
        "leaf_class_mi": leaf_class_information(routed_VL),
        "usage": (usage_L.double() / samples).tolist(),
        "balance": balance(usage_L),
        "class_leaf_share": _shares(routed_VL),
        "best_leaf_of_class": best_leaf_V.tolist(),
        "leaves": [node_key(leaf) for leaf in net.tree.leaves],
        **facts.by_condition(),
        **_routes_by_condition(facts, leaves),
    }


def _routes_by_condition(facts: _Facts, leaves: int) -> dict[str, Any]:
    """How the leaves share the conditions, if they are known."""
    if not facts.conditions:
        return {}
    routed_NL = F.one_hot(facts["leaf"], leaves)
    routed_KL = _per_class(routed_NL, facts["condition"], len(facts.conditions))
    return {
        "leaf_condition_mi": leaf_class_information(routed_KL),
        "condition_leaf_share": _shares(routed_KL),
    }


def evaluate_dense(
    model: nn.Module, batches: Batches, *, shards: Shards = Shards()
) -> dict[str, Any]:
    """Measure a network (B, ...) → (B, V) on (inputs, labels) batches, moved to its device.

    Args:
        model: the network; its training mode is restored.
        batches: read once.
        shards: as for :func:`evaluate`.

    Returns:
        ``samples``, ``top1`` and ``top5`` in percent, ``loss`` (mean cross-entropy, nats), and
        ``accuracy_by_condition`` (``top1`` of each) where batches tell conditions.

    Raises:
        DataError: no samples, or labels outside the network's classes.
        NumericError: a NaN or infinite logit.
    """
    facts = _Facts(shards, batches)
    with torch.no_grad(), evaluating(model):
        for x, y_B, given in _on_device(model, shards.own(batches)):
            logits_BV = model(x).float()
            facts.add(logits_BV, y_B, **_plain_facts(logits_BV, y_B), **given)
    return _plain_figures(facts)


def correctness(model: nn.Module, batches: Batches) -> Tensor:
    """Which samples a network (B, ...) → (B, V) gets right, a branched one on one path an input.

    Args:
        model: the network; its training mode is restored.
        batches: (inputs, labels), moved to its device; read once.

    Returns:
        (N,) bool on the CPU, in the batches' order.

    Raises:
        DataError: no samples, or labels outside the network's classes.
        NumericError: a NaN or infinite logit.
    """
    facts = _Facts(Shards(), batches)
    with torch.no_grad(), evaluating(model):
        for x, y_B, given in _on_device(model, batches):
            logits_BV = model(x).float()
            facts.add(logits_BV, y_B, top1=_among(logits_BV, y_B, 1), **given)
    facts.checked()
    return facts["top1"].cpu()


def _plain_facts(logits_BV: Tensor, y_B: Tensor) -> dict[str, Tensor]:
    inside_B = y_B.clamp(0, logits_BV.shape[1] - 1)  # a GPU cannot raise here; checked later
    return {
        "top1": _among(logits_BV, y_B, 1),
        "top5": _among(logits_BV, y_B, 5),
        "loss": F.cross_entropy(logits_BV, inside_B, reduction="none"),
    }


def _plain_figures(facts: _Facts) -> dict[str, Any]:
    samples, _ = facts.checked()
    return {
        "samples": samples,
        "top1": facts.percent("top1"),
        "top5": facts.percent("top5"),
        "loss": facts.mean("loss"),
        **facts.by_condition(),
    }


def evaluate_dynamic(
    model: Dynamic, batches: Batches, *, shards: Shards = Shards()
) -> dict[str, Any]:
    """Measure a network whose active weights depend on the input, input by input.

    Args:
        model: a module with :meth:`~sigmabranch.measure.load.Dynamic.with_load`; its training mode
            is restored.
        batches: read once.
        shards: as for :func:`evaluate`.

    Returns:
        As :func:`evaluate_dense`, and ``active_params`` and ``macs`` with their ``mean`` and
        ``max`` over the samples, ``choice_usage`` (share of the samples that use each optional
        part).

    Raises:
        DataError: no samples, or labels outside the network's classes.
        NumericError: a NaN or infinite logit.
    """
    assert isinstance(model, nn.Module)
    facts = _Facts(shards, batches)
    with torch.no_grad(), evaluating(model):
        for x, y_B, given in _on_device(model, shards.own(batches)):
            logits, load = model.with_load(x)
            facts.add(
                logits,
                y_B,
                **_plain_facts(logits.float(), y_B),
                active_params=load.active_params,
                macs=load.macs,
                choices=load.choices,
                **given,
            )
    return {
        **_plain_figures(facts),
        **{
            name: {"mean": facts.mean(name), "max": int(facts[name].max())}
            for name in ("active_params", "macs")
        },
        "choice_usage": facts["choices"].double().mean(dim=0).tolist(),
    }


class _Facts:
    """Columns of per-sample values, grown batch by batch on the device, read over all processes."""

    def __init__(self, shards: Shards, batches: Batches) -> None:
        self._shards = shards
        self.conditions: tuple[str, ...] = getattr(batches, "conditions", ())
        self._columns: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._whole: dict[str, Tensor] = {}
        self._classes = 0

    def add(self, logits: Tensor, y_B: Tensor, **columns_B: Tensor) -> None:
        """Append a batch; ``logits`` (B, ..., V) are only looked at."""
        self._classes = logits.shape[-1]
        columns = {**columns_B, "y": y_B, "finite": logits.isfinite().flatten(1).all(dim=1)}
        for name, values_B in columns.items():
            self._columns[name].append(values_B)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._whole:
            self._whole[name] = self._shards.gather(self._columns[name])
        return self._whole[name]

    def mean(self, name: str) -> float:
        return self[name].double().mean().item()

    def percent(self, name: str) -> float:
        return 100 * self.mean(name)

    def by_condition(self) -> dict[str, Any]:
        """Top-1 in percent under each condition that occurs, if they are known."""
        if not self.conditions:
            return {}
        right_N, condition_N = self["top1"].double(), self["condition"]
        return {
            "accuracy_by_condition": {
                name: 100 * right_N[condition_N == number].mean().item()
                for number, name in enumerate(self.conditions)
                if (condition_N == number).any()
            }
        }

    def checked(self) -> tuple[int, int]:
        """(samples, classes), once it is certain that the figures mean something."""
        if not self._columns and self._shards.world == 1:
            raise DataError("nothing to evaluate: the data gave no batch")
        y_N = self["y"]
        low, high = int(y_N.min()), int(y_N.max())
        if low < 0 or high >= self._classes:
            raise DataError(
                f"labels run from {low} to {high}, but the network has {self._classes} classes: "
                "is this the data set it was trained on?"
            )
        broken = len(y_N) - int(self["finite"].sum())
        if broken:
            raise NumericError(
                f"the network gave NaN or infinite logits on {broken} of {len(y_N)} samples: "
                "evaluate an earlier checkpoint"
            )
        return len(y_N), self._classes


def _routed_facts(
    logits_BLV: Tensor, log_prob_BL: Tensor, leaf_B: Tensor, y_B: Tensor
) -> dict[str, Tensor]:
    rows_B = torch.arange(len(y_B), device=y_B.device)
    predicted_BL = logits_BLV.argmax(dim=2)
    correct_BL = predicted_BL == y_B[:, None]
    prob_BL = log_prob_BL.exp()
    # Not a matrix product, which autocast would run in half precision.
    soft_BV = (prob_BL[..., None] * logits_BLV).sum(dim=1)
    return {
        "leaf": leaf_B,
        "correct": correct_BL,
        "top1": correct_BL[rows_B, leaf_B],
        "top5": _among(logits_BLV[rows_B, leaf_B], y_B, 5),
        "soft_top1": soft_BV.argmax(dim=1) == y_B,
        "oracle_leaf": correct_BL.any(dim=1),
        "agreement": agreement(predicted_BL),
        "mean_max_p": prob_BL.amax(dim=1),
    }


def _among(logits_BV: Tensor, y_B: Tensor, k: int) -> Tensor:
    """(B,) bool: the label is among the ``k`` largest logits."""
    best_BK = logits_BV.topk(min(k, logits_BV.shape[1]), dim=1).indices
    return (best_BK == y_B[:, None]).any(dim=1)


def _per_class(values_NL: Tensor, y_N: Tensor, classes: int) -> Tensor:
    """Sum the rows of each class: (V, L)."""
    return values_NL.new_zeros(classes, values_NL.shape[1]).index_add_(0, y_N, values_NL)


def _shares(count_VL: Tensor) -> list[list[float]]:
    """Each row over its sum; a row without samples stays 0."""
    return (count_VL.double() / count_VL.sum(dim=1, keepdim=True).clamp(min=1)).tolist()


def _one_leaf_each(class_leaf: Sequence[int], right_VL: Tensor) -> Tensor:
    classes, leaves = right_VL.shape
    if len(class_leaf) != classes or not all(0 <= leaf < leaves for leaf in class_leaf):
        raise ConfigError(
            f"class_leaf must name a leaf 0..{leaves - 1} for each of {classes} classes"
        )
    return torch.as_tensor(class_leaf, device=right_VL.device)


def _on_device(
    model: nn.Module, batches: Batches
) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """(inputs, labels, the samples' conditions if they are known)."""
    device = next(model.parameters()).device
    for x, y, *told in batches:
        if y.shape != x.shape[:1]:
            raise DataError(
                f"labels of shape {tuple(y.shape)} for {len(x)} inputs: give one integer each"
            )
        given = {"condition": told[0].to(device, non_blocking=True)} if told else {}
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True), given
