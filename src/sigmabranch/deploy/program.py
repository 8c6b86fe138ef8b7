"""In which order the segments of a package run, along a route that becomes known on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from sigmabranch.deploy.blocks import ROUTER
from sigmabranch.deploy.package import Package, ancestry, parent
from sigmabranch.deploy.segment import Segment
from sigmabranch.tree import is_shared


class Program:
    """The segments of a package in order.

    Args:
        package: what is run.
        whole_nodes: make a segment of as many blocks of a node as run in one go, not of each.

    Attributes:
        segments: all of them, parents before children.
        needs: segment → those that must be in memory while it runs: what it shares with its
            siblings.
    """

    def __init__(self, package: Package, *, whole_nodes: bool = False) -> None:
        self._body: dict[str, tuple[Segment, ...]] = {}
        self._router: dict[str, Segment] = {}
        self._shared: dict[str, tuple[Segment, ...]] = {}
        for key, node in package.nodes.items():
            body = node.blocks
            if body[-1].name == ROUTER:
                self._router[key] = Segment(node=key, blocks=body[-1:])
                body = body[:-1]
            cut = node.decides_after if key == "root" else len(body)
            if whole_nodes:
                groups = [part for part in (body[:cut], body[cut:]) if part]
            else:
                groups = [(block,) for block in body]
            segments = tuple(Segment(node=key, blocks=group) for group in groups)
            if is_shared(key):
                self._shared[parent(key)] = segments
            else:
                self._body[key] = segments
        root = package.nodes["root"]
        self.early = root.decides_after < len(root.blocks) - len(self._router.keys() & {"root"})
        self._before_decision = 1 if whole_nodes else root.decides_after
        self.needs = {
            segment: tuple(
                shared
                for shared in self._shared.get(parent(key), ())
                if key != "root" and set(shared.names) & set(segment.names)
            )
            for key, body in self._body.items()
            for segment in body
        }
        self.segments = tuple(self._all())

    def _all(self) -> Iterator[Segment]:
        """Every segment, what siblings share after their parent."""
        for node in self._body:
            yield from self.of(node)
            yield from self._shared.get(node, ())

    def of(self, node: str) -> tuple[Segment, ...]:
        """A node's segments in order; its router comes first where it decides early."""
        if is_shared(node):
            return self._shared[parent(node)]
        router = (self._router[node],) if node in self._router else ()
        if not self.early:
            return (*self._body[node], *router)
        if node == "root":
            cut = self._before_decision
            return (*self._body[node][:cut], *router, *self._body[node][cut:])
        return (*router, *self._body[node])

    def is_router(self, segment: Segment) -> bool:
        """Whether running it decides a branch."""
        return self._router.get(segment.node) is segment

    def steps(self, route: Sequence[str]) -> Iterator[Segment]:
        """The segments that ``route`` runs; it may be extended while this is walked.

        Args:
            route: the nodes known so far, root first. Every router that is yielded adds the next
                node before the walk goes on.
        """
        cut = self._before_decision if self.early else 0
        yield from self._body["root"][:cut]
        if self.early:
            for node in route:
                if node in self._router:
                    yield self._router[node]
        for node in route:
            yield from self._body[node][cut if node == "root" else 0 :]
            if not self.early and node in self._router:
                yield self._router[node]

    def reads(self, route: Sequence[str]) -> Iterator[Segment]:
        """The segments that must be read for ``route``, in the order of their use.

        What the children of its last node share is needed whichever of them comes next.
        """
        for segment in self.steps(route):
            yield from self.needs.get(segment, ())
            yield segment
        yield from self._shared.get(route[-1], ())

    def below(self, node: str) -> tuple[str, ...]:
        """The nodes under ``node``, parents before children."""
        return tuple(key for key in self._body if node in ancestry(key) and key != node)

    def likely(self, probability: Mapping[str, float]) -> dict[str, float]:
        """Probabilities of nodes, and of what their children share, which is read with them."""
        shared = {
            segments[0].node: probability.get(node, 0.0) for node, segments in self._shared.items()
        }
        return {**probability, **shared}
