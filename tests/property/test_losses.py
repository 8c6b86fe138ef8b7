"""What holds for the branched loss on every batch. B batch, L leaves, V classes."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sigmabranch.training import FinetuneRecipe, branched_loss
from sigmabranch.training.losses import balance, responsibility

sizes = st.tuples(st.integers(1, 6), st.integers(2, 8), st.integers(2, 9))
seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([0.0, 1.0, 30.0, 1e4])
recipes = st.builds(
    FinetuneRecipe,
    label_smoothing=st.sampled_from([0.0, 0.1]),
    resp_temperature=st.floats(0.05, 20),
    resp_prior=st.booleans(),
    balance_weight=st.sampled_from([0.0, 1.0]),
)


def draw(size, seed, scale):
    b, leaves, classes = size
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(b, leaves, classes, generator=generator)
    log_prob = (scale * torch.randn(b, leaves, generator=generator)).log_softmax(1)
    return logits, log_prob, torch.randint(classes, (b,), generator=generator)


@settings(max_examples=60, deadline=None)
@given(sizes, seeds, scales, recipes)
def test_loss_and_gradients_are_finite_however_extreme_the_logits(size, seed, scale, recipe):
    logits, log_prob, y = draw(size, seed, scale)
    logits.requires_grad_()
    log_prob.requires_grad_()
    terms = branched_loss((logits, log_prob), y, recipe)
    terms.total.backward()
    assert terms.total.isfinite()
    assert logits.grad.isfinite().all()
    assert log_prob.grad.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(sizes, seeds, recipes, st.randoms(use_true_random=False))
def test_order_of_leaves_does_not_matter(size, seed, recipe, random):
    logits, log_prob, y = draw(size, seed, 2.0)
    order = list(range(size[1]))
    random.shuffle(order)
    one = branched_loss((logits, log_prob), y, recipe)
    other = branched_loss((logits[:, order], log_prob[:, order]), y, recipe)
    torch.testing.assert_close(one.total, other.total)
    torch.testing.assert_close(one.responsibility[:, order], other.responsibility)


@settings(max_examples=60, deadline=None)
@given(sizes, seeds, st.floats(0.05, 20), st.booleans(), st.floats(-50, 50))
def test_responsibility_is_a_distribution_that_ignores_a_shift_of_all_leaves(
    size, seed, tau, with_prior, shift
):
    logits, log_prob, _ = draw(size, seed, 3.0)
    ce, prior = logits[..., 0].abs(), log_prob if with_prior else None
    target = responsibility(ce, tau, prior)
    torch.testing.assert_close(target.sum(1), torch.ones(size[0]))
    shifted = responsibility(ce + shift, tau, prior)
    torch.testing.assert_close(target, shifted, atol=2e-3, rtol=0)


@settings(max_examples=60, deadline=None)
@given(sizes, seeds)
def test_classification_loss_lies_between_the_best_and_the_worst_leaf(size, seed):
    logits, log_prob, y = draw(size, seed, 3.0)
    recipe = FinetuneRecipe(label_smoothing=0.0)
    ce = -logits.log_softmax(2)[torch.arange(len(y)), :, y]
    value = branched_loss((logits, log_prob), y, recipe).cls
    assert ce.amin(1).mean() - 1e-4 <= value <= ce.amax(1).mean() + 1e-4


@settings(max_examples=60, deadline=None)
@given(sizes, seeds, scales)
def test_balance_lies_between_zero_and_ln_l(size, seed, scale):
    _, log_prob, _ = draw(size, seed, scale)
    value = balance(log_prob.exp()).item()
    assert -1e-5 <= value <= math.log(size[1]) + 1e-5
