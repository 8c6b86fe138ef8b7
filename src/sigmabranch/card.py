"""What a model card says of a network: its size, its tree, what was measured, and what was not.

Every figure is counted from the network or taken from what was handed in; a row without one is
left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from torch import nn

from sigmabranch.backbones import source_of
from sigmabranch.errors import ConfigError
from sigmabranch.net import SigmaBranchNet, is_branched
from sigmabranch.tree import NodeId, node_key, shared_key

Figures: TypeAlias = Mapping[str, Any]
# What it is, then the cells under the header; None where there is no figure.
_Row: TypeAlias = tuple[str | None, ...]

PAPER = "https://arxiv.org/abs/2606.09924"
_HEADER = ("", "dense", "one path", "all paths, stored")
_NOTHING = "\N{EN DASH}"
# Key of an evaluation → what it is; {} is the value.
_ROUTING = (
    ("routing_gain", "routing gain, top-1 minus that with the routes shuffled: {:+.2f} points"),
    ("mean_leaf", "top-1 of a single leaf for all inputs, mean over the leaves: {:.2f} %"),
    ("soft_top1", "top-1 of all leaves, weighted by their probability: {:.2f} %"),
    ("agreement", "agreement of two leaves: {:.3f}"),
    ("mean_max_p", "mean probability of the likeliest leaf: {:.3f}"),
    ("balance", "balance of the leaves' use (1 is even): {:.3f}"),
)


def card_text(
    net: nn.Module,
    repo_id: str | None,
    *,
    evaluation: Figures | None,
    dense_evaluation: Figures | None,
    cost: Figures | None,
    dataset: str | None,
) -> str:
    """The card's Markdown, below its header; see :func:`sigmabranch.hub.model_card`.

    Raises:
        ConfigError: figures of another tree or of a network of another size.
    """
    _check_figures(net, evaluation, cost)
    measured, dense, counted = evaluation or {}, dense_evaluation or {}, cost or {}
    tree = ("## Tree", _fenced("", _tree(net, measured))) if is_branched(net) else ()
    sections = (
        f"# {repo_id or ('A branched network' if tree else 'A network without branches')}",
        _summary(net),
        _table(_rows(net, measured, dense, counted)),
        *tree,
        "## Load",
        _fenced("python", _loading(net, repo_id)),
        "## What was measured",
        "\n".join(_measured(evaluation, dataset, is_branched(net))),
        "## What was not",
        "\n".join(_missing(evaluation, dense_evaluation, cost)),
    )
    return "\n\n".join(sections) + "\n"


def _summary(net: nn.Module) -> str:
    if not is_branched(net):
        return (
            f"A network without routers, dense or one path cut out of a dense one, saved by an "
            f"implementation of [Sigma-Branch]({PAPER}). Every input runs all of it."
        )
    return (
        f"A [Sigma-Branch]({PAPER}) network: a shared trunk, small routers and specialised "
        f"branches, made from a dense network{_calibrated(net.record)}. One input runs one of "
        f"{len(net.tree.leaves)} root-to-leaf paths and reads that path's weights alone."
    )


def _check_figures(net: nn.Module, evaluation: Figures | None, cost: Figures | None) -> None:
    leaves = [node_key(leaf) for leaf in net.tree.leaves] if is_branched(net) else None
    if evaluation is not None and evaluation.get("leaves") != leaves:
        raise ConfigError(
            f"the evaluation is of a network with leaves {evaluation.get('leaves')}, this one has "
            f"{leaves}: evaluate this one"
        )
    stored = _count(net.parameters())
    counted = None if cost is None else _ours(cost)
    if cost is not None and counted != stored:
        raise ConfigError(
            f"the cost is of a network with {counted} parameters, this one has {stored}: count "
            "this one"
        )


def _ours(cost: Figures) -> int:
    """Parameters of the network that was counted; a dense one may stand alone."""
    alone = cost.get("dense", {}).get("params")
    return cost.get("net", {}).get("total_params", alone)


def _calibrated(record: Figures) -> str:
    samples = record.get("samples")
    return f" with {samples:,} calibration samples" if samples else ""


def _count(parameters: Iterable[nn.Parameter]) -> int:
    """Elements, one parameter in several places counting once."""
    return sum({id(p): p.numel() for p in parameters}.values())


def _path_parameters(net: nn.Module) -> int:
    """Parameters that one input runs; where paths differ, the most."""
    if not is_branched(net):
        return _count(net.parameters())
    own = net.node_parameters()
    paths = map(net.tree.keys_to, net.tree.leaves)
    return max(_count(p for key in path for p in own[key]) for path in paths)


def _rows(
    net: nn.Module, evaluation: Figures, dense_evaluation: Figures, cost: Figures
) -> Iterator[_Row]:
    dense, ours = cost.get("dense", {}), cost.get("net", {})
    params = (dense.get("params"), _path_parameters(net), _count(net.parameters()))
    yield ("parameters", *(_shown("{:,}", value) for value in params))
    yield ("MB as fp32", *(_shown("{:,.3f}", value and 4 * value / 1e6) for value in params))
    yield ("multiply-adds", *(_shown("{:,}", part.get("macs")) for part in (dense, ours)), None)
    for key, name in (("top1", "top-1 %"), ("top5", "top-5 %")):
        both = (dense_evaluation.get(key), evaluation.get(key))
        yield (name, *(_shown("{:.2f}", value) for value in both), None)


def _shown(form: str, value: float | None) -> str | None:
    return None if value is None else form.format(value)


def _table(rows: Iterable[_Row]) -> str:
    """A Markdown table of the rows and columns that hold a figure."""
    rows = [row for row in rows if any(row[1:])]
    shown = [0, *(column for column in (1, 2, 3) if any(row[column] for row in rows))]
    lines = [
        [_HEADER[column] for column in shown],
        ["---", *["---:"] * (len(shown) - 1)],
        *([row[column] or _NOTHING for column in shown] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _tree(net: SigmaBranchNet, evaluation: Figures) -> Iterator[str]:
    """The tree as indented text, one line a node."""
    usage = dict(zip(evaluation.get("leaves", ()), evaluation.get("usage", ()), strict=True))
    own = {key: _count(parameters) for key, parameters in net.node_parameters().items()}

    def line(node: NodeId, indent: str) -> str:
        key = node_key(node)
        name = "trunk" if not node else f"leaf {key}" if node in net.tree.leaves else key
        share = f", {usage[key]:.1%} of the inputs" if key in usage else ""
        return f"{indent}{name}: {own[key]:,} parameters{share}"

    def below(node: NodeId, indent: str) -> Iterator[str]:
        if (shared := shared_key(node)) in own:
            yield f"{indent}├─ {shared} by the nodes below: {own[shared]:,} parameters"
        children = [child for child in net.tree.specializers if child[:-1] == node]
        for child in children:
            last = child == children[-1]
            yield line(child, indent + ("└─ " if last else "├─ "))
            yield from below(child, indent + ("   " if last else "│  "))

    yield line((), "")
    yield from below((), "")


def _loading(net: nn.Module, repo_id: str | None) -> Iterator[str]:
    yield "import sigmabranch as sb  # pip install 'sigma-branch[hub]'"
    call = "load(folder" if repo_id is None else f'from_hub("{repo_id}"'
    if (net.source if isinstance(net, SigmaBranchNet) else source_of(net)) is None:
        call += ", skeleton=dense"
        yield "# dense: a network of the shape that this one was made from, with any weights"
    yield f"net = sb.{call})"
    shown = "  # one path an input; print(net.explain(x)[0]) shows it" if is_branched(net) else ""
    yield f"logits = net(x){shown}"


def _fenced(language: str, lines: Iterable[str]) -> str:
    return "\n".join((f"```{language}", *lines, "```"))


def _measured(evaluation: Figures | None, dataset: str | None, branched: bool) -> Iterator[str]:
    paths = "; a path's include its routers, and are the most of any path" if branched else ""
    yield f"- parameters: counted{paths}"
    if evaluation is None:
        return
    of = "" if dataset is None else f" of {dataset}"
    samples, share = evaluation["samples"], evaluation["top1"] / 100
    error = 100 * math.sqrt(share * (1 - share) / samples)
    yield (
        f"- accuracy: on {samples:,} samples{of}{', one path an input' if branched else ''}; "
        "drawing as many anew moves "
        f"top-1 by ±{error:.2f} points (one standard error)"
    )
    yield from (f"- {text.format(evaluation[key])}" for key, text in _ROUTING if key in evaluation)


def _missing(
    evaluation: Figures | None, dense_evaluation: Figures | None, cost: Figures | None
) -> Iterator[str]:
    absent = {
        "accuracy": evaluation is None,
        "accuracy of the dense network": dense_evaluation is None,
        "multiply-adds": cost is None,
    }
    yield from (f"- {what}" for what, missing in absent.items() if missing)
    yield "- latency and energy on any device, and accuracy on any other data"
