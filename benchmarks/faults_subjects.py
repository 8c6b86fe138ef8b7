"""Everything that the library keeps on disk, in its smallest form: how to write and read it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sigmabranch import files
from sigmabranch.backbones import ResNet, ResNetSpec
from sigmabranch.conversion import ConversionSpec, convert
from sigmabranch.deploy import Runtime, pack
from sigmabranch.errors import CheckpointError
from sigmabranch.marks import check_free
from sigmabranch.net import SigmaBranchNet
from sigmabranch.report import comparison_table, search_table
from sigmabranch.saving import load_dense, load_net, save_dense
from sigmabranch.tasks import Chain, find_task, read_results
from sigmabranch.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from sigmabranch.training.logs import write_csv
from sigmabranch.tree import TreeSpec

RESULTS = Path(__file__).resolve().parents[1] / "results"
SETTINGS = (
    *("model.layers=[1,1,1]", "model.planes=[2,3,4]", "model.strides=[1,2,1]"),
    *("model.stem_width=4", "tree.projection_dim=4", "data.train_limit=64", "data.test_limit=40"),
    *("dense.epochs=3", "dense.batch_size=16", "finetune.epochs=3", "finetune.batch_size=16"),
    "conversion.restarts=2",
)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One kind of file or folder.

    Attributes:
        write: (folder, 0 or 1): two states that differ.
        read: folder → all that a reader makes of it, as text.
    """

    write: Callable[[Path, int], None]
    read: Callable[[Path], str]


@cache
def inputs() -> Tensor:
    """(8, 1, 8, 8)."""
    return torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@cache
def dense(variant: int) -> ResNet:
    spec = ResNetSpec(
        layers=(1, 1, 1),
        planes=(2, 3, 4),
        strides=(1, 2, 1),
        stem="cifar",
        stem_width=4,
        in_channels=1,
        classes=5,
    )
    torch.manual_seed(variant)
    net = ResNet(spec)
    for name, tensor in net.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    return net.eval()


@cache
def branched(variant: int) -> SigmaBranchNet:
    x, y = torch.randn(64, 1, 8, 8), torch.arange(64) % 5
    spec = ConversionSpec(balanced=True, norm_samples=32, restarts=1)
    tree = TreeSpec.balanced(1, projection_dim=4)
    return convert(dense(variant), [(x, y)], tree, spec=spec).eval()


def read_network(folder: Path) -> str:
    net = load_net(folder)
    with torch.no_grad():
        out = net.hard(inputs())
    return digest({**net.state_dict(), "logits": out.logits, "leaf": out.leaf}, net.record)


def read_dense(folder: Path) -> str:
    net = load_dense(folder)
    with torch.no_grad():
        return digest({**net.state_dict(), "logits": net(inputs())})


def read_package(folder: Path) -> str:
    with ExitStack() as stack:
        runtime = stack.enter_context(Runtime.open(folder))
        found = [runtime.predict(x) for x in inputs()]
        if runtime.peak_bytes > runtime.budget:
            raise AssertionError("more memory than the budget")
        notes = [runtime.package.notes, runtime.package.usage, runtime.package.classes]
        return digest({str(n): p.logits for n, p in enumerate(found)}, notes)


def write_checkpoint(folder: Path, variant: int) -> None:
    torch.manual_seed(variant)
    weights = {"w": torch.randn(7, 5), "steps": torch.tensor(variant)}
    save_checkpoint(
        folder,
        Checkpoint(
            step=7,  # the same step, twice
            seconds=0.5,
            history=[{"epoch": 1, "loss": 0.25 + variant}],
            identity={"seed": 0, "task": {"name": "x"}},
            tensors={"model": weights, "meter": {"sums": {}, "done": 3}, "lr": [0.1, None]},
        ),
    )


def read_checkpoint(folder: Path) -> str:
    found = load_checkpoint(folder)
    if found is None:
        raise CheckpointError("nothing")
    rest = [found.step, found.seconds, found.history, found.identity, found.tensors["lr"]]
    return digest(found.tensors["model"], [*rest, found.tensors["meter"]])


def write_result(folder: Path, variant: int) -> None:
    result = json.loads((RESULTS / f"digits-resnet-seed{variant}.json").read_text())
    files.write_json(folder / "result.json", result)


def read_result(folder: Path) -> str:
    (found,) = read_results(folder) or (None,)
    if found is None:
        raise CheckpointError("nothing")
    return json.dumps(found.content)


def write_run(folder: Path, variant: int) -> None:
    task = find_task("digits-resnet").with_settings(SETTINGS)
    files.write_json(folder / "task.json", {"task": task.to_dict(), "seed": 0})
    files.write_json(folder / "measured.json", {"dense": {"top1": 50.0 + variant}})
    files.write_json(folder / "dense" / "history.json", {"epochs": [{"epoch": 1, "lr": 0.1}]})


