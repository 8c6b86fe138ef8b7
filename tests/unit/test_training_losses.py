"""Equations 5 to 8 against a sample-by-sample transcription, and each addition by itself.

B batch, L leaves, V classes.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sigmabranch.training import FinetuneRecipe, branched_loss
from sigmabranch.training.losses import balance, cross_entropies, distillation

B, L, V = 5, 4, 7


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(B, L, V, generator=draw)
    log_prob = (2 * torch.randn(B, L, generator=draw)).log_softmax(1)
    y = torch.randint(V, (B,), generator=draw)
    return logits, log_prob, y


def leaf_loss(logits, y, sample, leaf, smoothing=0.0):
    row = logits[sample, leaf].double().log_softmax(0)
    return float(-(1 - smoothing) * row[y[sample]] - smoothing * row.mean())


def paper_loss(logits, log_prob, y, *, smoothing, weight, tau):
    cls = resp = 0.0
    for b in range(B):
        plain = [leaf_loss(logits, y, b, leaf) for leaf in range(L)]
        norm = sum(math.exp(-ce / tau) for ce in plain)
        for j in range(L):
            log_p = float(log_prob[b, j])
            cls += math.exp(log_p) * leaf_loss(logits, y, b, j, smoothing) / B
            resp -= math.exp(-plain[j] / tau) / norm * log_p / B
    return cls, resp, cls + weight * resp


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_terms_are_equations_5_to_8(batch, smoothing, tau):
    logits, log_prob, y = batch
    recipe = FinetuneRecipe(label_smoothing=smoothing, resp_temperature=tau)
    terms = branched_loss((logits, log_prob), y, recipe)
    cls, resp, total = paper_loss(logits, log_prob, y, smoothing=smoothing, weight=0.3, tau=tau)
    assert terms.cls.item() == pytest.approx(cls, rel=1e-5)
    assert terms.resp.item() == pytest.approx(resp, rel=1e-5)
    assert terms.total.item() == pytest.approx(total, rel=1e-5)
    assert terms.balance is None
    assert terms.distill is None


def test_label_smoothing_enters_equation_5_and_not_equation_6(batch):
    logits, log_prob, y = batch
    plain = branched_loss((logits, log_prob), y, FinetuneRecipe(label_smoothing=0.0))
    smooth = branched_loss((logits, log_prob), y, FinetuneRecipe(label_smoothing=0.2))
    assert torch.equal(plain.responsibility, smooth.responsibility)
    assert not torch.isclose(plain.cls, smooth.cls)


def test_cross_entropies_are_those_of_torch(batch):
    logits, _, y = batch
    plain, smooth = cross_entropies(logits, y, 0.1)
    target = y[:, None].expand(B, L)
    swapped = logits.transpose(1, 2)
    torch.testing.assert_close(plain, F.cross_entropy(swapped, target, reduction="none"))
    torch.testing.assert_close(
        smooth, F.cross_entropy(swapped, target, reduction="none", label_smoothing=0.1)
    )


def test_gradient_of_total_is_the_finite_difference_with_r_held_fixed(batch):
    logits, log_prob, y = batch
    recipe = FinetuneRecipe(balance_weight=0.5)
    score = log_prob.clone().requires_grad_()
    logits = logits.clone().requires_grad_()
    terms = branched_loss((logits, score.log_softmax(1)), y, recipe)
    terms.total.backward()
    fixed = terms.responsibility

    def total(logits_, score_):
        log_p = score_.double().log_softmax(1)
        _, ce = cross_entropies(logits_.double(), y, recipe.label_smoothing)
        value = (log_p.exp() * ce).sum(1).mean() - 0.3 * (fixed * log_p).sum(1).mean()
        return value + 0.5 * balance(log_p.exp())

    for tensor, which in ((logits, 0), (score, 1)):
        for index in [(0,) * tensor.ndim, (B - 1, L - 1, V - 1)[: tensor.ndim]]:
            step = torch.zeros(tensor.shape, dtype=torch.float64)
            step[index] = 1e-5
            args = [logits.detach().double(), score.detach().double()]
            high, low = list(args), list(args)
            high[which], low[which] = args[which] + step, args[which] - step
            slope = (total(*high) - total(*low)) / 2e-5
            assert tensor.grad[index].item() == pytest.approx(slope.item(), rel=1e-3, abs=1e-6)


def test_prior_makes_the_responsibility_a_posterior(batch):
    logits, log_prob, y = batch
    recipe = FinetuneRecipe(resp_prior=True)
    terms = branched_loss((logits, log_prob), y, recipe)
    likelihood = logits.softmax(2)[torch.arange(B), :, y]
    joint = log_prob.exp() * likelihood
    torch.testing.assert_close(terms.responsibility, joint / joint.sum(1, keepdim=True))


def test_similar_leaves_pull_routing_to_uniform_only_without_the_prior(batch):
    _, log_prob, y = batch
    same = torch.zeros(B, L, V)
    plain = branched_loss((same, log_prob), y, FinetuneRecipe())
    prior = branched_loss((same, log_prob), y, FinetuneRecipe(resp_prior=True))
    torch.testing.assert_close(plain.responsibility, torch.full((B, L), 1 / L))
    torch.testing.assert_close(prior.responsibility, log_prob.exp())


def test_class_target_is_the_leaf_of_the_true_class(batch):
    logits, log_prob, y = batch
    class_leaf = F.one_hot(torch.arange(V) % L, L).float()
    recipe = FinetuneRecipe(class_target=True)
    terms = branched_loss((logits, log_prob), y, recipe, class_leaf=class_leaf)
    expected = F.nll_loss(log_prob, y % L)
    torch.testing.assert_close(terms.resp, expected)


def test_balance_is_zero_for_even_usage_however_sharp_each_sample_is():
    assert balance(torch.eye(L)).item() == pytest.approx(0.0, abs=1e-6)


def test_balance_of_a_collapsed_tree_is_ln_l_and_its_gradient_is_finite():
    prob = torch.eye(L)[[0, 0, 0]].requires_grad_()
    value = balance(prob)
    value.backward()
    assert value.item() == pytest.approx(math.log(L), rel=1e-5)
    assert prob.grad.isfinite().all()


def test_balance_gradient_revives_the_neglected_leaf():
    score = torch.tensor([[3.0, 0.0, 0.0, -3.0]]).repeat(B, 1).requires_grad_()
    balance(score.softmax(1)).backward()
    assert (score.grad[:, 0] > 0).all()
    assert (score.grad[:, 3] < 0).all()


def test_balance_over_two_halves_has_the_gradient_of_the_whole_batch(batch):
    _, log_prob, _ = batch
    whole = torch.cat([log_prob, log_prob.flip(1) * 1.3]).log_softmax(1).exp()
    joint = whole.clone().requires_grad_()
    balance(joint).backward()
    halves = whole.clone().requires_grad_()
    mean = whole.mean(0)
    for half in halves.chunk(2):
        (balance(half, global_mean=lambda _: mean) / 2).backward()
    torch.testing.assert_close(halves.grad, joint.grad)


def test_distillation_is_zero_for_the_teacher_itself_and_positive_otherwise(batch):
    logits, _, _ = batch
    zero = distillation(logits, logits, 4.0)
    torch.testing.assert_close(zero, torch.zeros(B, L), atol=1e-5, rtol=0)
    assert (distillation(logits, logits.flip(2), 4.0) > 0).all()


def test_teacher_takes_its_share_of_the_classification_loss_weighted_by_p(batch):
    logits, log_prob, y = batch
    teacher = logits.mean(1)
    recipe = FinetuneRecipe(distill_weight=0.7, distill_temperature=2.0)
    terms = branched_loss((logits, log_prob), y, recipe, teacher_logits=teacher)
    kl = F.kl_div(
        (logits / 2).log_softmax(2), (teacher / 2).softmax(1)[:, None], reduction="none"
    ).sum(2)
    expected = (log_prob.exp() * kl * 4).sum(1).mean()
    torch.testing.assert_close(terms.distill, expected)
    torch.testing.assert_close(terms.total, 0.3 * terms.cls + 0.7 * expected + 0.3 * terms.resp)


def test_half_precision_logits_give_single_precision_terms(batch):
    logits, log_prob, y = batch
    terms = branched_loss((logits.bfloat16(), log_prob), y, FinetuneRecipe())
    assert terms.total.dtype == torch.float32
    exact = branched_loss((logits.bfloat16().float(), log_prob), y, FinetuneRecipe())
    assert torch.equal(terms.total, exact.total)


# -- without labels ------------------------------------------------------------------------------


def certain(y: torch.Tensor) -> torch.Tensor:
    """Logits of a teacher that knows the label and nothing else."""
    return 1e4 * F.one_hot(y, V).float()


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_a_teacher_that_is_certain_is_a_label(batch, tau, prior):
    logits, log_prob, y = batch
    recipe = FinetuneRecipe(
        distill_weight=1.0, distill_temperature=1.0, resp_temperature=tau, resp_prior=prior
    )
    told = branched_loss(
        (logits, log_prob),
        y,
        FinetuneRecipe(label_smoothing=0.0, resp_temperature=tau, resp_prior=prior),
    )
    alone = branched_loss((logits, log_prob), None, recipe, teacher_logits=certain(y))
    torch.testing.assert_close(alone.responsibility, told.responsibility)
    torch.testing.assert_close(alone.resp, told.resp)
    torch.testing.assert_close(alone.distill, told.cls)
    torch.testing.assert_close(alone.total, told.total)


def test_without_labels_the_loss_is_imitation_and_the_teachers_responsibility(batch):
    logits, log_prob, _ = batch
    teacher = torch.randn(B, V, generator=torch.Generator().manual_seed(8))
    recipe = FinetuneRecipe(
        distill_weight=1.0, distill_temperature=2.0, resp_temperature=1.7, balance_weight=0.5
    )
    terms = branched_loss((logits, log_prob), None, recipe, teacher_logits=teacher)
    resp = 0.0
    for b in range(B):
        share = teacher[b].double().softmax(0)
        ce = [float(-(share * logits[b, j].double().log_softmax(0)).sum()) for j in range(L)]
        norm = sum(math.exp(-value / 1.7) for value in ce)
        for j in range(L):
            r = math.exp(-ce[j] / 1.7) / norm
            assert terms.responsibility[b, j].item() == pytest.approx(r, rel=1e-4)
            resp -= r * float(log_prob[b, j]) / B
    assert terms.cls is None
    assert terms.resp.item() == pytest.approx(resp, rel=1e-4)
    labelled = branched_loss(
        (logits, log_prob), torch.zeros(B).long(), recipe, teacher_logits=teacher
    )
    torch.testing.assert_close(terms.distill, labelled.distill)
    expected = terms.distill + 0.3 * terms.resp + 0.5 * terms.balance
    torch.testing.assert_close(terms.total, expected)


def test_without_labels_a_leaf_that_is_the_teacher_takes_the_responsibility(batch):
    logits, log_prob, _ = batch
    recipe = FinetuneRecipe(distill_weight=1.0)
    terms = branched_loss((logits, log_prob), None, recipe, teacher_logits=logits[:, 2])
    assert terms.responsibility.argmax(1).tolist() == [2] * B
    assert not terms.responsibility.requires_grad


def test_without_labels_class_targets_are_what_the_teacher_expects(batch):
    logits, log_prob, y = batch
    class_leaf = F.one_hot(torch.arange(V) % L, L).float()
    recipe = FinetuneRecipe(class_target=True, distill_weight=1.0)
    teacher = torch.randn(B, V, generator=torch.Generator().manual_seed(8))
    terms = branched_loss(
        (logits, log_prob), None, recipe, class_leaf=class_leaf, teacher_logits=teacher
    )
    torch.testing.assert_close(terms.responsibility, teacher.softmax(1) @ class_leaf)
    sure = branched_loss(
        (logits, log_prob), None, recipe, class_leaf=class_leaf, teacher_logits=certain(y)
    )
    torch.testing.assert_close(sure.responsibility, class_leaf[y])


def test_without_labels_and_without_a_teacher_there_is_no_loss(batch):
    logits, log_prob, _ = batch
    with pytest.raises(ValueError, match="teacher_logits"):
        branched_loss((logits, log_prob), None, FinetuneRecipe())
