"""``sigmabranch evaluate``: measure a saved network on its task's held-out split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sigmabranch import files
from sigmabranch.archive import read_manifest
from sigmabranch.cli import options
from sigmabranch.cli.screen import print_result
from sigmabranch.cli.source import read_source
from sigmabranch.conversion import Shards
from sigmabranch.errors import ConfigError
from sigmabranch.measure import evaluate, evaluate_dense
from sigmabranch.report import accuracy_table
from sigmabranch.saving import load_dense, load_net
from sigmabranch.tasks import open_task_data, ordered
from sigmabranch.training import FabricEngine, launched, launched_rank, resolve_device


def command(
    net: Annotated[Path, typer.Argument(help="Folder of a dense or branched network.")],
    data: options.Data = None,
    out: options.OutFile = None,
    seed: options.SameSeed = None,
    device: options.Device = "auto",
    settings: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Measure a saved network on its held-out split."""
    task, saved_seed = read_source(net, None, settings, made=True)
    where, shards = resolve_device(device), Shards()
    if launched():
        engine = FabricEngine(device)
        where, shards = engine.device, engine.shards
    batches = ordered(open_task_data(task, data, where).test)
    if read_manifest(net)["kind"] == "dense":
        if seed is not None:
            raise ConfigError("a dense network has no routes to shuffle: leave out --seed")
        accuracy = evaluate_dense(load_dense(net).to(where), batches, shards=shards)
    else:
        shuffle = saved_seed if seed is None else seed
        accuracy = evaluate(load_net(net).to(where), batches, seed=shuffle, shards=shards)
    if launched_rank():
        return
    if out is not None:
        files.write_json(out, accuracy)
    print_result(accuracy, accuracy_table(accuracy).to_text(), as_json)
