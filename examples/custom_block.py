"""A re-parameterized block of one's own: written in the algebra, trained on two routes, fused, and checked.

    python examples/custom_block.py [PHOTO]

The branches are a 3x3, a 1x3 followed by a 3x1 (asymmetric, as in Inception), and a skip with a norm. `Sum` and `Chain`
are all that is needed: training by `moments` and `quickest`, and fusing to one 3x3 convolution, follow from them.
"""

import copy
import sys

import torch
from torch import Tensor, nn

import onefold
from onefold.data import Preprocessing
from onefold.data.decode import decode_image
from onefold.reparam.folding_rules import Chain, Sum, conv_act
from onefold.reparam.routes import moments, per_branch, quickest, set_route_


class AsymmetricBlock(nn.Module):
    """relu(3x3 + 1x3 then 3x1 + skip), each branch with its norm; (B, C, H, W) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        square = Chain(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        asymmetric = Chain(
            # Only the first layer of a Chain may pad, so it pads for both: then fusing is exact up to the border.
            nn.Conv2d(channels, channels, (1, 3), padding=(1, 1), bias=False),
            nn.Conv2d(channels, channels, (3, 1), bias=False),
            nn.BatchNorm2d(channels),
        )
        self.branches = Sum(square, asymmetric, nn.BatchNorm2d(channels))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """The activation goes along, since a route may compute it together with the sum."""
        return conv_act(self.branches, self.act, x)


def main(photo: str | None = None) -> None:
    """Train two steps by each route from the same weights; fuse the last network and measure its drift."""
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    if photo is not None:
        images = torch.from_numpy(Preprocessing(size=32)(decode_image(photo))).expand(8, -1, -1, -1)
    stem, head = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Linear(16, 4)
    start = nn.Sequential(stem, AsymmetricBlock(16), AsymmetricBlock(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    for route in (per_branch, moments, quickest):
        model = set_route_(copy.deepcopy(start), route).train()
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
        for _ in range(2):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"{route.__name__:10}  losses {losses[0]:.6f}, {losses[1]:.6f}")

    fused = onefold.fuse(model.eval())
    print(f"fused: {fused[1].branches}")
    print(f"drift {onefold.drift(model, fused, images):.1e}; norms left: {len(onefold.unfused_norms(fused))}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
