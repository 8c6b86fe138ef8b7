"""A network as what a device runs: nodes, each a row of blocks whose weights arrive together.

A dense network is a tree of one node. Blocks are the unit of storage: one contiguous stretch of a
node's file, read in one go, run as soon as it is there. What siblings share is a node whose blocks
are not run: those of the siblings that have the same names borrow their tensors.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from sigmabranch.backbones import Backbone
from sigmabranch.deploy.fold import Pair, fold, foldable
from sigmabranch.errors import ConfigError, ConversionError
from sigmabranch.net import SigmaBranchNet
from sigmabranch.shared import shared_tensors, with_shared
from sigmabranch.tree import node_key, shared_key

# Shorter stretches are read at a fraction of a storage's speed.
MIN_BLOCK_BYTES = 256 * 1024
ROUTER = "router"


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Modules that run one after the other on weights that are stored together.

    Attributes:
        name: unique within the node; :data:`ROUTER` for a router.
        module: feature → feature; of the last block of a leaf, feature → (B, V) logits; of a
            router, feature → (B, K) log p.
        shared: it is stored for what siblings share of the module, not for what each has alone.
    """

    name: str
    module: nn.Module
    shared: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """What must be stored of it."""
        borrowed = shared_tensors(self.module)
        return {
            name: tensor
            for name, tensor in self.reads().items()
            if (name in borrowed) == self.shared
        }

    def reads(self) -> dict[str, Tensor]:
        """What its module runs on, what siblings share included."""
        return {
            name: tensor
            for name, tensor in self.module.state_dict().items()
            if not name.endswith("num_batches_tracked")  # read by training alone
        }


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node of the tree: its body, and its router if it decides.

    Attributes:
        key: ``"root"``, ``"0"``, ``"0-1"``, …; ``"shared"``, ``"0-shared"``, …
        body: run in order; of what siblings share, never run by itself.
        router: the router, or None.
        decides_after: so many blocks of the body run before the router; 0 below the root where the
            routers read what the root's reads.
        folded: batch norms that are part of the module before them, as paths in the node.
    """

    key: str
    body: tuple[Block, ...]
    router: Block | None
    decides_after: int
    folded: tuple[Pair, ...]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All of the node's blocks in the order of their storage."""
        return (*self.body, self.router) if self.router else self.body


def node_parts(model: SigmaBranchNet | Backbone) -> dict[str, tuple[nn.Module, nn.Module | None]]:
    """Body and router of each node, root first."""
    if isinstance(model, Backbone):
        return {"root": (_joined(model.section(model.chain), model.pooled_head()), None)}
    parts: dict[str, tuple[nn.Module, nn.Module | None]] = {}
    for node in model.nodes:
        body = model.specializer(node) if node else model.trunk
        if node in model.tree.leaves:
            body = _joined(body, model.head(node))
        router = model.router(node) if model.has_router(node) else None
        parts[node_key(node)] = (body, router)
    return parts


def _joined(body: nn.Module, head: nn.Module) -> nn.Sequential:
    assert isinstance(body, nn.Sequential)
    return nn.Sequential(OrderedDict(body._modules, head=head))


def folded_nodes(model: SigmaBranchNet | Backbone) -> list[Node]:
    """The nodes of a network, batch norms folded; a copy on the CPU, in eval mode.

    Raises:
        ConfigError: the network computes tensors when it is made that it does not save.
        ConversionError: two modules of a node would be stored under one name.
    """
    nodes = {}
    for key, parts in node_parts(model).items():
        body, router = (copy.deepcopy(part) if part is not None else None for part in parts)
        assert body is not None
        with_shared(body).cpu()
        pairs = tuple(foldable(body.eval()))
        fold(body, pairs)
        router = None if router is None else router.cpu()
        nodes[key] = _node(key, body, router, pairs, _early(model))
    return _with_shared_nodes(model, nodes)


def folded_skeleton(
    model: SigmaBranchNet | Backbone, folded: Mapping[str, tuple[Pair, ...]]
) -> list[Node]:
    """The nodes of a network without values (meta device), folded as a package says."""
    nodes = {}
    for key, (body, router) in node_parts(model).items():
        fold(with_shared(body).eval(), folded[key])
        nodes[key] = _node(key, body, router, folded[key], _early(model))
    return _with_shared_nodes(model, nodes)


