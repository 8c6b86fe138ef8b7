"""``sigmabranch push``: a saved network and its card go to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sigmabranch import files
from sigmabranch.archive import read_manifest
from sigmabranch.cli import options
from sigmabranch.cli.screen import print_result
from sigmabranch.hub import push_to_hub
from sigmabranch.tasks import Task


def command(
    net: Annotated[Path, typer.Argument(help="Folder of a saved network.")],
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="Where on the Hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Of a new repository: only for its owner.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Upload a network and a card with what its run measured; log in with 'hf auth login'."""
    figures = measured(net)
    url = push_to_hub(net, repo_id, private=private or None, **figures)
    top1 = figures["evaluation"]["top1"] if "evaluation" in figures else None
    accuracy = "without figures" if top1 is None else f"{top1:.2f} % top-1"
    print_result({"repo_id": repo_id, "url": url, "top1": top1}, f"{url}: {accuracy}", as_json)


def measured(folder: Path) -> dict[str, Any]:
    """What the card of a network in a run's folder can say: the run's data and its figures.

    Raises:
        CheckpointError: no network, or a damaged file of its run.
        ConfigError: its notes hold no task of this version.
    """
    notes = read_manifest(folder)["notes"]
    if "task" not in notes:
        return {}
    dataset = {"dataset": Task.from_dict(notes["task"]).data.name}
    run, step = folder.resolve().parent, folder.resolve().name
    origin = {name: notes.get(name) for name in ("task", "seed")}
    # Figures beside a network are its own only if the run that they are of made it.
    if not (run / "measured.json").exists() or files.read_json(run / "task.json") != origin:
        return dataset
    found = files.read_json(run / "measured.json")
    parts = {"evaluation": step}
    if step != "dense":
        parts |= {"dense_evaluation": "dense", "cost": "cost"}
    return dataset | {name: found[part] for name, part in parts.items() if step in found}
