"""SkipNet: gates that skip whole residual blocks (Wang et al., ECCV 2018, arXiv:1711.09485).

A gate reads the output of the block before its own. The first block has no gate, and the projection
of a shortcut always runs.

Shapes: B batch, C channels, E entries of the recurrent gates' state, G gates, V classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast, get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigmabranch.backbones import GlobalAveragePool, ResNet, ResNetSpec, as_backbone
from sigmabranch.backbones.resnet import BasicBlock, Bottleneck
from sigmabranch.errors import ConfigError
from sigmabranch.measure import Load, module_costs
from sigmabranch.peers.bench import Bench
from sigmabranch.peers.system import System, Trained
from sigmabranch.tasks import Task
from sigmabranch.tasks.counting import example
from sigmabranch.training import DenseObjective, FinetuneRecipe, Recipe, StepOutput

GATE_STATE = 10
# As wide as their input, but no wider than in the networks that feed-forward gates were made for.
FEEDFORWARD_WIDTH = 64
# Of all epochs, in systems of two trainings.
FIRST_PHASE = 0.6
# Gates that are pushed towards a rate start with this logit: seven in eight are open.
OPEN_LOGIT = 2.0

Block = Bottleneck | BasicBlock
State = tuple[Tensor, Tensor] | None


@dataclass(frozen=True, kw_only=True)
class SkipNet(System):
    """Whole residual blocks that a gate skips.

    The mode ``rate`` is not of the paper but of ConvNet-AIG (Veit and Belongie, ECCV 2018,
    arXiv:1711.11503), because neither of the paper's own can be made to hit a size. Ours is that
    its noise falls linearly to zero while training, so that the rate also holds without noise.

    Attributes:
        gate: ``"recurrent"`` (pooling, one LSTM for all gates) or the paper's convolutional gates
            ``"feedforward1"`` and ``"feedforward2"``.
        mode: ``"supervised"`` (cross-entropy alone, straight through the threshold), ``"hybrid"``
            (that, then REINFORCE with a reward for skipping) or ``"rate"`` (a penalty on each
            gate's distance from ``target``).
        target: share of the inputs for which each gate is to be open, in mode rate.
        rate_weight: of the squared distances from ``target``, summed over gates.
        reward: α, of skipping all blocks, in mode hybrid.
        rl_weight: of the REINFORCE term.
        temperature: what a gate's logit is divided by before an action is drawn; small is sharp.
    """

    name: ClassVar[str] = "skipnet"
    summary: ClassVar[str] = "gates skip whole residual blocks, input by input"

    gate: Literal["recurrent", "feedforward1", "feedforward2"] = "recurrent"
    mode: Literal["supervised", "hybrid", "rate"] = "supervised"
    target: float = 0.6
    rate_weight: float = 2.0
    reward: float = 0.1
    rl_weight: float = 0.01
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_choices(self, "gate", "mode")
        check_target(self.name, self.target)
        for name in ("rate_weight", "reward", "rl_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"skipnet {name} must be at least 0, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise ConfigError(f"skipnet temperature must be positive, got {self.temperature}")

    def check(self, task: Task) -> None:
        """The network must have residual blocks, and the recipe an epoch for each training."""
        spec = residual_spec(self.name, task)
        if sum(spec.layers) < 2:
            raise ConfigError("skipnet never gates the first block, and the network has no other")
        if self.mode == "hybrid":
            phases(task.finetune)

    def fitted(self, task: Task, active_params: int) -> Self:
        """Mode rate, with the target that gives the size if all gates are open equally often."""
        self.check(task)
        limits = self.sketch(task).bounds()
        always, most = (limits[end]["active_params"] for end in ("least", "most"))
        if active_params <= always:
            raise ConfigError(
                f"skipnet always reads {always:,} parameters, more than the {active_params:,} asked"
            )
        target = min(1.0, (active_params - always) / (most - always))
        return replace(self, mode="rate", target=target)

    def sketch(self, task: Task) -> GatedResNet:
        """The gated network, all gates open."""
        return GatedResNet(task.model.build(), example(task), self.gate).opened()

    def details(self, network: nn.Module, task: Task) -> dict[str, Any]:
        """Sizes of the gates and of each block that can be skipped."""
        assert isinstance(network, GatedResNet)
        cell = getattr(network.gates, "cell", None)
        return {
            "gates": len(network.block_params_G),
            "gate_params": _params(network.gates),
            "lstm_params": 0 if cell is None else _params(cell),
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
        recipe, mark = {
            "supervised": self._supervised,
            "hybrid": self._hybrid,
            "rate": self._rate,
        }[self.mode](bench, network)
        return Trained(
            network=network,
            recipe=recipe,
            epochs=bench.epochs,
            mark=mark,
            counted=network.opened(),
        )

    def _supervised(self, bench: Bench, network: GatedResNet) -> tuple[Recipe, str]:
        bench.train(network)
        return bench.recipe, ""

    def _hybrid(self, bench: Bench, network: GatedResNet) -> tuple[Recipe, str]:
        first, last = phases(bench.recipe)
        bench.train(network, recipe=first, step="supervised")
        network.sampling = "bernoulli"
        bench.train(network, HybridObjective(last, teacher(bench), self), recipe=last)
        return last, phases_mark(first, last)

    def _rate(self, bench: Bench, network: GatedResNet) -> tuple[Recipe, str]:
        network.sampling = "gumbel"
        network.gates.lean(OPEN_LOGIT)
        bench.train(network, RateObjective(bench.recipe, teacher(bench), self, network))
        return bench.recipe, ""


class SkippingNet(nn.Module):
    """A network that leaves work out for a single input, and masks the results of a batch.

    Attributes:
        all_open: every gate is 1 and nothing is left out: the dense network's logits, at the price
            of everything there is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.all_open = False

    def opened(self) -> Self:
        """A copy with :attr:`all_open`, whose operations a counter can follow."""
        whole = copy.deepcopy(self).eval()
        whole.all_open = True
        return whole

    def skips(self, x: Tensor) -> bool:
        """Whether to leave work out for ``x``; a tracer must not see one input's choices."""
        return not (self.training or self.all_open or len(x) > 1 or torch.jit.is_tracing())


class Gated(NamedTuple):
    """What one pass gives.

    Attributes:
        logits: (B, V).
        open: (B, G) float 0 or 1, in training with the gates' gradient.
        gate_logits: (B, G), as actions are drawn from them.
    """

    logits: Tensor
    open: Tensor
    gate_logits: Tensor


class GatedResNet(SkippingNet):
    """A ResNet with a gate before every residual block but the first; takes over its modules.

    Args:
        dense: a ResNet on the CPU.
        example: one input, (1, ...), for the prices.
        gate: kind of gate, see :class:`SkipNet`.

    Attributes:
        sampling: how training makes a choice of a logit: by ``"threshold"``, or with noise,
            ``"bernoulli"`` (no gradient) or ``"gumbel"`` (straight through).
        temperature: see :class:`SkipNet`.

    Raises:
        ConfigError: the network has no residual blocks.
    """

    noise: Tensor
    block_params_G: Tensor
    block_macs_G: Tensor

    def __init__(self, dense: nn.Module, example: Tensor, gate: str = "recurrent") -> None:
        super().__init__()
        self.stem, blocks, self.head = residual_parts(dense)
        self.blocks = nn.ModuleList(SkippableBlock(block) for block in blocks)
        widths = [_outputs(block) for block in blocks[:-1]]
        self.gates = _GATES[gate](widths)
        self.sampling: Literal["threshold", "bernoulli", "gumbel"] = "threshold"
        self.temperature = 1.0
        self.register_buffer("noise", torch.ones(()), persistent=False)
        self._set_prices(module_costs(self, example))

    def _set_prices(self, costs: dict[str, tuple[int, int]]) -> None:
        bodies = [costs[f"blocks.{number}.body"] for number in range(1, len(self.blocks))]
        params, macs = (torch.tensor(column) for column in zip(*bodies, strict=True))
        self.register_buffer("block_params_G", params, persistent=False)
        self.register_buffer("block_macs_G", macs, persistent=False)
        whole_params, whole_macs = costs[""]
        self.always_params = whole_params - int(params.sum())
        self.always_macs = whole_macs - int(macs.sum())

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) → (B, V) logits."""
        return self.gated(x).logits

    def gated(self, x: Tensor) -> Gated:
        """Logits and the gates' choices."""
        first, *others = (cast(SkippableBlock, block) for block in self.blocks)
        skips, state = self.skips(x), None
        feature = first.run(self.stem(x))
        opens, logits = [], []
        for number, block in enumerate(others):
            logit_B, state = self._gate(number, feature, state)
            open_B = self._choice(logit_B)
            if skips:
                feature = block.run(feature) if bool(open_B) else block.shortcut(feature)
            else:
                feature = block(feature, open_B)
            opens.append(open_B)
            logits.append(logit_B)
        return Gated(self.head(feature), torch.stack(opens, 1), torch.stack(logits, 1))

    def with_load(self, x: Tensor) -> tuple[Tensor, Load]:
        """Logits (B, V) and what each input made the network read and compute."""
        logits, open_BG, _ = self.gated(x)
        chosen_BG = open_BG > 0.5
        return logits, Load(
            active_params=self.always_params + (chosen_BG * self.block_params_G).sum(1),
            macs=self.always_macs + (chosen_BG * self.block_macs_G).sum(1),
            choices=chosen_BG,
        )

    def bounds(self) -> dict[str, dict[str, int]]:
        """The cost with all gates closed and with all open."""
        least = {"active_params": self.always_params, "macs": self.always_macs}
        optional = (int(self.block_params_G.sum()), int(self.block_macs_G.sum()))
        added = zip(least.items(), optional, strict=True)
        return {"least": least, "most": {name: value + more for (name, value), more in added}}

    def _gate(self, number: int, feature: Tensor, state: State) -> tuple[Tensor, State]:
        with torch.autocast(feature.device.type, enabled=False):
            logit_B, state = self.gates(feature.float(), number, state)
        return logit_B / self.temperature, state

    def _choice(self, logit_B: Tensor) -> Tensor:
        """1 where the block runs, else 0."""
        if self.training and self.sampling == "bernoulli":
            return torch.bernoulli(logit_B.detach().sigmoid())
        if self.training and self.sampling == "gumbel":
            # The difference of two Gumbel variables is logistic.
            logistic_B = torch.rand_like(logit_B).logit(eps=1e-6)
            logit_B = logit_B + self.noise * logistic_B / self.temperature
        open_B = straight_through(logit_B)
        return open_B.clamp(1.0, 1.0) if self.all_open else open_B


