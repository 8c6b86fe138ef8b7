"""Routers that learn their targets once, on features that do not change any more.

Shapes: N samples, C channels, K branches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sigmabranch.routing import Router

EPOCHS = 12
BATCH = 512
LEARNING_RATE = 2e-3
# Rounds of shifting each branch's bias in turn; two branches need one.
_ROUNDS = 50


def fit_router(router: Router, pooled_NC: Tensor, branch_N: Tensor, seed: int) -> None:
    """Train a router anew, in place, to tell the branch of each sample.

    At last its bias is shifted until it chooses each branch as often as the samples' own branches
    occur, whatever it mistakes.

    Args:
        router: left frozen and in evaluation mode.
        pooled_NC: what its pool makes of the features, float32.
        branch_N: int64.
        seed: of its weights and of the order of the samples.
    """
    with torch.random.fork_rng([pooled_NC.device] if pooled_NC.is_cuda else []):
        torch.manual_seed(seed)
        router.linear.reset_parameters()
        router.gate.reset_parameters()
        router.train().requires_grad_(True)
        optimizer = torch.optim.AdamW(router.parameters(), lr=LEARNING_RATE)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(pooled_NC)).to(pooled_NC.device).split(BATCH):
                loss = F.cross_entropy(scores(router, pooled_NC[rows]), branch_N[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
    router.eval().requires_grad_(False)
    share_K = branch_N.bincount(minlength=router.gate.out_features) / len(branch_N)
    with torch.no_grad():
        router.gate.bias.add_(even_bias(scores(router, pooled_NC), share_K))


def scores(router: Router, pooled_NC: Tensor) -> Tensor:
    """log p up to a constant, (N, K), of features that are pooled already."""
    _, *latent = router.projection
    for module in latent:
        pooled_NC = module(pooled_NC)
    return router.gate(pooled_NC)


def even_bias(score_NK: Tensor, share_K: Tensor) -> Tensor:
    """What to add to the scores so that branch k is the largest for about share_k of the samples.

    Args:
        score_NK: a router's scores.
        share_K: float, summing to one.

    Returns:
        (K,), its mean zero.
    """
    bias_K = torch.zeros_like(score_NK[0])
    branches = len(bias_K)
    for _ in range(1 if branches == 2 else _ROUNDS):
        for branch in range(1, branches):
            shifted_NK = score_NK + bias_K
            own_N = shifted_NK[:, branch].clone()
            shifted_NK[:, branch] = -torch.inf
            behind_N = (shifted_NK.amax(1) - own_N).sort().values
            # Halfway between the last sample that is to come here and the first that is not.
            last = round(float(share_K[branch]) * len(behind_N))
            edge = behind_N[[max(last - 1, 0), min(last, len(behind_N) - 1)]].mean()
            bias_K[branch] += edge
    return bias_K - bias_K.mean()
