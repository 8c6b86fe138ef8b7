import math

import pytest
import torch

from sigmabranch.measure.routes import (
    agreement,
    balance,
    leaf_class_information,
    shuffled_accuracy,
)


def test_balance_is_one_for_equal_use_and_zero_for_a_single_leaf():
    assert balance(torch.tensor([25, 25, 25, 25])) == pytest.approx(1)
    assert balance(torch.tensor([0, 100, 0, 0])) == 0
    assert balance(torch.tensor([50, 50, 0, 0])) == pytest.approx(0.5)


def test_information_is_one_when_the_class_decides_the_leaf_and_zero_when_it_does_not():
    assert leaf_class_information(torch.eye(4).long().repeat(3, 1)) == pytest.approx(1)
    independent_VL = torch.tensor([1, 2, 3])[:, None] * torch.tensor([4, 1, 5, 2])
    assert leaf_class_information(independent_VL) == pytest.approx(0, abs=1e-12)


def test_information_of_a_noisy_table_is_the_textbook_sum():
    count_VL = torch.tensor([[8.0, 2.0], [1.0, 5.0]])
    joint = count_VL / count_VL.sum()
    outer = joint.sum(1, keepdim=True) * joint.sum(0)
    expected = (joint * (joint / outer).log()).sum().item() / math.log(2)
    assert leaf_class_information(count_VL) == pytest.approx(expected)


def test_agreement_counts_pairs_of_leaves():
    predicted_BL = torch.tensor([[1, 1, 1, 1], [0, 1, 2, 3], [1, 1, 2, 2], [1, 1, 1, 5]])
    assert agreement(predicted_BL).tolist() == pytest.approx([1, 0, 2 / 6, 3 / 6])


def test_shuffled_routes_score_what_usage_and_leaf_accuracy_foretell():
    generator = torch.Generator().manual_seed(3)
    correct_NL = torch.rand(5000, 3, generator=generator) < torch.tensor([0.9, 0.5, 0.1])
    leaf_N = torch.multinomial(
        torch.tensor([0.6, 0.3, 0.1]), 5000, replacement=True, generator=generator
    )
    usage_L = torch.bincount(leaf_N, minlength=3) / 5000
    expected = (usage_L * correct_NL.float().mean(0)).sum().item()
    assert shuffled_accuracy(correct_NL, leaf_N, seed=0) == pytest.approx(expected, abs=0.005)


def test_shuffled_routes_repeat_under_a_seed_and_lose_what_routing_knew():
    leaf_N = torch.arange(1000) % 2
    correct_NL = torch.nn.functional.one_hot(leaf_N, 2).bool()  # only the chosen leaf is right
    first = shuffled_accuracy(correct_NL, leaf_N, seed=7)
    assert first == shuffled_accuracy(correct_NL, leaf_N, seed=7)
    assert first != shuffled_accuracy(correct_NL, leaf_N, seed=8)
    assert first == pytest.approx(0.5, abs=0.02)
