"""Training with a plain loader, as a user with a network of their own does it."""

from __future__ import annotations

import copy

import pytest
import torch

import sigmabranch as sb
from sigmabranch.errors import CheckpointError, ConfigError, DataError

TREE = sb.TreeSpec(projection_dim=8)
RECIPE = sb.FinetuneRecipe(epochs=1, lr=0.01, warmup_epochs=0)


def converted(dense, batches, seed: int) -> sb.SigmaBranchNet:
    return sb.convert(dense, batches, TREE, spec=sb.ConversionSpec(seed=seed, restarts=2))


def test_finetuning_into_a_folder_of_another_conversion_is_refused(dense, batches, tmp_path):
    sb.finetune(converted(dense, batches, 0), batches, RECIPE, folder=tmp_path, device="cpu")
    other = converted(dense, batches, 1)
    with pytest.raises(CheckpointError, match="record"):
        sb.finetune(other, batches, RECIPE, folder=tmp_path, device="cpu")


def test_finetuning_without_a_folder_starts_anew_every_time(dense, batches):
    net = converted(dense, batches, 0)
    before = net.trunk.state_dict()["conv1.weight"].clone()
    first = sb.finetune(net, batches, RECIPE, device="cpu")
    after = net.trunk.state_dict()["conv1.weight"].clone()
    second = sb.finetune(net, batches, RECIPE, device="cpu")
    assert first.complete and second.complete
    assert not torch.equal(before, after)
    assert not torch.equal(after, net.trunk.state_dict()["conv1.weight"])


def test_a_label_beyond_the_head_is_named(dense, batches):
    net = converted(dense, batches, 0)
    wrong = [(x, y + 3) for x, y in batches]
    with pytest.raises(DataError, match="labels reach from 3 to 7, the network has 5 classes"):
        sb.finetune(net, wrong, RECIPE, device="cpu")


def test_a_recipe_for_dense_networks_is_refused(dense, batches):
    with pytest.raises(ConfigError, match="takes a FinetuneRecipe, not a Recipe"):
        sb.finetune(converted(dense, batches, 0), batches, sb.Recipe(), device="cpu")


@pytest.mark.parametrize("kind", ["half", "bfloat16", "double"])
def test_routers_keep_every_bit_when_the_network_changes_its_numbers(dense, batches, kind):
    net = converted(dense, batches, 0)
    before = copy.deepcopy(net.routers.state_dict())
    after = getattr(net, kind)().routers.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_halved_network_still_routes_in_float32(dense, batches):
    net = converted(dense, batches, 0).double()
    out = net.hard(batches[0][0].double())
    assert out.log_prob.dtype == torch.float32
    assert out.logits.dtype == torch.float64
    assert all(p.dtype == torch.float32 for p in net.routers.parameters())
