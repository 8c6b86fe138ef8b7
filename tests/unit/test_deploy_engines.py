"""Engines that cannot be had are refused; tests/exports runs the compiled one."""

from __future__ import annotations

import pytest
import torch

from sigmabranch.deploy import Runtime, pack
from sigmabranch.errors import ConfigError


def test_an_unknown_engine_is_refused(dense, tmp_path):
    pack(dense, tmp_path, torch.zeros(1, 1, 8, 8))
    with pytest.raises(ConfigError, match="unknown engine 'fast': choose from eager, aoti"):
        Runtime.open(tmp_path, engine="fast")


def test_without_a_compiler_it_says_what_to_install(dense, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    pack(dense, tmp_path, torch.zeros(1, 1, 8, 8))
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler: install g\+\+"):
        Runtime.open(tmp_path, engine="aoti")
