"""Which branches to read before a router has decided.

The likeliest comes first, always: while the loader has nothing certain to do, it costs no time.
More of them are read only if computing is expected to last longer than reading what comes before
them, and if they are not unlikely: what is read in vain costs energy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

LEAST_PROBABILITY = 0.2


def likely_nodes(
    nodes: Iterable[str],
    probability: Mapping[str, float],
    idle_seconds: float,
    load_seconds: Callable[[str], float],
) -> Iterator[str]:
    """Yield the nodes that are worth reading ahead, the likeliest first.

    Args:
        nodes: those that may follow, parents before children.
        probability: of each node.
        idle_seconds: how long the loader will have nothing certain to do.
        load_seconds: how long a node takes to read.
    """
    first_guess = ""
    for node in sorted(nodes, key=lambda node: -probability.get(node, 0.0)):
        guessed = not first_guess or node.startswith(f"{first_guess}-")
        if not guessed and (idle_seconds <= 0 or probability.get(node, 0.0) < LEAST_PROBABILITY):
            continue
        if guessed:
            first_guess = node
        yield node
        idle_seconds -= load_seconds(node)