class SkippableBlock(nn.Module):
    """A residual block in two parts: what always runs, and what can be skipped."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        parts = [part for name, part in block.named_children() if name != "downsample"]
        self.shortcut = block.downsample or nn.Identity()
        self.body, self.act = nn.Sequential(*parts[:-1]), parts[-1]

    def run(self, x: Tensor) -> Tensor:
        """What the block of the dense network gives."""
        return self.act(self.body(x) + self.shortcut(x))

    def forward(self, x: Tensor, open_B: Tensor) -> Tensor:
        """That where the gate is open, the shortcut elsewhere."""
        shortcut = self.shortcut(x)
        whole = self.act(self.body(x) + shortcut)
        open_B = open_B.to(whole.dtype)[:, None, None, None]
        return open_B * whole + (1 - open_B) * shortcut


class RecurrentGates(nn.Module):
    """Pooling and a linear map per gate; one LSTM cell and one output for all gates.

    Args:
        widths: channels of the feature that each gate reads.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.pool = GlobalAveragePool()
        self.inputs = nn.ModuleList(nn.Linear(width, GATE_STATE) for width in widths)
        self.cell = Cell(GATE_STATE)
        self.output = nn.Linear(GATE_STATE, 1)
        _initialise(self)

    def forward(self, feature: Tensor, number: int, state: State) -> tuple[Tensor, State]:
        """Logit (B,) of gate ``number`` and the state for the next."""
        input_BE = self.inputs[number](self.pool(feature))
        if state is None:
            state = (torch.zeros_like(input_BE), torch.zeros_like(input_BE))
        state = self.cell(input_BE, state)
        return self.output(state[0]).flatten(), state

    def lean(self, logit: float) -> None:
        """Shift all gates by ``logit``."""
        nn.init.constant_(self.output.bias, logit)


