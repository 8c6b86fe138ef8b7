"""The ``sigmabranch`` command: its verbs, and how their failures end.

Exit codes: 0 done, 2 bad input, 3 stopped early (on request, or because another process of the run
was lost) with a checkpoint, 4 some rows of a comparison failed, 130 or 143 interrupted (Ctrl-C or
SIGTERM) where no checkpoint is written. Of several processes the first speaks for all.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, NoReturn

import typer

from sigmabranch.cli import (
    best,
    compare,
    convert,
    count,
    demo,
    evaluate,
    export,
    finetune,
    pack,
    predict,
    push,
    quantize,
    recipe,
    run,
    search,
    simulate,
    table,
    train,
    view,
)
from sigmabranch.errors import SigmaBranchError
from sigmabranch.tasks import Stopped
from sigmabranch.training import launched_rank, leave_processes, naming_lost_processes
from sigmabranch.version import __version__

# How long the first process has to report a failure that all share, before the others do.
PRECEDENCE_SECONDS = 10.0
INTERRUPTED, TERMINATED = 130, 143
# Verbs of several steps or with checkpoints; the others write all or nothing.
CONTINUING = ("compare", "demo", "finetune", "run", "search", "train")

app = typer.Typer(
    name="sigmabranch",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Turn a dense network into one that runs a single root-to-leaf path per input."""
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


app.command("demo")(demo.command)
app.command("run")(run.command)
app.command("train")(train.command)
app.command("convert")(convert.command)
app.command("finetune")(finetune.command)
app.command("evaluate")(evaluate.command)
app.command("count")(count.command)
app.command("best")(best.command)
app.command("compare")(compare.command)
app.command("export")(export.command)
app.command("pack")(pack.command)
app.command("predict")(predict.command)
app.command("view")(view.command)
app.command("quantize")(quantize.command)
app.command("push")(push.command)
app.command("recipe")(recipe.command)
app.command("search")(search.command)
app.command("simulate")(simulate.command)
app.command("table")(table.command)


def main() -> None:
    """Run the command line; a failure that is the input's fault is one line and exit code 2."""
    try:
        with _terminable(), naming_lost_processes("the last checkpoint"):
            status = app(standalone_mode=False)
            if status == INTERRUPTED:  # which is all that typer leaves of Ctrl-C
                raise KeyboardInterrupt
            leave_processes()
    except SigmaBranchError as error:
        _fail(str(error), error.exit_code)
    except Stopped as stopped:
        _fail(f"stopped: {stopped}", 3, shared=True)
    except (typer.Abort, KeyboardInterrupt):
        _fail(f"interrupted; the same command {_goes_on()}", INTERRUPTED, shared=True)
    except _Terminated:
        _fail(f"terminated; the same command {_goes_on()}", TERMINATED, shared=True)
    except typer.TyperException as error:
        # Only the formatted message names the option.
        message = getattr(error, "format_message", error.__str__)()
        _fail(f"{message.rstrip('.')}; see --help", 2, shared=True)
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror}; free space or check the path", 2)
    sys.stdout.flush()
    sys.exit(status if isinstance(status, int) else 0)


class _Terminated(BaseException):
    """SIGTERM, which ends a command as Ctrl-C does: what is half written goes."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Outside training, where the signal asks for a checkpoint."""
    # Python handles a signal only between two operations, and an exchange with lost processes can
    # be a long one: a launcher must be able to end it.
    alone = "RANK" not in os.environ
    if not alone or threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _goes_on() -> str:
    """What the same command does after an interrupt."""
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    return "continues from the last complete step" if verb in CONTINUING else "starts anew"


def _fail(message: str, status: int, *, shared: bool = False) -> NoReturn:
    """Print one line and end; of a failure that all processes share, only the first prints it."""
    rank = launched_rank()
    if rank and not shared:
        # A launcher ends the others when the first has failed; alone, this one must speak.
        time.sleep(PRECEDENCE_SECONDS)
    if not (rank and shared):
        who = f"sigmabranch, process {rank}" if rank else "sigmabranch"
        print(f"{who}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(status)
