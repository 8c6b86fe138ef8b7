"""The house: which room imports which, what importing costs, and where every name leads."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import sysconfig
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest

import sigmabranch
from sigmabranch.errors import ConfigError
from sigmabranch.tasks import TASKS, setting_keys
from sigmabranch.tasks.task import SECTIONS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "sigmabranch"
HEAVY = {
    *("timm", "torchvision", "lightning_fabric", "lightning", "matplotlib", "jinja2", "typer"),
    *("click", "rich", "sklearn", "scipy", "PIL", "fvcore", "tensorboard", "pandas", "h5py"),
    *("onnx", "onnxscript", "onnxruntime", "executorch", "litert_torch", "ai_edge_litert"),
    *("optuna", "huggingface_hub"),
}

LEAN = f"""
import json, sys
import torch
before = set(sys.modules)
import sigmabranch
from sigmabranch import TreeSpec
TreeSpec()
loaded = {{name.partition(".")[0] for name in set(sys.modules) - before}}
rooms = sorted(name for name in sys.modules if name.startswith("sigmabranch."))
import sigmabranch.cli
print(json.dumps({{
    "heavy": sorted(loaded & {HEAVY!r}),
    "rooms": rooms,
    "drawing": sorted({{"matplotlib", "jinja2"}} & set(sys.modules)),
    "cuda": torch.cuda.is_initialized(),
}}))
"""


def test_rooms_import_only_rooms_below_them():
    if find_spec("importlinter") is None:
        pytest.skip("import-linter is not installed")
    command = Path(sysconfig.get_path("scripts")) / "lint-imports"
    done = subprocess.run(
        [command, "--no-cache", "--config", ROOT / "pyproject.toml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_conversion_knows_no_kind_of_network():
    """What differs between images and clouds, convolutions and points, lives in the adapters."""
    sources = {path.name: path.read_text() for path in (PACKAGE / "conversion").glob("*.py")}
    assert "growth.py" in sources
    for name, source in sources.items():
        assert not re.findall(
            r"\b(?:conv\w*[1-3]d|resnets?|images?|points|clouds?|xyz)\b", source, re.I
        ), name


def test_importing_the_package_costs_no_more_than_importing_torch():
    done = subprocess.run(
        [sys.executable, "-c", LEAN], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seen = json.loads(done.stdout)
    assert seen["heavy"] == []
    assert not seen["cuda"]
    assert seen["drawing"] == []
    assert "sigmabranch.training" not in seen["rooms"]
    assert "sigmabranch.cli" not in seen["rooms"]


@pytest.mark.parametrize("name", sigmabranch.__all__)
def test_every_public_name_leads_somewhere(name):
    assert getattr(sigmabranch, name) is not None
    assert name in dir(sigmabranch)


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = sigmabranch.nothing


@pytest.mark.parametrize(
    "room",
    [
        "backbones",
        "conversion",
        "coupling",
        "data",
        "deploy",
        "measure",
        "peers",
        "race",
        "report",
        "search",
        "tasks",
        "view",
    ],
)
def test_every_name_a_room_offers_is_there(room):
    module = importlib.import_module(f"sigmabranch.{room}")
    assert sorted(module.__all__) == sorted(set(module.__all__))
    assert all(hasattr(module, name) for name in module.__all__)


def test_every_field_of_every_spec_can_be_set():
    for task in TASKS.values():
        specs = {section: getattr(task, section) for section in SECTIONS}
        keys = {f"{section}.{part.name}" for section in specs for part in fields(specs[section])}
        assert {*setting_keys(task)} == keys | {"tree.depth"}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_setting_every_field_to_what_it_is_changes_nothing(task):
    written = {name: part for name, part in task.to_dict().items() if isinstance(part, dict)}
    settings = [
        f"{section}.{name}={json.dumps(value)}"
        for section, part in written.items()
        for name, value in part.items()
        if (section, name) != ("model", "family")  # a task is of one family
    ]
    assert task.with_settings(settings) == task


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_value_of_no_fields_type_is_refused_whatever_the_field(task):
    for key in {*setting_keys(task)} - {"tree.depth"}:
        with pytest.raises(ConfigError):
            task.with_settings([f'{key}={{"a": [1]}}'])
