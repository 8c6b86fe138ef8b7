"""A process that runs command lines, each in a fork of its own; run by tests, never imported.

Each line of its input is a JSON object with the arguments and the folder to run in, each line of
its output the JSON list [exit code, stdout, stderr]. Imports, which cost seconds, are paid once.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from contextlib import suppress

# Loaded here so that no fork has to.
import lightning_fabric  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch._dynamo  # noqa: F401

from sigmabranch.cli import main

with suppress(ImportError):
    import matplotlib.figure  # noqa: F401
with suppress(ImportError):
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401


def run(arguments: list[str], cwd: str) -> tuple[int, str, str]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.chdir(cwd)
            sys.argv = ["sigmabranch", *arguments]
            code = 1
            try:
                main()
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return os.waitstatus_to_exitcode(status), *texts


for line in sys.stdin:
    print(json.dumps(run(**json.loads(line))), flush=True)
