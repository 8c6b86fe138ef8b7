"""Compiled by AOTInductor: one body for all nodes of a kind, run on weights that stay ours.

Bodies are compiled when they are first needed, which takes a C++ compiler and up to minutes each,
and kept in the user's cache folder, under a hash of the program that was compiled. They are machine
code, so no package carries any.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.func import functional_call
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from sigmabranch import files
from sigmabranch.deploy.blocks import Node
from sigmabranch.deploy.export.program import traced
from sigmabranch.deploy.segment import Segment
from sigmabranch.errors import ConfigError
from sigmabranch.temporaries import temporary_folder
from sigmabranch.version import __version__


class AotiEngine:
    """Runs compiled bodies.

    Args:
        nodes: their modules, on the meta device.
        cache: where compiled bodies are kept; the user's cache folder if None.

    Raises:
        ConfigError: there is no C++ compiler.
    """

    #: A node is one body: it starts when all of it is there.
    whole_nodes: ClassVar[bool] = True

    def __init__(self, nodes: Sequence[Node], cache: Path | None = None) -> None:
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            raise ConfigError("the engine aoti needs a C++ compiler: install g++, or use eager")
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self._cache = cache or home / "sigmabranch" / "aoti"
        self._modules = {
            (node.key, block.name): block.module for node in nodes for block in node.blocks
        }
        self._bodies: dict[str, Any] = {}
        self._key: dict[Segment, str] = {}

    def run(self, segment: Segment, tensors: Mapping[str, Tensor], feature: Any) -> Any:
        """Feature → feature, logits or log p; compiles the segment's body at its first run.

        Raises:
            UnsupportedOperation: torch.export cannot follow the segment.
            CheckpointError: the cache folder cannot be written.
        """
        key = self._key.get(segment)
        if key is None:
            key = self._key[segment] = self._prepared(segment, tensors, feature)
        with torch.inference_mode():
            return self._bodies[key](_in_order(tensors), feature)

    def _prepared(self, segment: Segment, tensors: Mapping[str, Tensor], feature: Any) -> str:
        """The key of a segment's body, which is loaded, and compiled if need be."""
        program = exported(self._module(segment), tensors, feature)
        key = body_key(program, tensors, feature)
        if key not in self._bodies:
            path = self._cache / f"{key}.pt2"
            if not path.is_file():
                _compile(program, path)
            self._bodies[key] = torch._inductor.aoti_load_package(str(path))
        return key

    def _module(self, segment: Segment) -> nn.Module:
        blocks = [self._modules[segment.node, name] for name in segment.names]
        members = [item for block in blocks for item in block.named_children()]
        return nn.Sequential(OrderedDict(members)).eval()


class _Weightless(nn.Module):
    """A module as a function of its weights too, so that a body reads them where they lie.

    The other way, to let a body keep them as its constants, keeps their memory for ever.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._held = (module,)  # in a tuple, so that its weights are none of the program's

    def forward(self, tensors: dict[str, Tensor], feature: Any) -> Any:
        """Feature → what the module makes of it."""
        return functional_call(self._held[0], tensors, (feature,))


@torch.no_grad()
def exported(module: nn.Module, tensors: Mapping[str, Tensor], feature: Any) -> ExportedProgram:
    """A module as a program of tensors and a feature, for exactly these layouts.

    Args:
        module: in eval mode; its own tensors may have no values.
        tensors: its parameters and buffers.
        feature: what it reads.

    Raises:
        UnsupportedOperation: torch.export cannot follow the module.
    """
    return traced(_Weightless(module), (_in_order(tensors), feature))


def body_key(program: ExportedProgram, tensors: Mapping[str, Tensor], feature: Any) -> str:
    """Names a body by everything that its machine code depends on; values of weights are none."""
    graphs = (part for part in program.graph_module.modules() if isinstance(part, GraphModule))
    described = {
        "code": [graph.code for graph in graphs],
        "signature": str(program.graph_signature),
        "constants": {name: _content(value) for name, value in program.constants.items()},
        "tensors": {name: _layout(tensor) for name, tensor in tensors.items()},
        "feature": [_layout(tensor) for tensor in pytree.tree_leaves(feature)],
        "versions": [__version__, torch.__version__],
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


def _in_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By name, for a body takes them by their places, and siblings may store theirs otherwise."""
    return {name: tensors[name] for name in sorted(tensors)}


def _layout(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype), list(tensor.shape), list(tensor.stride())]


def _content(constant: Any) -> list[Any]:
    """A constant of a program with its values."""
    if not isinstance(constant, Tensor):
        return [repr(constant)]
    return [*_layout(constant), str(constant.tolist())]


def _compile(program: ExportedProgram, path: Path) -> None:
    with (
        files.atomic_write(path) as temporary,
        temporary_folder(path.parent) as folder,
        torch.no_grad(),
    ):
        made = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/body.pt2")
        os.replace(made, temporary)
