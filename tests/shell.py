"""The installed command, run by tests: one process each, or many lines in one that forks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

MANY = Path(__file__).with_name("many_commands.py")
COMMAND = Path(sysconfig.get_path("scripts")) / "sigmabranch"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TIMEOUT = 180


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Shell:
    """Runs command lines one after the other, for the price of one import."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, MANY],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: object, cwd: Path | None = None) -> Done:
        line = {"arguments": [str(part) for part in arguments], "cwd": str(cwd or Path.cwd())}
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        return Done(*json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(TIMEOUT)
