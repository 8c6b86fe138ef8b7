"""Signs that a branched network has stopped being one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MIN_SHARPNESS = 0.2
MIN_DISAGREEMENT = 0.5
MIN_USAGE = 0.01


def routing_alarms(evaluation: Mapping[str, Any]) -> list[str]:
    """One line for each thing that is wrong with the routing; keys that are absent are not judged.

    Sharpness is mean max P rescaled so that uniform is 0 and one-hot is 1; for four leaves its
    limit is a mean max P of 0.4. Leaves count as clones when they disagree on less than half as
    many samples as the network gets wrong: independent networks disagree on more than they miss.

    Args:
        evaluation: ``mean_max_p`` and ``agreement`` as fractions, ``usage`` as one fraction per
            leaf, ``top1`` in percent.
    """
    alarms = []
    usage = list(evaluation.get("usage") or ())
    max_p = evaluation.get("mean_max_p")
    if max_p is not None and len(usage) > 1:
        uniform = 1 / len(usage)
        if (max_p - uniform) / (1 - uniform) < MIN_SHARPNESS:
            alarms.append(
                f"routing has dissolved: mean max P is {max_p:.2f}, uniform would be {uniform:.2f}"
            )
    agreement, top1 = evaluation.get("agreement"), evaluation.get("top1")
    if agreement is not None and top1 is not None:
        error = 1 - top1 / 100
        if 1 - agreement < MIN_DISAGREEMENT * error:
            alarms.append(
                f"the leaves are near-clones: they agree on {agreement:.0%} of the samples "
                f"at {error:.0%} errors"
            )
    leaves = evaluation.get("leaves") or range(len(usage))
    for leaf, share in zip(leaves, usage, strict=True):
        if share < MIN_USAGE:
            alarms.append(f"leaf {leaf} has died: it receives {share:.1%} of the samples")
    return alarms
