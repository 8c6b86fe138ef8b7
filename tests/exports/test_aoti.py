"""The compiled engine: same answers, and one body for siblings of a shape."""

from __future__ import annotations

import gc
import shutil
import weakref

import pytest
import torch

from sigmabranch.conversion import ConversionSpec, convert
from sigmabranch.deploy import Runtime, pack
from sigmabranch.tree import TreeSpec


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_leaves_share_a_body_and_say_what_the_network_says(
    dense, batches, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec = ConversionSpec(balanced=True, centred=True, norm_samples=32, restarts=2)
    net = convert(dense, batches, TreeSpec.balanced(1, projection_dim=8), spec=spec)
    x, _ = batches[0]
    package = pack(net, tmp_path / "package", x[:1])
    with Runtime.open(package.folder, engine="aoti") as runtime, torch.no_grad():
        leaves = set()
        for sample in x:
            prediction = runtime.predict(sample)
            leaves.add(prediction.leaf)
            expected = net.hard(sample[None]).logits[0]
            torch.testing.assert_close(prediction.logits, expected, rtol=1e-3, atol=1e-4)
        assert leaves == {"0", "1"}
        held = [weakref.ref(h.memory) for h in runtime._residency._held.values() if h.memory]
        runtime.forget()
        gc.collect()
        assert held and not any(memory() for memory in held)  # a body keeps no weights
    bodies = list((tmp_path / "cache" / "sigmabranch" / "aoti").glob("*.pt2"))
    assert len(bodies) == 3  # the trunk, its router, and one for both leaves
