"""What every way of predicting refuses, and from where it may be asked."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from sigmabranch.conversion import ConversionSpec, convert
from sigmabranch.deploy import Runtime, pack
from sigmabranch.deploy.checks import checked_branch, checked_input
from sigmabranch.errors import ConfigError, DataError, NumericError, SigmaBranchError
from sigmabranch.tree import TreeSpec

pytestmark = pytest.mark.usefixtures("one_registry")


@pytest.fixture(scope="module")
def case(dense, batches, tmp_path_factory):
    """A network of two leaves, its inputs, and its folder for each engine."""
    spec = ConversionSpec(balanced=True, centred=True, norm_samples=32, restarts=2)
    net = convert(dense, batches, TreeSpec.balanced(1, projection_dim=8), spec=spec)
    x = torch.cat([x for x, _ in batches])
    folder = tmp_path_factory.mktemp("case")
    pack(net, folder / "eager", x[:1])
    return net, x, folder


def opened(case, engine):
    net, x, folder = case
    if engine == "eager":
        return Runtime.open(folder / "eager")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from sigmabranch.deploy.export import export_net
    from sigmabranch.deploy.onnx_path import OnnxPath

    if not (folder / "onnx").exists():
        export_net(net, folder / "onnx", x[:2], format="onnx-nodes")
    return OnnxPath(folder / "onnx")


ENGINES = pytest.mark.parametrize("engine", ["eager", "onnx"])
SHAPE = (1, 8, 8)
STRANGE = {
    "a list": [[0.0]],
    "nothing": None,
    "an array": np.zeros(SHAPE, dtype=np.float64),
    "sparse": torch.zeros(SHAPE).to_sparse(),
    "meta": torch.zeros(SHAPE, device="meta"),
    "nested": torch.nested.nested_tensor([torch.zeros(8, 8)]),
    "jagged": torch.nested.nested_tensor([torch.zeros(8, 8)], layout=torch.jagged),
    "quantized": torch.quantize_per_tensor(torch.zeros(SHAPE), 1.0, 0, torch.quint8),
    "complex": torch.zeros(SHAPE, dtype=torch.complex64),
    "another shape": torch.zeros(2, *SHAPE),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_inputs_are_ours_in_one_line(kind):
    with pytest.raises(DataError) as caught:
        checked_input(STRANGE[kind], SHAPE)
    assert "\n" not in str(caught.value)


@ENGINES
def test_every_runtime_checks_its_input(case, engine):
    _, x, _ = case
    with opened(case, engine) as runtime:
        with pytest.raises(DataError, match="of type list"):
            runtime.predict([0.0])
        with pytest.raises(DataError):
            runtime([0.0])
        trained = x[:1].clone().requires_grad_()
        assert torch.equal(runtime.predict(trained).logits, runtime.predict(x[:1]).logits)


def test_an_array_is_checked_as_a_tensor_is(case):
    _, x, _ = case
    with opened(case, "onnx") as path:
        logits, _ = path(x[:1].numpy()[:, :, ::-1])
        assert logits.shape == (1, 5)
        for wrong in (x[:2].numpy(), x[:1].double().numpy(), x[:1].numpy() * np.float32("nan")):
            with pytest.raises(DataError):
                path(wrong)


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_a_router_without_an_answer_chooses_no_branch(kind):
    assert checked_branch(kind([[-np.inf, -0.5]])) == 1
    for answer in ([[np.nan, 0.0]], [[0.0, np.nan]], [[-np.inf, -np.inf]], [[np.inf, 0.0]]):
        with pytest.raises(NumericError, match="a router gave NaN"):
            checked_branch(kind(answer))


@ENGINES
def test_several_threads_get_their_own_answers(case, engine):
    net, x, _ = case
    with torch.no_grad():
        expected = net.hard(x).logits
    with opened(case, engine) as runtime, ThreadPoolExecutor(6) as threads:
        runtime.predict(x[0])
        found = [*threads.map(lambda number: runtime.predict(x[number % 96]).logits, range(288))]
        forgetting = threads.submit(lambda: [runtime.forget() for _ in range(20)])
        found += threads.map(lambda number: runtime.predict(x[number]).logits, range(96))
        forgetting.result()
    torch.testing.assert_close(torch.stack(found), expected.repeat(4, 1), rtol=1e-3, atol=1e-4)


@ENGINES
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_fork_is_told_to_open_the_folder_itself(case, engine):
    """Its copies of locks may be held, by threads that stayed behind."""
    _, x, _ = case
    context = multiprocessing.get_context("fork")
    with opened(case, engine) as runtime:
        expected = runtime.predict(x[0]).logits
        said = context.SimpleQueue()

        def use():
            for ask in (lambda: runtime.predict(x[0]), runtime.forget):
                try:
                    ask()
                except SigmaBranchError as error:
                    said.put(str(error))
            runtime.close()
            said.put("closed")

        with runtime._lock:  # as if another thread were at work
            child = context.Process(target=use)
            child.start()
            child.join(60)
        assert child.exitcode == 0
        told = [said.get() for _ in range(3)]
        assert all("open the folder again in this process" in line for line in told[:2])
        assert told[2] == "closed"
        assert torch.equal(runtime.predict(x[0]).logits, expected)


@ENGINES
def test_a_runtime_is_not_copied(case, engine):
    with opened(case, engine) as runtime:
        for copying in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(ConfigError, match="cannot be copied or sent"):
                copying(runtime)
