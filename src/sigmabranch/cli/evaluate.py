"""``sigmabranch evaluate``: measure a saved network on a split of its task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from sigmabranch import files
from sigmabranch.cli import options
from sigmabranch.cli.screen import print_result
from sigmabranch.cli.source import read_source
from sigmabranch.conversion import Shards
from sigmabranch.errors import ConfigError
from sigmabranch.measure import evaluate
from sigmabranch.net import is_branched
from sigmabranch.report import accuracy_table
from sigmabranch.saving import load
from sigmabranch.tasks import Task, open_task_data, ordered
from sigmabranch.training import FabricEngine, launched, launched_rank, resolve_device


def command(
    net: Annotated[Path, typer.Argument(help="Folder of a saved network.")],
    data: options.Data = None,
    split: Annotated[
        str,
        typer.Option(help="test, or held-out: what data.held_out keeps.", metavar="NAME"),
    ] = "test",
    out: options.OutFile = None,
    seed: options.SameSeed = None,
    device: options.Device = "auto",
    settings: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Measure a saved network on its test split, or on the samples held out of training."""
    task, saved_seed = read_source(net, None, settings, made=True)
    where, shards = resolve_device(device), Shards()
    if launched():
        engine = FabricEngine(device)
        where, shards = engine.device, engine.shards
    batches = ordered(open_task_data(task, data, where).measured(split))
    if split != "test":
        _check_unseen(net, task, data)
    model = load(net).to(where)
    if seed is not None and not is_branched(model):
        raise ConfigError("a network without branches has no routes to shuffle: leave out --seed")
    shuffle = saved_seed if seed is None else seed
    accuracy = evaluate(model, batches, seed=shuffle, shards=shards)
    if launched_rank():
        return
    if out is not None:
        files.write_json(out, accuracy)
    print_result(accuracy, accuracy_table(accuracy).to_text(), as_json)


def _check_unseen(net: Path, task: Task, data: Path | None) -> None:
    """Refuse to hold out what a network was trained on."""
    trained, _ = read_source(net, None, None)
    if trained.data == task.data:
        return
    unlimited = replace(task, data=replace(task.data, train_limit=None))
    seen, unseen = (
        len(open_task_data(each, data, torch.device("cpu")).train) for each in (trained, unlimited)
    )
    if seen > unseen:
        raise ConfigError(
            f"{net} has learnt from {seen - unseen} of the samples that data.held_out="
            f"{task.data.held_out} holds out: train it with that setting"
        )