def _with_shared_nodes(model: SigmaBranchNet | Backbone, nodes: Mapping[str, Node]) -> list[Node]:
    """All nodes in the order of their storage, with those of what siblings share."""
    if isinstance(model, Backbone):
        return [*nodes.values()]
    found = {**nodes}
    for parent in model.tree.sharing:
        first = nodes[node_key(model.tree.children(parent)[0])]
        blocks = [replace(block, shared=True) for block in first.body]
        found[shared_key(parent)] = Node(
            key=shared_key(parent),
            body=tuple(block for block in blocks if block.tensors()),
            router=None,
            decides_after=0,
            folded=(),
        )
    return [found[key] for key in model.tree.keys]


def _early(model: SigmaBranchNet | Backbone) -> str | None:
    return model.tree.decide_after if isinstance(model, SigmaBranchNet) else None


def _node(
    key: str,
    body: nn.Module,
    router: nn.Module | None,
    pairs: tuple[Pair, ...],
    decide_after: str | None,
) -> Node:
    _refuse_clash(key, [name for name, _ in _flat(body, "")], router)
    before, after = _halves(body, decide_after if key == "root" else None)
    node = Node(
        key=key,
        body=(*before, *after),
        router=None if router is None else _block(OrderedDict({ROUTER: router.eval()})),
        decides_after=0 if decide_after and key != "root" else len(before),
        folded=pairs,
    )
    for block in node.blocks:
        kept = block.module.state_dict().keys()
        lost = [name for name, _ in block.module.named_buffers() if name not in kept]
        if lost:
            raise ConfigError(
                f"node {key} computes {lost[0]} of block {block.name} when it is made and does not "
                "save it: register the buffer as persistent"
            )
    return node


def _refuse_clash(key: str, names: Iterable[str], router: nn.Module | None) -> None:
    """A node's tensors lie in one file, where each needs a name of its own."""
    stored: dict[str, str] = {} if router is None else {ROUTER: "its router"}
    for name in names:
        other = stored.setdefault(_stored_name(name), name)
        if other != name:
            raise ConversionError(
                f"node {key} would store {other} and {name} under the same name: rename one"
            )


def _halves(body: nn.Module, last: str | None) -> tuple[list[Block], list[Block]]:
    """The blocks up to the module ``last``, and the rest; all and none if it is None."""
    members = list(_flat(body, ""))
    cut = len(members)
    if last is not None:
        inside = [number for number, (name, _) in enumerate(members) if _belongs(name, last)]
        cut = inside[-1] + 1
    return list(_grouped(members[:cut])), list(_grouped(members[cut:]))


def _belongs(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _grouped(members: Iterable[tuple[str, nn.Module]]) -> Iterator[Block]:
    """Blocks of at least :data:`MIN_BLOCK_BYTES` where there is so much.

    What siblings share counts, so that siblings begin their blocks at the same modules.
    """
    group: OrderedDict[str, nn.Module] = OrderedDict()
    for name, module in members:
        if _bytes(group.values()) >= MIN_BLOCK_BYTES and _bytes([module]):
            yield _block(group)
            group = OrderedDict()
        group[name] = module
    if group:
        yield _block(group)


def _flat(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The members of nested plain sequences, in order."""
    if type(module) is nn.Sequential:
        for name, child in module._modules.items():  # named_children leaves out repetitions
            assert child is not None
            yield from _flat(child, f"{path}.{name}" if path else name)
    else:
        yield path, module


def _block(group: OrderedDict[str, nn.Module]) -> Block:
    modules = OrderedDict((_stored_name(name), module) for name, module in group.items())
    return Block(name=next(iter(group)), module=nn.Sequential(modules))


def _stored_name(name: str) -> str:
    return name.replace(".", "_")  # a module's own name has no dot


def _bytes(modules: Iterable[nn.Module]) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for module in modules
        for tensor in module.state_dict().values()
    )
