"""Curves on disk, and what is said when an optional package is missing."""

from __future__ import annotations

import csv
import sys

import pytest

from sigmabranch.errors import MissingDependency
from sigmabranch.training import Event, FabricEngine, TensorBoardLog
from sigmabranch.training.logs import write_csv


def test_csv_keeps_numbers_exactly_and_flattens_lists(tmp_path):
    path = tmp_path / "metrics.csv"
    first = {"epoch": 1, "loss": 0.1 + 0.2, "usage": [0.25, 0.75], "share": [[1, 0]], "mi": None}
    write_csv(path, [first, {"epoch": 2, "loss": 0.1, "top1": 50.0}])
    rows = list(csv.DictReader(path.open()))
    assert list(rows[0]) == ["epoch", "loss", "usage", "top1"]
    assert float(rows[0]["loss"]) == 0.1 + 0.2
    assert rows[0]["usage"] == "0.25 0.75"
    assert rows[0]["top1"] == ""
    assert rows[1]["top1"] == "50.0"


def test_csv_is_cut_back_when_epochs_are_taken_back(tmp_path):
    path = tmp_path / "metrics.csv"
    for epochs in (3, 1):
        write_csv(path, [{"epoch": epoch} for epoch in range(epochs)])
    assert len(list(csv.DictReader(path.open()))) == 1


def test_tensorboard_receives_each_epochs_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TensorBoardLog(tmp_path)
    for epoch in (1, 2):
        record = {"loss": 1 / epoch, "usage": [0.5, 0.5], "mi": None}
        log(Event(kind="epoch", epoch=epoch, epochs=2, step=0, steps=5, metrics=record))
    log(Event(kind="end", epoch=2, epochs=2, step=0, steps=5))
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(point.step, point.value) for point in found] == [(1, 1.0), (2, 0.5)]


@pytest.mark.parametrize(
    ("package", "make"),
    [("lightning_fabric", FabricEngine), ("torch.utils.tensorboard", lambda: TensorBoardLog("x"))],
)
def test_missing_package_names_what_to_install(monkeypatch, package, make):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependency, match=r"pip install 'sigma-branch\[train\]'"):
        make()
