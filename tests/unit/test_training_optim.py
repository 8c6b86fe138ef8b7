"""What moves the weights: decay groups, schedules, averages, node gradient scaling."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from torch import nn

from sigmabranch.training import Recipe
from sigmabranch.training.optim import NodeScale, build_average, build_optimizer, lr_factor


class Tree(nn.Module):
    """Root, two nodes and three leaves (node 1 is split again), one linear map each."""

    under: ClassVar = {"root": (0, 1, 2), "0": (0,), "1": (1, 2), "1-0": (1,), "1-1": (2,)}

    def __init__(self):
        super().__init__()
        self.maps = nn.ModuleDict({node: nn.Linear(3, 2) for node in self.under})

    def node_parameters(self):
        return {node: list(self.maps[node].parameters()) for node in self.under}

    def node_log_prob(self, log_prob_BL):
        return {node: log_prob_BL[:, at].logsumexp(1) for node, at in self.under.items()}


def decays(optimizer, model):
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: group["weight_decay"]
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_biases_and_norms_are_not_decayed():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    found = decays(build_optimizer(model, Recipe(weight_decay=0.01)), model)
    assert found == {"0.weight": 0.01, "0.bias": 0, "1.weight": 0, "1.bias": 0}


def test_biases_and_norms_are_decayed_on_request():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    recipe = Recipe(weight_decay=0.01, decay_norm_and_bias=True, optimizer="adam")
    assert set(decays(build_optimizer(model, recipe), model).values()) == {0.01}


def test_weights_that_the_model_exempts_are_not_decayed():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model.no_weight_decay = lambda: {"1.weight"}
    found = decays(build_optimizer(model, Recipe(weight_decay=0.01)), model)
    assert found["0.weight"] == 0.01
    assert found["1.weight"] == 0


def test_frozen_parameters_get_no_optimizer_state():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    assert set(decays(build_optimizer(model, Recipe()), model)) == {"1.weight", "1.bias"}


def test_cosine_warms_up_to_the_peak_and_ends_near_zero():
    recipe = Recipe(epochs=10, warmup_epochs=1.5)
    factors = [lr_factor(recipe, step, 20) for step in range(200)]
    assert all(a < b for a, b in pairwise(factors[:31]))
    assert factors[30] == 1.0
    assert all(a > b for a, b in pairwise(factors[30:]))
    assert factors[115] == pytest.approx(0.5)
    assert 0 < factors[-1] < 1e-3


def test_step_schedule_drops_at_whole_epochs():
    recipe = Recipe(epochs=60, schedule="step", warmup_epochs=0, step_epochs=20, step_factor=0.7)
    assert [lr_factor(recipe, epoch * 5 - 1, 5) for epoch in (20, 40)] == [1.0, 0.7]
    assert [lr_factor(recipe, epoch * 5, 5) for epoch in (20, 40)] == pytest.approx([0.7, 0.49])


def test_warm_up_longer_than_the_run_is_no_error():
    recipe = Recipe(epochs=1, warmup_epochs=5)
    assert lr_factor(recipe, 9, 10) == pytest.approx(10 / 51)


def test_average_follows_floats_and_copies_integers():
    model = nn.BatchNorm1d(2)
    model.register_buffer("table", torch.tensor([-4, -1, 3]))
    average = build_average(model, Recipe(ema_decay=0.9))
    for value in (1.0, 2.0, 3.0):
        nn.init.constant_(model.weight, value)
        model.running_mean.fill_(10 * value)
        model.num_batches_tracked += 1
        average.update_parameters(model)
    assert average.module.weight.tolist() == pytest.approx([1.29, 1.29])
    assert average.module.running_mean.tolist() == pytest.approx([12.9, 12.9])
    assert average.module.table.tolist() == [-4, -1, 3]
    assert average.module.num_batches_tracked.item() == 3


def test_each_nodes_gradient_is_divided_by_its_probability_and_the_trunks_is_not():
    net = Tree()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    NodeScale(net, 3, torch.device("cpu"))(torch.tensor([0.5, 0.3, 0.2]))
    scale = {node: net.maps[node].weight.grad[0, 0].item() for node in net.under}
    expected = {"root": 1.0, "0": 2.0, "1": 2.0, "1-0": 1 / 0.3, "1-1": 5.0}
    assert scale == pytest.approx(expected)


def test_a_leaf_that_nobody_reaches_gets_a_finite_scale():
    net = Tree()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    NodeScale(net, 3, torch.device("cpu"))(torch.tensor([1.0, 0.0, 0.0]))
    assert net.maps["1-0"].weight.grad.isfinite().all()


def test_scaled_leaf_learns_as_if_it_were_alone():
    torch.manual_seed(0)
    leaves = nn.ModuleList(nn.Linear(3, 2) for _ in range(4))
    x, y = torch.randn(6, 3), torch.randint(2, (6,))

    class Net(nn.Module):
        def node_parameters(self):
            return {str(i): list(leaf.parameters()) for i, leaf in enumerate(leaves)}

        def node_log_prob(self, log_prob_BL):
            return {str(i): log_prob_BL[:, i] for i in range(4)}

    (sum(0.25 * nn.functional.cross_entropy(leaf(x), y) for leaf in leaves)).backward()
    NodeScale(Net(), 4, torch.device("cpu"))(torch.full((4,), 0.25))
    for leaf in leaves:
        alone = torch.autograd.grad(nn.functional.cross_entropy(leaf(x), y), leaf.weight)[0]
        torch.testing.assert_close(leaf.weight.grad, alone)
