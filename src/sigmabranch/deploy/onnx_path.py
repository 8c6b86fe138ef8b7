"""One path through a folder of ONNX nodes, run by ONNX Runtime.

Sessions are made when a node is first met and kept; a device that must not keep them all names how
many it can afford.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from numpy.typing import NDArray

from sigmabranch import files
from sigmabranch.archive import MANIFEST, check_file, check_schema
from sigmabranch.deploy.export.nodes import DECIDE, SCHEMA
from sigmabranch.deploy.package import ancestry, child
from sigmabranch.errors import CheckpointError, MissingDependency

try:
    import onnxruntime
except ImportError as missing:
    raise MissingDependency("onnxruntime", "deploy", "running ONNX nodes") from missing

Array: TypeAlias = NDArray[Any]
FORMAT = "sigmabranch-onnx-nodes"


class NodeRun(NamedTuple):
    """One node's part of a path.

    Attributes:
        key: of the node, or ``"decide"``.
        inputs: by name.
        outputs: by name.
    """

    key: str
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


class OnnxPath:
    """Runs single inputs through the nodes that ``sigmabranch export --format onnx-nodes`` wrote.

    Args:
        folder: holds ``manifest.json`` and the nodes.
        keep: sessions that stay open; all of them if None.
        threads: that compute one node.

    Raises:
        CheckpointError: no such folder, or a damaged file.
    """

    def __init__(self, folder: Path | str, *, keep: int | None = None, threads: int = 1) -> None:
        self.folder, self._keep = Path(folder), keep
        self.manifest = read_nodes(self.folder)
        self.leaves = tuple("-".join(map(str, leaf)) for leaf in self.manifest["leaves"])
        self._options = onnxruntime.SessionOptions()
        self._options.intra_op_num_threads = threads
        self._options.log_severity_level = 3
        self._sessions: OrderedDict[str, onnxruntime.InferenceSession] = OrderedDict()

    def __call__(self, x: Array) -> tuple[Array, str]:
        """(1, ...) float32 → (logits (1, V), key of the leaf)."""
        *_, last = self.runs(x)
        return last.outputs["logits"], last.key

    def path_bytes(self, leaf: str) -> int:
        """Bytes of the files that a path to ``leaf`` needs."""
        keys = [*([DECIDE] if self.manifest["early"] else []), *ancestry(leaf)]
        stems = {self.manifest["nodes"][key]["file"] for key in keys}
        listed = self.manifest["files"].items()
        return sum(entry["bytes"] for name, entry in listed if name.removesuffix(".data") in stems)

    def runs(self, x: Array) -> Iterator[NodeRun]:
        """Run one input, yielding node after node of its path."""
        tensors: Sequence[Array] = (x,)
        said: dict[str, Array] = {}
        if self.manifest["early"]:
            yield (run := self._run(DECIDE, tensors))
            *tensors, log_prob_1IK = run.outputs.values()
            said = dict(zip(self.manifest["routers"], log_prob_1IK[0], strict=True))
        key = "root"
        yield (run := self._run(key, tensors))
        while key not in self.leaves:
            log_prob = said[key] if said else run.outputs["log_prob"]
            features = [value for name, value in run.outputs.items() if name != "log_prob"]
            key = child(key, int(log_prob.argmax()))
            yield (run := self._run(key, features))

    def _run(self, key: str, tensors: Sequence[Array]) -> NodeRun:
        node = self.manifest["nodes"][key]
        inputs = dict(zip(node["inputs"], tensors, strict=True))
        found = self._session(key).run(node["outputs"], inputs)
        return NodeRun(key, inputs, dict(zip(node["outputs"], found, strict=True)))

    def _session(self, key: str) -> onnxruntime.InferenceSession:
        session = self._sessions.pop(key, None)
        if session is None:
            session = onnxruntime.InferenceSession(
                self.folder / self.manifest["nodes"][key]["file"],
                self._options,
                providers=["CPUExecutionProvider"],
            )
        self._sessions[key] = session  # the newest is last
        while self._keep is not None and len(self._sessions) > max(self._keep, 1):
            self._sessions.popitem(last=False)
        return session


def read_nodes(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of ONNX nodes, after checking every file that it names.

    Raises:
        CheckpointError: as for :class:`OnnxPath`.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no ONNX nodes: {MANIFEST} is missing")
    manifest = files.read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder} holds no ONNX nodes: export with --format onnx-nodes")
    check_schema(manifest, folder, SCHEMA)
    for name, entry in manifest["files"].items():
        check_file(folder, name, entry)
    return manifest
