"""Rows dealt out to branches, and their gradients."""

from __future__ import annotations

import torch

from sigmabranch.rows import deal, hands, take


def test_a_hand_borrows_only_what_it_lacks():
    branch_B = torch.tensor([1, 0, 1, 1])
    dealt = hands(branch_B, 3, fewest=2)
    assert [(hand.rows.tolist(), hand.own) for hand in dealt] == [
        ([1, 0], 1),
        ([0, 2, 3], 3),
        ([0, 1], 0),
    ]
    assert [hand.rows.tolist() for hand in hands(branch_B, 3)] == [[1], [0, 2, 3], []]


def test_dealt_rows_and_their_gradient_are_those_of_indexing():
    torch.manual_seed(0)
    source = torch.randn(6, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    dealt = hands(torch.tensor([2, 0, 2, 2, 0, 1]), 3)
    weights = [torch.randn(len(hand.rows), 4, 3, 3) for hand in dealt]
    gradients = []
    for cut in (deal, lambda x, own: [take(x, hand.rows) for hand in own]):
        x = source.clone(memory_format=torch.preserve_format).requires_grad_()
        parts = cut(x, dealt)
        sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True)).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    assert gradients[0].is_contiguous(memory_format=torch.channels_last)


def test_nothing_is_learnt_from_borrowed_rows():
    x = torch.ones(3, 2, requires_grad=True)
    parts = deal({"feature": x}, hands(torch.tensor([0, 0, 1]), 2, fewest=2))
    assert [len(part["feature"]) for part in parts] == [2, 2]
    parts[1]["feature"].sum().backward()
    assert x.grad.tolist() == [[0, 0], [0, 0], [1, 1]]
