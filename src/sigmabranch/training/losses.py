"""The loss of a branched network: equations 5 to 8 of the paper, and what can be added to them.

Shapes: B batch, L leaves, V classes.

Everything is fp32 and in log space. Write P_j(x) for the probability of the path to leaf j and
CE_j(x) for that leaf's cross-entropy. The paper minimises

    L = L_cls + λ · L_resp                                    (eq. 8)
    L_cls  = E_x Σ_j P_j · CE_j                               (eq. 5)
    L_resp = −E_x Σ_j r_j · log P_j                           (eq. 7)
    r_j    = stop-gradient( exp(−CE_j/τ) / Σ_i exp(−CE_i/τ) ) (eq. 6)

Label smoothing enters eq. 5 only: with plain cross-entropy and τ = 1, r_j is proportional to the
probability that leaf j gives the true class, which is the posterior of a mixture of experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sigmabranch.training.recipe import FinetuneRecipe


class LossTerms(NamedTuple):
    """The loss and its parts, all fp32.

    Attributes:
        total: the scalar to minimise.
        cls: eq. 5, scalar; None without labels.
        resp: eq. 7, scalar.
        balance: :func:`balance`, scalar; None when its weight is 0.
        distill: the distillation loss weighted by P, scalar; None without a teacher.
        responsibility: the target r of eq. 7, (B, L), no gradient.
        weight: of each leaf's loss in eq. 5, (B, L): P, or on the way from equal to P.
    """

    total: Tensor
    cls: Tensor | None
    resp: Tensor
    balance: Tensor | None
    distill: Tensor | None
    responsibility: Tensor
    weight: Tensor


def branched_loss(
    soft: tuple[Tensor, ...],
    y: Tensor | None,
    recipe: FinetuneRecipe,
    *,
    progress: float = 0.0,
    class_leaf: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    global_mean: Callable[[Tensor], Tensor] | None = None,
) -> LossTerms:
    """Eq. 8 with the recipe's additions.

    With a teacher and ``distill_weight`` α the classification term becomes
    (1 − α) · L_cls + α · E_x Σ_j P_j · T² · KL(teacher_T ‖ leaf_j,T): every leaf imitates the
    teacher in proportion to its path probability, as it learns the label.

    Without labels that imitation is all of the classification term, and the teacher's distribution
    t(x) takes the label's place in eq. 6: CE_j becomes Σ_v t_v · −log f_j,v, or, which gives the
    same r_j, KL(t ‖ f_j). A teacher that is certain is a label.

    Args:
        soft: leaf logits (B, L, V) and leaf log-probabilities (B, L) first, as
            ``SigmaBranchNet.soft`` returns them.
        y: true classes, (B,) int64; None if there are none, which takes a teacher.
        recipe: weights, temperatures and switches.
        progress: share of the training done, in [0, 1], for the schedules of λ and τ.
        class_leaf: (V, L) rows that sum to one: the responsibility of each class when
            ``recipe.class_target`` is on.
        teacher_logits: (B, V) of the dense network, used when the recipe distills, and
            without labels.
        global_mean: turns a mean over this process's samples into that over all processes'; None
            with a single process.

    Returns:
        The terms; ``total`` carries the gradient.
    """
    logits_BLV, log_prob_BL = soft[0].float(), soft[1].float()
    prob_BL = log_prob_BL.exp()
    weight_BL = prob_BL
    if progress < recipe.share_first:
        weight_BL = (prob_BL - 1 / prob_BL.shape[1]) * (progress / recipe.share_first)
        weight_BL = weight_BL + 1 / prob_BL.shape[1]
    cls = distill = None
    if y is not None:
        plain_BL, smoothed_BL = cross_entropies(logits_BLV, y, recipe.label_smoothing)
        total = cls = expectation(weight_BL, smoothed_BL)
    else:
        plain_BL = _imitated(logits_BLV, teacher_logits, 1.0)
    if recipe.class_target:
        target_BL = _class_target(class_leaf, y, teacher_logits)
    else:
        target_BL = responsibility(
            plain_BL,
            recipe.resp_temperature_at(progress),
            prior=log_prob_BL if recipe.resp_prior else None,
        )
    resp = -expectation(target_BL, log_prob_BL)

    if cls is None or (recipe.distills and teacher_logits is not None):
        kl_BL = _imitated(logits_BLV, teacher_logits, recipe.distill_temperature)
        distill = expectation(weight_BL, kl_BL)
        total = (
            distill if cls is None else torch.lerp(cls, distill, recipe.distill_weight_at(progress))
        )
    total = total + recipe.resp_weight_at(progress) * resp
    even = None
    if recipe.balance_weight:
        even = balance(prob_BL, global_mean)
        total = total + recipe.balance_weight * even
    return LossTerms(total, cls, resp, even, distill, target_BL, weight_BL)


def cross_entropies(logits: Tensor, y: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Plain and label-smoothed cross-entropy of every leaf, each (B, L), from one log-softmax.

    Args:
        logits: (B, L, V).
        y: true classes, (B,) int64.
        label_smoothing: share of the target spread evenly over all classes.
    """
    log_class_BLV = F.log_softmax(logits, dim=-1)
    index_BL1 = y[:, None, None].expand(-1, logits.shape[1], 1)
    plain_BL = -log_class_BLV.gather(-1, index_BL1).squeeze(-1)
    if not label_smoothing:
        return plain_BL, plain_BL
    return plain_BL, torch.lerp(plain_BL, -log_class_BLV.mean(-1), label_smoothing)