class Cell(nn.Module):
    """An LSTM cell; of linear layers, because the counter knows those and no LSTM."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.input = nn.Linear(size, 4 * size)
        self.hidden = nn.Linear(size, 4 * size)

    def forward(self, input_BE: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The next (output, memory), both (B, E)."""
        output_BE, memory_BE = state
        parts = (self.input(input_BE) + self.hidden(output_BE)).chunk(4, dim=1)
        write, keep, show = (part.sigmoid() for part in parts[:3])
        memory_BE = keep * memory_BE + write * parts[3].tanh()
        return show * memory_BE.tanh(), memory_BE


class FeedforwardGates(nn.Module):
    """A small convolutional network per gate.

    Args:
        widths: channels of the feature that each gate reads.
        gate: makes the convolutions of one gate, given its channels and its own width.
    """

    def __init__(self, widths: Sequence[int], gate: Callable[[int, int], nn.Sequential]) -> None:
        super().__init__()
        self.nets = nn.ModuleList()
        for width in widths:
            own = min(width, FEEDFORWARD_WIDTH)
            self.nets.append(
                nn.Sequential(gate(width, own), GlobalAveragePool(), nn.Linear(own, 2))
            )
        _initialise(self)

    def forward(self, feature: Tensor, number: int, state: State) -> tuple[Tensor, State]:
        """Logit (B,) of gate ``number``; there is no state."""
        closed_B, open_B = self.nets[number](feature).unbind(1)
        return open_B - closed_B, state

    def lean(self, logit: float) -> None:
        """Shift all gates by ``logit``."""
        for net in self.nets:
            output = cast(nn.Linear, cast(nn.Sequential, net)[-1])
            nn.init.constant_(output.bias[1:], logit)


def _feedforward1(width: int, own: int) -> nn.Sequential:
    pool = nn.MaxPool2d(2, ceil_mode=True)
    return nn.Sequential(pool, conv_norm_relu(width, own, 1), conv_norm_relu(own, own, 2))


