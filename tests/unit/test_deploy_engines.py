"""Engines that cannot be had are refused, and a compiled body is named by all that it depends on.

tests/exports runs the compiled one.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sigmabranch.deploy import Runtime, pack
from sigmabranch.deploy.engines.aoti import body_key, exported
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


class Attribute(nn.Module):
    """Two of these print alike, whatever the attribute and the constant."""

    def __init__(self, heads: int = 3, factor: float = 2.0, constant: float = 1.0) -> None:
        super().__init__()
        self.fc, self.heads, self.factor = nn.Linear(6, 6), heads, factor
        self.constant = constant

    def forward(self, x):
        y = self.fc(x).unflatten(1, (self.heads, -1)).softmax(2).flatten(1)
        return self.factor * y + torch.tensor([self.constant])


def key_of(module, x=torch.ones(1, 6)):
    tensors = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    return body_key(exported(module.eval(), tensors, x), tensors, x)


def test_modules_that_differ_in_an_attribute_only_have_bodies_of_their_own():
    modules = [Attribute(), Attribute(heads=2), Attribute(factor=3.0), Attribute(constant=5.0)]
    assert len({str(module) for module in modules}) == 1
    assert len({key_of(module) for module in modules}) == 4


def test_modules_that_differ_in_their_weights_only_share_a_body():
    assert key_of(Attribute()) == key_of(Attribute())


def test_siblings_may_store_their_weights_in_another_order():
    module, x = Attribute().eval(), torch.ones(1, 6)
    tensors = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    turned = dict(reversed(tensors.items()))
    one, other = (exported(module, stored, x) for stored in (tensors, turned))
    assert body_key(one, tensors, x) == body_key(other, turned, x)


def test_a_body_is_for_one_layout_of_its_input():
    x = torch.ones(2, 6)
    assert key_of(Attribute(), x) != key_of(Attribute(), x.T.contiguous().T)