def _imitated(logits_BLV: Tensor, teacher_logits: Tensor | None, temperature: float) -> Tensor:
    """How far every leaf is from the teacher, (B, L)."""
    if teacher_logits is None:
        raise ValueError("a batch without labels needs teacher_logits")
    return distillation(logits_BLV, teacher_logits.unsqueeze(1), temperature)


def _class_target(
    class_leaf: Tensor | None, y: Tensor | None, teacher_logits: Tensor | None
) -> Tensor:
    """The leaf shares of the label, or those that the teacher expects: (B, L)."""
    if class_leaf is None:
        raise ValueError("class_target needs class_leaf, the leaf shares of each class")
    if y is not None:
        return class_leaf[y].float()
    assert teacher_logits is not None
    teacher_BV = teacher_logits.detach().float().softmax(dim=-1)
    # Not a matrix product, which autocast would run in half precision.
    return (teacher_BV[..., None] * class_leaf).sum(dim=1)


def responsibility(ce: Tensor, temperature: float, prior: Tensor | None = None) -> Tensor:
    """Eq. 6, (B, L), without gradient: r ∝ exp(−CE/τ), or r ∝ P · exp(−CE/τ) with a prior.

    With the prior it is the posterior of a hierarchical mixture of experts. Without it, leaves
    that are similar get nearly equal targets, and eq. 7 pulls the routing towards uniform.

    Args:
        ce: plain cross-entropies, (B, L).
        temperature: τ.
        prior: log P, (B, L).
    """
    score_BL = -ce.detach() / temperature
    if prior is not None:
        score_BL = score_BL + prior.detach()
    return F.softmax(score_BL, dim=-1)


def balance(prob: Tensor, global_mean: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """KL(mean leaf probability ‖ uniform) = ln L − H(E_x P), scalar in [0, ln L].

    Only the mean over the batch is pulled to uniform, so single samples may be routed sharply.
    Over several processes the value and its gradient are those of the joint batch: the local mean
    is shifted to the global one outside the gradient, and averaging gradients does the rest.

    Args:
        prob: (B, L).
        global_mean: as for :func:`branched_loss`.
    """
    mean_L = prob.mean(0)
    if global_mean is not None:
        mean_L = mean_L + (global_mean(mean_L.detach()) - mean_L.detach())
    # The slope of −m·ln m is infinite at 0, where a leaf is out of reach of any gradient anyway.
    return math.log(prob.shape[1]) - torch.special.entr(mean_L.clamp_min(1e-12)).sum()


def distillation(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) at temperature T over the last axis (Hinton et al., 2015).

    Args:
        logits: the student's, (..., V).
        teacher_logits: broadcastable to ``logits``; no gradient flows into them.
        temperature: T.

    Returns:
        The divergence without the last axis; T² keeps gradients comparable across temperatures.
    """
    student = F.log_softmax(logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(-1)


def expectation(weight: Tensor, value: Tensor) -> Tensor:
    """E_x Σ_j weight_j · value_j of two (B, L) tensors, scalar."""
    return (weight * value).sum(1).mean()