def _feedforward2(width: int, own: int) -> nn.Sequential:
    return nn.Sequential(conv_norm_relu(width, own, 2))


_GATES: dict[str, Callable[[Sequence[int]], RecurrentGates | FeedforwardGates]] = {
    "recurrent": RecurrentGates,
    "feedforward1": lambda widths: FeedforwardGates(widths, _feedforward1),
    "feedforward2": lambda widths: FeedforwardGates(widths, _feedforward2),
}


class GatedObjective(DenseObjective):
    """Base of the losses of networks that give more than logits."""

    entry = "gated"

    def classified(self, logits_BV: Tensor, x: Tensor, y: Tensor, progress: float) -> StepOutput:
        """The table's classification loss of ``logits_BV``."""
        return super().__call__(cast(nn.Module, lambda _: logits_BV), x, y, progress)


class RateObjective(GatedObjective):
    """Classification, and each gate's squared distance from its rate over the batch."""

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
        penalty = self.system.rate_weight * (rate_G - self.system.target).square().sum()
        metrics = {**output.metrics, "open": rate_G.detach().mean()}
        return StepOutput(output.loss + penalty, metrics)


class HybridObjective(GatedObjective):
    """Classification for the blocks, and REINFORCE for the gates."""

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


def straight_through(logit: Tensor) -> Tensor:
    """1 where ``logit`` is positive, else 0, with the gradient of the sigmoid."""
    soft = logit.sigmoid()
    return (logit > 0).to(soft) + (soft - soft.detach())


def residual_spec(system: str, task: Task) -> ResNetSpec:
    """The shape of the task's network, which must be a ResNet's.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(task.model, ResNetSpec):
        raise ConfigError(
            f"{system} gates the residual blocks of a ResNet, and the network of {task.name} is a "
            f"{task.model.family}: choose another task, or leave this system out"
        )
    return task.model


def residual_parts(model: nn.Module) -> tuple[nn.Sequential, list[Block], nn.Sequential]:
    """A ResNet's modules before its blocks, its blocks, and its pool and head.

    Raises:
        ConfigError: another network.
    """
    if not isinstance(model, ResNet):
        raise ConfigError(f"a {type(model).__name__} has no residual blocks to gate: use a ResNet")
    backbone = as_backbone(model)
    stem = [path for path in backbone.chain if path not in backbone.stages]
    stages = cast(list[nn.Sequential], backbone.modules(backbone.stages))
    blocks = [cast(Block, block) for stage in stages for block in stage]
    head = nn.Sequential(backbone.pool, *backbone.modules(backbone.head))
    return nn.Sequential(*backbone.modules(stem)), blocks, head


def conv_norm_relu(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """A 3×3 convolution, batch norm and ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def phases(recipe: FinetuneRecipe) -> tuple[FinetuneRecipe, FinetuneRecipe]:
    """A recipe as two trainings that share its epochs, and its warm-up in proportion.

    Raises:
        ConfigError: it has a single epoch.
    """
    if recipe.epochs < 2:
        raise ConfigError("a system of two trainings needs two epochs: set finetune.epochs=2")
    first = min(max(1, round(FIRST_PHASE * recipe.epochs)), recipe.epochs - 1)
    pace = recipe.warmup_epochs / recipe.epochs
    last = recipe.epochs - first
    return (
        replace(recipe, epochs=first, warmup_epochs=pace * first),
        replace(recipe, epochs=last, warmup_epochs=pace * last),
    )


def phases_mark(first: Recipe, last: Recipe) -> str:
    """How two trainings depart from the table's recipe."""
    return f"the recipe twice, of {first.epochs} and {last.epochs} epochs"


def teacher(bench: Bench) -> nn.Module | None:
    """The source network, if the recipe asks for imitation of it."""
    return bench.dense() if bench.recipe.distill_weight else None


def check_choices(system: System, *names: str) -> None:
    """Raise :class:`ConfigError` where a field has none of its choices."""
    hints = get_type_hints(type(system))
    for name in names:
        value, choices = getattr(system, name), get_args(hints[name])
        if value not in choices:
            raise ConfigError(
                f"{system.name} {name} is {value!r}: choose one of {', '.join(choices)}"
            )


def check_target(system: str, target: float) -> None:
    """Raise :class:`ConfigError` unless ``target`` is a share of gates that can be open."""
    if not 0 < target <= 1:
        raise ConfigError(f"{system} target must be above 0 and at most 1, got {target}")


def _outputs(block: Block) -> int:
    last = block.conv3 if isinstance(block, Bottleneck) else block.conv2
    return last.out_channels


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _initialise(gates: nn.Module) -> None:
    """Xavier weights and zero biases, as published."""
    for module in gates.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
