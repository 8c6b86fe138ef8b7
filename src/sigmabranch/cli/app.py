"""The ``sigmabranch`` command: its verbs, and how their failures end.

Exit codes: 0 done, 2 bad input, 3 stopped early with a checkpoint.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated, NoReturn

import typer

from sigmabranch.cli import convert, count, demo, evaluate, finetune, run, train
from sigmabranch.errors import SigmaBranchError
from sigmabranch.tasks import Stopped
from sigmabranch.version import __version__

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


def main() -> None:
    """Run the command line; a failure that is the input's fault is one line and exit code 2."""
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    try:
        status = app(standalone_mode=False)
    except SigmaBranchError as error:
        _fail(str(error), error.exit_code)
    except Stopped as stopped:
        _fail(f"stopped: {stopped}", 3)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted; the same command continues from the last complete step", 130)
    except typer.TyperException as error:
        # Only the formatted message names the option.
        message = getattr(error, "format_message", error.__str__)()
        _fail(f"{message.rstrip('.')}; see --help", 2)
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror}; free space or check the path", 2)
    sys.stdout.flush()
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> NoReturn:
    print(f"sigmabranch: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
