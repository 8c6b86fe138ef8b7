"""SkipNet: gates that skip whole residual blocks (Wang et al., ECCV 2018, arXiv:1711.09485).

Shapes: B batch, G gates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigmabranch.errors import ConfigError
from sigmabranch.measure import count_parameters
from sigmabranch.peers.bench import Bench
from sigmabranch.peers.gated_resnet import GatedResNet
from sigmabranch.peers.phases import phases, phases_mark
from sigmabranch.peers.skipping import (
    check_size,
    check_target,
    check_weights,
    residual_spec,
)
from sigmabranch.peers.system import System, Trained, check_choices
from sigmabranch.tasks import Task
from sigmabranch.tasks.counting import example
from sigmabranch.training import DenseObjective, Recipe, StepOutput

# Gates that are pushed towards a rate start with this logit: seven in eight are open.
OPEN_LOGIT = 2.0
# By how much a step of training moves the price of reading everything; a loss is of order one.
PRICE_STEP = 0.02
# How the threshold is set afterwards: on so many training images, by up to so many temperatures
# either way, halving what is left of that range so many times.
SETTLING_SAMPLES, SETTLING_REACH, SETTLING_HALVINGS = 2048, 4.0, 12


@dataclass(frozen=True, kw_only=True)
class SkipNet(System):
    """Whole residual blocks that a gate skips.

    The mode ``rate`` is not of the paper but of ConvNet-AIG (Veit and Belongie, ECCV 2018,
    arXiv:1711.11503), because neither of the paper's own can be made to hit a size. Ours is that
    its noise falls linearly to zero while training, so that the rate also holds without noise, and
    that reading has a price, which rises while more than ``target`` of the skippable parameters are
    read and falls while fewer are: the penalty alone stops where cross-entropy pulls as hard the
    other way, and counts a large block as much as a small one. Sized to a number of parameters, the
    system has the price alone, so that which blocks run is for cross-entropy to say. Because
    training sees augmented images, the gates' common threshold is set afterwards, on training
    images as they are.

    Attributes:
        gate: ``"recurrent"`` (pooling, one LSTM for all gates) or the paper's convolutional gates
            ``"feedforward1"`` and ``"feedforward2"``.
        mode: ``"supervised"`` (cross-entropy alone, straight through the threshold), ``"hybrid"``
            (that, then REINFORCE with a reward for skipping) or ``"rate"`` (a penalty on each
            gate's distance from ``target``).
        target: share of the inputs for which each gate is to be open, and of the skippable
            parameters that an input is to read on average, in mode rate.
        rate_weight: of the squared distances from ``target``, averaged over gates.
        reward: α, of skipping all blocks, in mode hybrid.
        rl_weight: of the REINFORCE term.
        temperature: what a gate's logit is divided by before an action is drawn; small is sharp.
    """

    name: ClassVar[str] = "skipnet"
    summary: ClassVar[str] = "gates skip whole residual blocks, input by input"
    sized_by: ClassVar[tuple[str, ...]] = ("mode", "target")

    gate: Literal["recurrent", "feedforward1", "feedforward2"] = "recurrent"
    mode: Literal["supervised", "hybrid", "rate"] = "supervised"
    target: float = 0.6
    rate_weight: float = 2.0
    reward: float = 0.1
    rl_weight: float = 0.01
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_choices(self, "gate", "mode")
        check_target(self, self.target)
        check_weights(self, "rate_weight", "reward", "rl_weight")
        if not self.temperature > 0:
            raise ConfigError(f"skipnet temperature must be positive, got {self.temperature}")

    def check(self, task: Task) -> None:
        """The network must have residual blocks, and the recipe an epoch for each training."""
        spec = residual_spec(self.name, task)
        if sum(spec.layers) < 2:
            raise ConfigError("skipnet never gates the first block, and the network has no other")
        if self.mode == "hybrid":
            phases(task.finetune)

    def fitted(self, task: Task, active_params: int) -> Self:
        """Mode rate with a price only, and the target that gives the size on average."""
        self.check(task)
        limits = self.sketch(task).bounds()
        always, most = (limits[end]["active_params"] for end in ("least", "most"))
        check_size(self, always, active_params)
        target = min(1.0, (active_params - always) / (most - always))
        return replace(self, mode="rate", target=target, rate_weight=0.0)

    def sketch(self, task: Task) -> GatedResNet:
        """The gated network, all gates open."""
        return GatedResNet(task.model.build(), example(task), self.gate).opened()

    def details(self, network: nn.Module, task: Task) -> dict[str, Any]:
        """Sizes of the gates and of each block that can be skipped."""
        assert isinstance(network, GatedResNet)
        cell = getattr(network.gates, "cell", None)
        return {
            "gates": len(network.block_params_G),
            "gate_params": count_parameters([network.gates]),
            "lstm_params": 0 if cell is None else count_parameters([cell]),
            "block_params": network.block_params_G.tolist(),
            "block_macs": network.block_macs_G.tolist(),
        }

    def run(self, bench: Bench) -> Trained:
        """Put gates into the source network and train both."""
        dense = bench.dense().cpu()
        with bench.seeded():
            network = GatedResNet(dense, bench.example(), self.gate)
        network.temperature = self.temperature
        network.to(bench.device)
        train = {"supervised": _supervised, "hybrid": self._hybrid, "rate": self._rate}[self.mode]
        recipe, mark = train(bench, network)
        return Trained(
            network=network,
            recipe=recipe,
            epochs=bench.epochs,
            mark=mark,
            counted=network.opened(),
        )

    def _hybrid(self, bench: Bench, network: GatedResNet) -> tuple[Recipe, str]:
        first, last = phases(bench.recipe)
        bench.train(network, recipe=first, step="supervised")
        network.sampling = "bernoulli"
        bench.train(network, HybridObjective(last, bench.teacher(bench.recipe), self), recipe=last)
        return last, phases_mark(first, last)

    def _rate(self, bench: Bench, network: GatedResNet) -> tuple[Recipe, str]:
        network.sampling = "gumbel"
        network.handicap.fill_(-OPEN_LOGIT)
        bench.train(
            network, RateObjective(bench.recipe, bench.teacher(bench.recipe), self, network)
        )
        settle(network, bench, self.target)
        return bench.recipe, ""


class RateObjective(DenseObjective):
    """Classification, each gate's squared distance from its rate over the batch, and the price."""

    entry = "gated"

    def __init__(
        self,
        recipe: Recipe,
        teacher: nn.Module | None,
        system: SkipNet,
        network: GatedResNet,
    ) -> None:
        super().__init__(recipe, teacher)
        self.system, self.network = system, network

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> StepOutput:
        """Loss, training accuracy and share of open gates of one batch."""
        self.network.noise.fill_(1 - progress)
        gated = model(x)
        output = self.classified(gated.logits, x, y, progress)
        rate_G = gated.open.mean(0)
        away = (rate_G - self.system.target).square().mean()
        loss = output.loss + self.system.rate_weight * away + self._charge(rate_G)
        metrics = {**output.metrics, "open": rate_G.detach().mean()}
        return StepOutput(loss, metrics)

    def _charge(self, rate_G: Tensor) -> Tensor:
        """What reading costs at the present price, which then moves by a step.

        The price is a buffer of the network, so that a checkpoint holds it; as with the statistics
        of a batch norm, several processes go on with the main one's.
        """
        share, price = self.network.share_read(rate_G), self.network.price
        charge = price.clone() * share
        price += PRICE_STEP * (share.detach() - self.system.target).sign()
        return charge


class HybridObjective(DenseObjective):
    """Classification for the blocks, and REINFORCE for the gates."""

    entry = "gated"

    def __init__(self, recipe: Recipe, teacher: nn.Module | None, system: SkipNet) -> None:
        super().__init__(recipe, teacher)
        self.system = system

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> StepOutput:
        """Loss, training accuracy and share of open gates of one batch."""
        gated = model(x)
        output = self.classified(gated.logits, x, y, progress)
        error_B = F.cross_entropy(gated.logits.detach().float(), y, reduction="none")
        return_BG = returns(gated.open, error_B, self.system.reward)
        log_prob_BG = -F.binary_cross_entropy_with_logits(
            gated.gate_logits, gated.open, reduction="none"
        )
        reinforce = -(return_BG * log_prob_BG).sum(1).mean()
        metrics = {**output.metrics, "open": gated.open.mean()}
        return StepOutput(output.loss + self.system.rl_weight * reinforce, metrics)


def returns(open_BG: Tensor, error_B: Tensor, reward: float) -> Tensor:
    """Undiscounted rewards from each gate on: of each skipped block, and last of the answer.

    Args:
        open_BG: actions, 1 where the block ran.
        error_B: cross-entropy of the answer.
        reward: α, which all gates share.

    Returns:
        (B, G).
    """
    scale = reward / open_BG.shape[1]
    skipped_BG = 1 - open_BG
    left_BG = skipped_BG.flip(1).cumsum(1).flip(1)
    return scale * (left_BG - error_B[:, None])


def settle(network: GatedResNet, bench: Bench, target: float) -> None:
    """Set the handicap so that training images read ``target`` of the skippable parameters.

    The images are not augmented. Processes divide them and all come to the same handicap.

    Args:
        network: in eval mode, on the bench's device.
        bench: gives the images.
        target: share of the parameters.
    """
    step = SETTLING_REACH * network.temperature
    for _ in range(SETTLING_HALVINGS):
        step /= 2
        network.handicap += step if _share_read(network, bench) > target else -step


@torch.no_grad()
def _share_read(network: GatedResNet, bench: Bench) -> float:
    """Mean share of the skippable parameters that some training images read."""
    engine, read, images = bench.chain.engine, 0, 0
    for x, _ in bench.calibration().part(engine.rank, engine.world_size, SETTLING_SAMPLES):
        read += int(network.with_load(x)[1].active_params.sum())
        images += len(x)
    read_by_all, images_of_all = engine.totals([read, images])
    least, most = (network.bounds()[end]["active_params"] for end in ("least", "most"))
    return (read_by_all / images_of_all - least) / (most - least)


def _supervised(bench: Bench, network: GatedResNet) -> tuple[Recipe, str]:
    bench.train(network)
    return bench.recipe, ""
