"""``tree.pte`` and ``NODE.ptd``: one ExecuTorch program with a method per node, weights beside it.

XNNPACK runs what it can. Weights that it takes over lie in their node's file; the program needs
only the file of the method that it loads.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeProgramManager, to_edge_transform_and_lower
from executorch.exir.passes.external_constants_pass import delegate_external_constants_pass_unlifted
from executorch.runtime import Method, Runtime
from torch import Tensor
from torch.export import ExportedProgram

from sigmabranch.deploy.export.check import Written
from sigmabranch.deploy.export.nodes import Part, Walk, node_parts, write_manifest
from sigmabranch.deploy.export.program import traced
from sigmabranch.errors import UnsupportedOperation
from sigmabranch.net import SigmaBranchNet

FILE, FORMAT = "tree.pte", "sigmabranch-executorch"


def write(net: SigmaBranchNet, folder: Path, sample: Tensor) -> Written:
    """Write all nodes for inputs of the shape of ``sample`` (1, ...), and the manifest last.

    Raises:
        UnsupportedOperation: torch.export cannot follow a node, or ExecuTorch has no kernel for an
            operation.
    """
    parts = list(node_parts(net, sample))
    _lower({part.key: _tagged(part) for part in parts}, folder)
    nodes = {part.key: _described(part, folder) for part in parts}
    write_manifest(net, folder, sample, format=FORMAT, nodes=nodes)
    return Walk(net, _Methods(folder, nodes))


def _tagged(part: Part) -> ExportedProgram:
    """The part as a program whose weights are to lie in the part's own file."""
    # XNNPACK folds norms too, but into weights that have lost their tag.
    module = traced(part.function.folded(), part.inputs).module()
    delegate_external_constants_pass_unlifted(module=module, gen_tag_fn=lambda _: part.key)
    return traced(module, part.inputs)


def _lower(programs: Mapping[str, ExportedProgram], folder: Path) -> None:
    partitioners = {key: [XnnpackPartitioner()] for key in programs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on ExecuTorch's own code
        try:
            lowered = to_edge_transform_and_lower(dict(programs), partitioner=partitioners)
            _write_weights(lowered, programs, folder)
            lowered.to_executorch().save(str(folder / FILE))
        except RuntimeError as error:
            reason = next(line for line in str(error).splitlines() if line.strip())
            raise UnsupportedOperation(f"ExecuTorch cannot run this network: {reason}") from error


def _write_weights(lowered: EdgeProgramManager, keys: Iterable[str], folder: Path) -> None:
    """A file for each node, as if it were the only one.

    Written together, a tensor with equal values in two nodes would be in the first one's file only.
    """
    for key in keys:
        alone = EdgeProgramManager({key: copy.deepcopy(lowered.exported_program(key))})
        alone.to_executorch().write_tensor_data_to_file(str(folder))


def _described(part: Part, folder: Path) -> dict[str, Any]:
    """Its entry in the manifest; a part that moves features on as they are has no file."""
    name = f"{part.key}.ptd"
    return {
        "method": part.key,
        "file": name if (folder / name).exists() else None,
        "inputs": list(part.input_names),
        "outputs": list(part.outputs),
    }


class _Methods:
    """The written methods, each loaded with its own file, to be run by key."""

    def __init__(self, folder: Path, nodes: Mapping[str, Mapping[str, Any]]) -> None:
        self.programs = {
            key: Runtime.get().load_program(folder / FILE, data_path=_data(folder, node))
            for key, node in nodes.items()
        }
        self.methods: dict[str, Method] = {
            key: program.load_method(key) for key, program in self.programs.items()
        }

    def __call__(self, key: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.methods[key].execute([tensor.contiguous() for tensor in tensors])


def _data(folder: Path, node: Mapping[str, Any]) -> Path | None:
    return folder / node["file"] if node["file"] else None
