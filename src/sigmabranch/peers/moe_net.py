"""A network whose feed-forward layers are experts: what each image makes it read.

Shapes: B batch, T tokens (of all images), R routed experts, K chosen ones, L layers, G = L·R.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sigmabranch.measure import Load, module_costs
from sigmabranch.peers.expert_layer import Choice, ExpertLayer


class MoeNet(nn.Module):
    """A network whose feed-forward layers are :class:`ExpertLayer`; its active size varies.

    Every token takes as many experts as any other, so the multiply-adds are the same for all
    inputs; what is read depends on how alike the tokens of an image are.

    Args:
        model: the carved network, (B, ...) → (B, V) logits, images along the first axis of what its
            feed-forward layers see.
        example: one input, (1, ...), to count on.
    """

    expert_params: Tensor

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.model = model
        # Dispatch computes K experts a token whatever the input, so any input gives the count.
        self.total_params, self.macs = module_costs(model, example)[""]
        layers = self.layers()
        prices = [layer.expert_params for layer in layers for _ in layer.scale]
        self.params_per_token = self.total_params - sum(
            layer.expert_params * (len(layer.scale) - layer.router.active) for layer in layers
        )
        device = layers[0].scale.device
        self.register_buffer("expert_params", torch.tensor(prices, device=device), persistent=False)

    def layers(self) -> list[ExpertLayer]:
        """The layers with experts, in order."""
        return [module for module in self.model.modules() if isinstance(module, ExpertLayer)]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, V)."""
        return self.model(x)

    def with_load(self, x: Tensor) -> tuple[Tensor, Load]:
        """Logits (B, V) and load; choices are the experts that any token of an image took."""
        chosen: dict[nn.Module, Tensor] = {}

        def keep(router: nn.Module, _: tuple[Tensor, ...], choice: Choice) -> None:
            chosen[router] = choice.chosen

        hooks = [layer.router.register_forward_hook(keep) for layer in self.layers()]
        try:
            logits_BV = self.model(x)
        finally:
            for hook in hooks:
                hook.remove()
        used_BLR = [_union(chosen[layer.router], layer, len(x)) for layer in self.layers()]
        choices_BG = torch.cat(used_BLR, dim=1)
        unused_B = (~choices_BG * self.expert_params).sum(dim=1)
        macs_B = torch.full_like(unused_B, self.macs)
        return logits_BV, Load(self.total_params - unused_B, macs_B, choices_BG)

    def bounds(self) -> dict[str, dict[str, int]]:
        """From an image whose tokens all agree to one whose tokens take every expert."""
        return {
            "least": {"active_params": self.params_per_token, "macs": self.macs},
            "most": {"active_params": self.total_params, "macs": self.macs},
        }

    def no_weight_decay(self) -> set[str]:
        """What the network inside exempts."""
        names: Iterable[str] = getattr(self.model, "no_weight_decay", tuple)()
        return {f"model.{name}" for name in names}


def _union(chosen_TK: Tensor, layer: ExpertLayer, images: int) -> Tensor:
    """(B, R) bool: the experts that any of an image's tokens chose."""
    chosen_BX = chosen_TK.view(images, -1)
    used_BR = torch.zeros(images, len(layer.scale), dtype=torch.bool, device=chosen_TK.device)
    return used_BR.scatter_(1, chosen_BX, True)
