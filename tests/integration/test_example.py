"""The example that a newcomer reads first."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "minimal.py"


def test_example_is_short_and_branches_a_network_of_the_users_own(tmp_path: Path) -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 120
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLE), "--epochs", "3"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # other tests run on the other core
        check=False,
    )
    assert run.returncode == 0, run.stderr
    dense, branched = (float(value) for value in re.findall(r"([\d.]+) %  ", run.stdout))
    stored, active = (int(value.replace(",", "")) for value in re.findall(r"[\d,]{6,}", run.stdout))
    assert dense > 90
    assert branched > 90
    assert active < 0.45 * stored
    assert re.search(r"one image: \d by leaf [0-3]", run.stdout)
    assert not list(tmp_path.iterdir()), "the example leaves files behind"
