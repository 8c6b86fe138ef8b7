"""``sigmabranch count``: parameters, bytes and multiply-adds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from sigmabranch import files
from sigmabranch.cli import options
from sigmabranch.cli.screen import print_result
from sigmabranch.cli.source import read_source
from sigmabranch.errors import ConfigError
from sigmabranch.peers import find_system
from sigmabranch.report import cost_table
from sigmabranch.saving import load
from sigmabranch.tasks import count_net, count_task, find_task
from sigmabranch.tasks.task import parsed


def command(
    what: Annotated[
        str, typer.Argument(metavar="TASK|NET", help="A task, or the folder of a saved network.")
    ],
    out: options.OutFile = None,
    settings: options.Set = None,
    peer: Annotated[
        str | None,
        typer.Option(
            help="Count this system instead of Sigma-Branch: a name of compare's; --set then also "
            "takes its settings, e.g. rate=0.3.",
            show_default=False,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Count parameters, bytes and MACs, without data."""
    if peer is not None:
        cost = _count_peer(what, peer, settings or ())
    elif Path(what).is_dir():
        task, _ = read_source(Path(what), None, settings, made=True)
        cost = count_net(load(what), task)
    else:
        cost = count_task(find_task(what).with_settings(settings or ()))
    if out is not None:
        files.write_json(out, cost)
    print_result(cost, cost_table(cost).to_text(), as_json)


def _count_peer(what: str, peer: str, settings: Iterable[str]) -> dict[str, Any]:
    """Count one system; a setting is its own if it has a field of that name, else the task's."""
    system, general, own = find_system(peer), [], {}
    fields = system.to_dict().keys() - {"name"}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if equals and key in fields:
            own[key] = parsed(value)
        else:
            general.append(setting)
    try:
        task = find_task(what).with_settings(general)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; {peer} has {', '.join(sorted(fields)) or 'no settings'}"
        ) from error
    return system.changed(own).count(task)
