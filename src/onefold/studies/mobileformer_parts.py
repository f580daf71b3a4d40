"""Mobile-Former without parts of its blocks: what stands in the place of each, so that the rest is as it was."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from onefold.models.layers import DynamicReLU
from onefold.models.mobileformer_blocks import Block


class KeepTokens(nn.Module):
    """In place of a bridge to the Former: tokens as they are, whatever the map."""

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The map (B, C, H, W) and the tokens (B, T, D) -> the same tokens."""
        return tokens


class KeepMap(nn.Module):
    """In place of a bridge to the Mobile: the map as it is, whatever the tokens."""

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The map (B, C, H, W) and the tokens (B, T, D) -> the same map."""
        return x


class StaticReLU(nn.Module):
    """In place of a DY-ReLU: a ReLU, whatever the token."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        """(B, C, H, W) and a token (B, D) -> (B, C, H, W)."""
        y: Tensor = self.act(x)
        return y


def remove_parts_(net: nn.Module, parts: Collection[str]) -> None:
    """Remove parts of every block, in place: `to_former`, `former`, `to_mobile`, and `act` for DY-ReLU.

    Raises ValueError for another part.
    """
    if unknown := set(parts) - {"to_former", "former", "to_mobile", "act"}:
        raise ValueError(f"a block of Mobile-Former has no part {sorted(unknown)}")
    for block in [module for module in net.modules() if isinstance(module, Block)]:
        if "to_former" in parts:
            block.to_former = KeepTokens()  # type: ignore[assignment]
        if "former" in parts:
            block.former = nn.Identity()  # type: ignore[assignment]
        if "to_mobile" in parts:
            block.to_mobile = KeepMap()  # type: ignore[assignment]
        if "act" in parts:
            for name, part in list(block.mobile.named_children()):
                if isinstance(part, DynamicReLU):
                    setattr(block.mobile, name, StaticReLU())
