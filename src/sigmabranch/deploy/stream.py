"""What inputs in a row say about each other: a Markov filter over groups of classes.

Streams rarely show classes at random: for a while they come from one group of classes, then from
another. The state of the filter is the group. It stays with probability s, the stickiness, and is
drawn anew from π otherwise; a group g shows class y with probability p(y | g). What a network says
of an input x is softmax(z) ∝ p(x | y) if classes were equally frequent in training, and so

    ρ_t(g)     = s q_{t-1}(g) + (1 - s) π(g)            what is expected,
    prior_t(y) = Σ_g ρ_t(g) p(y | g),
    answer     ∝ softmax(z_t)(y) · V prior_t(y),
    q_t(g)     ∝ ρ_t(g) Σ_y p(y | g) softmax(z_t)(y)    what is believed after it.

The groups of a tree are its leaves: p(y | g) and π follow from how often training inputs of each
class take each leaf, which couples what is answered and what is read ahead. A network that knows no
groups has one for each class, which fits streams that show the same thing again and again.

Shapes: V classes, G groups (L leaves).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sigmabranch.deploy.package import Package
from sigmabranch.errors import ConfigError

#: Of streams that stay for about 33 inputs.
STICKINESS = 0.97


class StreamFilter:
    """Filters the logits of a stream, one input after the other; not for several threads at once.

    Args:
        class_share: (V, G) share of each class's inputs in each group; a class of which none was
            seen is spread over all.
        stickiness: probability s that the next input is of the same group, in [0, 1); 0 filters
            nothing.

    Attributes:
        stickiness: as given.
        class_share: as given, each row adding up to 1: float64.
        shown: (G, V) probability p(y | g) of each class in each group: float64.

    Raises:
        ConfigError: a stickiness outside [0, 1), or shares that are none.
    """

    def __init__(
        self, class_share: Tensor | Sequence[Sequence[float]], stickiness: float = STICKINESS
    ) -> None:
        if not 0 <= stickiness < 1:
            raise ConfigError(f"the stickiness of a stream must be in [0, 1), got {stickiness}")
        self.stickiness = stickiness
        self.class_share = _rows_of_one(torch.as_tensor(class_share, dtype=torch.float64))
        joint_VG = self.class_share / len(self.class_share)
        self._base_G = joint_VG.sum(0)
        # A group in which no class is has no probability, and shows what it likes.
        used_G = self._base_G.clamp(min=torch.finfo(torch.float64).tiny)
        self.shown = (joint_VG / used_G).T
        self.reset()

    @classmethod
    def of(cls, package: Package, stickiness: float = STICKINESS) -> StreamFilter:
        """The filter of a package: over its class shares, or over single classes without them."""
        return cls(package.class_share or torch.eye(package.classes), stickiness)

    def reset(self) -> None:
        """Forget the stream, as at a cut."""
        self._believed_G = self._base_G

    @property
    def groups(self) -> Tensor:
        """Probability of each group for the next input: (G,) float64."""
        return self._expected(self._believed_G)

    @property
    def prior(self) -> Tensor:
        """Probability of each class for the next input: (V,) float64."""
        return self._ratio() / len(self.class_share)

    def update(self, logits: Tensor) -> Tensor:
        """Filter one input's logits, and remember it.

        Args:
            logits: (V,), finite.

        Returns:
            (V,) ``logits`` plus log(V · prior): their softmax is the filtered answer.
        """
        filtered = logits.double() + self._ratio().log()
        seen_G = self.shown @ logits.double().softmax(0)
        belief_G = self.groups * seen_G
        self._believed_G = belief_G / belief_G.sum()
        return filtered.to(logits.dtype)

    def after(self, groups: Tensor) -> Tensor:
        """Probability of each group for the input after one of ``groups``: both (G,) float64."""
        return self._expected(groups)

    def _ratio(self) -> Tensor:
        """Expected classes over equally frequent ones; exactly 1 without stickiness."""
        shown_V = self._believed_G @ self.shown * len(self.class_share)
        return (1 - self.stickiness) + self.stickiness * shown_V

    def _expected(self, believed_G: Tensor) -> Tensor:
        return self.stickiness * believed_G + (1 - self.stickiness) * self._base_G


def _rows_of_one(share_VG: Tensor) -> Tensor:
    """Rows that add up to 1, even ones where nothing was seen."""
    if share_VG.ndim != 2 or not share_VG.numel() or not share_VG.isfinite().all():
        raise ConfigError("the class shares must be a table of numbers, classes by groups")
    if (share_VG < 0).any():
        raise ConfigError("the class shares must not be negative")
    total_V1 = share_VG.sum(1, keepdim=True)
    even = torch.full_like(share_VG, 1 / share_VG.shape[1])
    return torch.where(total_V1 > 0, share_VG / total_V1.clamp(min=1e-300), even)