def read_run(folder: Path) -> str:
    task = find_task("digits-resnet").with_settings(SETTINGS)
    chain = Chain(task, folder, device="cpu", branching=False)
    return json.dumps([chain.measured(), chain.history("dense")])


def write_comparison(folder: Path, variant: int) -> None:
    found = json.loads((RESULTS / "compare-cifar100-small.json").read_text())
    found["rows"] = {name: found["rows"][name] for name in [*found["rows"]][variant : variant + 3]}
    files.write_json(folder / "comparison.json", found)


def read_comparison(folder: Path) -> str:
    return comparison_table(files.read_json(folder / "comparison.json")).to_csv()


def write_journal(folder: Path, variant: int) -> None:
    study = _study(folder)
    while (asked := study.next(2 + variant)) is not None:
        found = {"top1": 10.0 + asked[0], "active_params": 5, "macs": 7}
        study.tell(asked[0], found)


def read_journal(folder: Path) -> str:
    study = _study(folder)
    # A last line that is cut short is dropped, and what it said is asked and told again.
    while (asked := study.next(2)) is not None:
        study.tell(asked[0], {"top1": 10.0 + asked[0], "active_params": 5, "macs": 7})
    return json.dumps([study.finished(), [trial.params for trial in study._study.trials]])


def _study(folder: Path) -> Any:
    from sigmabranch.search import Space  # noqa: PLC0415
    from sigmabranch.search.study import Study  # noqa: PLC0415

    return Study(folder / "study.log", Space().knobs([("a",), ("b",)]), 0)


def write_trials(folder: Path, variant: int) -> None:
    trial = {"number": 0, "state": "complete", "choice": {"active": 40}, "settings": [],
             "tree": {}, "active_params": 1000 + variant, "total_params": 2000, "macs": 3000,
             "top1": 50.0, "top5": 90.0, "routing_gain": 1.0, "balance": 0.9, "mean_max_p": 0.5,
             "seconds": 1.0}  # fmt: skip
    found = {"schema": 1, "task": find_task("digits-resnet").to_dict(), "trials": [trial],
             "pareto": [0], "best": 0, "rule": "", "budget_bytes": None, "epochs": 1, "seed": 0,
             "validation": {"share": 0.1, "samples": 10, "training_samples": 90},
             "source": {"top1": 60.0, "params": 5000, "macs": 9000, "seen": False}}  # fmt: skip
    files.write_json(folder / "search.json", found)


def read_trials(folder: Path) -> str:
    return search_table(files.read_json(folder / "search.json")).to_text(1000)


def write_curves(folder: Path, variant: int) -> None:
    write_csv(folder / "metrics.csv", [{"epoch": 1, "loss": 0.5 + variant}])
    if not (folder / "foreign.csv").exists():
        (folder / "foreign.csv").write_text("mine")


def read_curves(folder: Path) -> str:
    check_free(folder / "metrics.csv")
    found = (folder / "metrics.csv").read_text()
    try:
        check_free(folder / "foreign.csv")
    except CheckpointError:
        return found
    return found if not (folder / "foreign.csv").exists() else "another's file is taken for ours"


SUBJECTS = {
    "dense network": Subject(
        write=lambda folder, v: save_dense(dense(v), folder, {"seed": v}), read=read_dense
    ),
    "branched network": Subject(
        write=lambda folder, v: branched(v).save(folder, {"seed": v}), read=read_network
    ),
    "package": Subject(
        write=lambda folder, v: ignored(pack(branched(v), folder, inputs())), read=read_package
    ),
    "checkpoint": Subject(write=write_checkpoint, read=read_checkpoint),
    "result": Subject(write=write_result, read=read_result),
    "run": Subject(write=write_run, read=read_run),
    "comparison": Subject(write=write_comparison, read=read_comparison),
    "journal": Subject(write=write_journal, read=read_journal),
    "trials": Subject(write=write_trials, read=read_trials),
    "curves": Subject(write=write_curves, read=read_curves),
}


def ignored(_: Any) -> None:
    """For writers that return something."""


def digest(tensors: dict[str, Tensor], rest: Any = None) -> str:
    """All bits of some tensors and of something JSON-able."""
    found = hashlib.sha256()
    for part in _parts(tensors, rest):
        found.update(part)
    return found.hexdigest()


def _parts(tensors: dict[str, Tensor], rest: Any) -> Iterator[bytes]:
    for name, tensor in tensors.items():
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield tensor.detach().contiguous().numpy().tobytes()
    yield json.dumps(rest, default=str).encode()
