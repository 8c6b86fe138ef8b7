"""How a network is trained, as plain data; the defaults are the paper's CIFAR-100 setting."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from sigmabranch.errors import ConfigError
from sigmabranch.fields import from_fields, to_fields


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One training run (paper, section IV-A).

    Attributes:
        epochs: passes over the training set.
        batch_size: samples of one optimizer step, over all processes and passes.
        optimizer: ``"sgd"`` (Nesterov) or ``"adam"``.
        lr: peak learning rate.
        momentum: of SGD.
        betas: of Adam.
        weight_decay: L2 penalty.
        decay_norm_and_bias: also decay parameters of fewer than two dimensions.
        schedule: ``"cosine"`` to zero, ``"step"`` or ``"constant"``, after the warm-up.
        warmup_epochs: epochs (a fraction is allowed) of linear warm-up from zero.
        step_epochs: epochs between two drops of the ``"step"`` schedule.
        step_factor: what each drop multiplies the learning rate by.
        label_smoothing: of the classification loss.
        clip_norm: largest gradient norm; 0 does not clip.
        distill_weight: share of the classification loss that imitates the teacher instead.
        distill_weight_end: the same share at the end, reached linearly; None keeps it constant.
        distill_temperature: softening of teacher and student in that imitation.
        mix: views of two samples that teacher and student both see, ``"mixup"`` (their weighted
            mean) or ``"cutmix"`` (a rectangle of one in the other). Only the teacher knows what is
            right for them, so ``distill_weight`` must be 1. With long schedules this is function
            matching (Beyer et al., 2022).
        mix_alpha: the weights of the two are drawn from Beta(α, α).
        precision: ``"bf16"`` runs the network under autocast, on CPUs only where they have the
            instructions; losses stay in fp32.
        compile: run the training step through ``torch.compile``.
        ema_decay: decay per step of an exponential moving average of the weights, which is then
            what is evaluated and returned; 0 keeps none.
        eval_every: epochs between evaluations; the last epoch is always evaluated.
    """

    epochs: int = 200
    batch_size: int = 256
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 5e-4
    decay_norm_and_bias: bool = False
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    warmup_epochs: float = 5.0
    step_epochs: int = 20
    step_factor: float = 0.7
    label_smoothing: float = 0.1
    clip_norm: float = 0.0
    distill_weight: float = 0.0
    distill_weight_end: float | None = None
    distill_temperature: float = 4.0
    mix: Literal["none", "mixup", "cutmix"] = "none"
    mix_alpha: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    ema_decay: float = 0.0
    eval_every: int = 1

    def __post_init__(self) -> None:
        self._require("at least 1", 1, math.inf, "epochs", "batch_size")
        self._require("at least 1", 1, math.inf, "step_epochs", "eval_every")
        self._require("at least 0", 0, math.inf, "lr", "weight_decay", "warmup_epochs", "clip_norm")
        self._require("in [0, 1]", 0, 1, "momentum", "label_smoothing", "distill_weight")
        self._require("in [0, 1]", 0, 1, "step_factor", "ema_decay", "distill_weight_end")
        self._require("positive", math.ulp(0.0), math.inf, "distill_temperature", "mix_alpha")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"recipe betas must be two numbers in [0, 1), got {self.betas}")
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                raise ConfigError(
                    f"recipe {name} is {getattr(self, name)!r}, "
                    f"choose one of {', '.join(get_args(hint))}"
                )

        if self.mix != "none" and {self.distill_weight, self.distill_weight_at(1.0)} != {1.0}:
            raise ConfigError(
                f"recipe mix={self.mix} makes views that have no label: "
                "set distill_weight=1, so that all is learnt from the teacher"
            )

    @property
    def distills(self) -> bool:
        """Whether a teacher is needed."""
        return self.distill_weight > 0 or bool(self.distill_weight_end)

    def distill_weight_at(self, progress: float) -> float:
        """Share of the teacher at ``progress`` in [0, 1]."""
        return _between(self.distill_weight, self.distill_weight_end, progress)

    def lasting(self, epochs: int) -> Self:
        """The same recipe over other ``epochs``, its schedule as much longer or shorter.

        Warm-up keeps its length.
        """
        if self.schedule != "step":
            return replace(self, epochs=epochs)
        step_epochs = max(1, round(self.step_epochs * epochs / self.epochs))
        return replace(self, epochs=epochs, step_epochs=step_epochs)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; :meth:`from_dict` is its inverse."""
        return {name: to_fields(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`; missing keys keep their defaults.

        Raises:
            ConfigError: an unknown key, or a value of the wrong type or range.
        """
        return from_fields(cls, "recipe", value)

    def _require(self, wording: str, low: float, high: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not (low <= value <= high and math.isfinite(value)):
                raise ConfigError(f"recipe {name} must be {wording}, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneRecipe(Recipe):
    """Fine-tuning of a branched network (paper, section III-D); the paper's setting by default.

    Attributes:
        resp_weight: λ of eq. 8 at the start.
        resp_weight_end: λ at the end, reached linearly; None keeps it constant.
        resp_temperature: τ of eq. 6 at the start. The larger, the more alike the leaves' targets.
        resp_temperature_end: τ at the end, reached geometrically; None keeps it constant.
        resp_prior: multiply the responsibility by the path probability, which makes it the
            posterior of a hierarchical mixture of experts and keeps sharp routing sharp.
        class_target: the responsibility is the leaf assigned to the true class, not eq. 6.
        balance_weight: weight of the divergence of the batch's mean leaf usage from uniform.
        share_first: share of the training over which the leaves' weights in eq. 5 go from equal, so
            that all leaves learn from all samples, to the path probabilities; 0 starts with these.
        node_grad_scale: divide each node's gradient by its expected path probability. Eq. 5
            weights a leaf's loss by about 1/L, so without this a leaf takes steps L times smaller
            than the same network would alone. Adam, which ignores scale, is hardly affected.
        upcycle: late upcycling (:mod:`sigmabranch.training.upcycling`): share of the training in
            which all leaves are one path, before it is copied into them and each sample trains its
            own leaf alone; 0 trains all leaves on all samples throughout (the paper). The settings
            of equations 5 to 8 above are then unused.
        groups: what the routers of late upcycling learn: ``"confusions"``, classes that are often
            taken for each other share a leaf, or ``"clusters"``, spherical k-means of the features.
    """

    epochs: int = 60
    resp_weight: float = 0.3
    resp_weight_end: float | None = None
    resp_temperature: float = 1.0
    resp_temperature_end: float | None = None
    resp_prior: bool = False
    class_target: bool = False
    balance_weight: float = 0.0
    share_first: float = 0.0
    node_grad_scale: bool = False
    upcycle: float = 0.0
    groups: Literal["confusions", "clusters"] = "confusions"

    def __post_init__(self) -> None:
        # The zero-argument super() does not survive slots=True, which rebuilds the class.
        Recipe.__post_init__(self)
        self._require("at least 0", 0, math.inf, "resp_weight", "resp_weight_end", "balance_weight")
        self._require(
            "positive", math.ulp(0.0), math.inf, "resp_temperature", "resp_temperature_end"
        )
        self._require("in [0, 1]", 0, 1, "share_first")
        if not 0 <= self.upcycle < 1:
            raise ConfigError(
                f"recipe upcycle is the share of the training before the leaves part, in [0, 1), "
                f"got {self.upcycle}"
            )
        if self.resp_prior and self.class_target:
            raise ConfigError(
                "recipe resp_prior and class_target both define the responsibility: choose one"
            )

    def resp_weight_at(self, progress: float) -> float:
        """λ at ``progress`` in [0, 1]."""
        return _between(self.resp_weight, self.resp_weight_end, progress)

    def resp_temperature_at(self, progress: float) -> float:
        """τ at ``progress`` in [0, 1]."""
        if self.resp_temperature_end is None:
            return self.resp_temperature
        return (
            self.resp_temperature * (self.resp_temperature_end / self.resp_temperature) ** progress
        )


def _between(start: float, end: float | None, progress: float) -> float:
    """On the straight line from ``start`` to ``end``; None stays at the start."""
    return start if end is None else start + (end - start) * progress
