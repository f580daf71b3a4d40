"""Parameters and multiply-adds against the papers' tables, to the unit.

The integers come from arithmetic on the papers' layer tables, done outside of torch.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from onefold.models import CATALOGUE, create_model
from onefold.models.flops import count_flops
from onefold.reparam import fuse

# name: parameters, multiply-adds at 224 of the folded network; the same of the training network. arXiv 2206.04040,
# Table 9, prints 2.1/275, 4.8/825, 7.8/1299, 10.1/1896, 14.8/2978 (million), squeeze-excite left out.
MOBILEONE = {
    "mobileone_s0": (2_078_504, 275_110_400, 5_293_272, 1_051_935_232),
    "mobileone_s1": (4_764_840, 825_057_024, 4_825_192, 830_062_080),
    "mobileone_s2": (7_808_168, 1_298_426_496, 7_884_648, 1_304_027_392),
    "mobileone_s3": (10_078_312, 1_895_790_592, 10_170_600, 1_902_112_768),
    "mobileone_s4": (14_838_352, 2_977_641_600, 14_951_248, 2_985_174_272),
}
S4_GATES = 1_628_160

# name: parameters, multiply-adds at 224, 192, 160, 128. arXiv 1704.04861, Tables 6 and 7, prints 569, 418, 290, 186 at
# width 1 and 325, 149, 41 at 224.
MOBILENETV1 = {
    "mobilenetv1_100": (4_231_976, (568_740_352, 418_121_728, 290_675_200, 186_400_768)),
    "mobilenetv1_075": (2_585_560, (325_400_448, 239_273_472, 166_396_800, 106_770_432)),
    "mobilenetv1_050": (1_331_592, (149_497_088, 109_970_432, 76_524_800, 49_160_192)),
    "mobilenetv1_025": (470_072, (41_030_272, 30_212_608, 21_059_200, 13_570_048)),
    # Tables 4 and 5 print 29.3/4866 (without the Linear's 1.02 M) and 2.9/307.
    "conv_mobilenet_100": (29_294_088, (4_867_293_184,)),
    "mobilenetv1_shallow": (2_887_976, (307_323_392,)),
}

# name: parameters, multiply-adds at 224, and, in million, what arithmetic gives with one more for each element that a
# norm or a DY-ReLU writes. arXiv 2108.05895 prints 26, 52, 96, 151, 214, 294, 508.
MOBILEFORMER = {
    "mobileformer_26m": (3_232_788, 23_550_208, 25.6),
    "mobileformer_52m": (3_469_092, 49_290_496, 51.3),
    "mobileformer_96m": (4_585_252, 92_017_040, 95.3),
    "mobileformer_151m": (7_595_828, 146_249_168, 150.8),
    "mobileformer_214m": (9_425_920, 208_374_240, 214.0),
    "mobileformer_294m": (11_422_648, 286_732_160, 293.8),
    "mobileformer_508m": (13_976_976, 498_467_680, 508.4),
}


@pytest.mark.parametrize("name", MOBILEONE)
def test_mobileone_costs_what_the_paper_says_before_and_after_folding(name: str) -> None:
    params, macs, train_params, train_macs = MOBILEONE[name]
    gates = S4_GATES if name == "mobileone_s4" else 0
    net = create_model(name).eval()
    train, folded = count_flops(net, 224), count_flops(fuse(net), 224)
    assert (folded.params, folded.macs - folded.gate_macs, folded.gate_macs) == (params, macs, gates)
    assert (train.params, train.macs - train.gate_macs, train.gate_macs) == (train_params, train_macs, gates)
    assert folded.elementwise == 0


@pytest.mark.parametrize("name", MOBILENETV1)
def test_mobilenetv1_costs_what_the_paper_says_at_each_resolution(name: str) -> None:
    params, macs = MOBILENETV1[name]
    net = create_model(name)
    counts = [count_flops(net, size) for size in (224, 192, 160, 128)[: len(macs)]]
    assert [count.params for count in counts] == [params] * len(macs)
    assert tuple(count.macs for count in counts) == macs


@pytest.mark.parametrize("name", ["mobilenetv1_025.tf", "mobilenetv1_025.timm", "mobilenetv1_025.leaky"])
def test_flavours_cost_the_same(name: str) -> None:
    assert count_flops(create_model(name), 160) == count_flops(create_model("mobilenetv1_025"), 160)


@pytest.mark.parametrize("name", MOBILEFORMER)
def test_mobileformer_costs_what_the_paper_says(name: str) -> None:
    params, macs, published = MOBILEFORMER[name]
    count = count_flops(create_model(name), 224)
    assert (count.params, count.macs) == (params, macs)
    assert round((count.macs + count.elementwise) / 1e6, 1) == published


def test_every_name_of_the_catalogue_stands_in_a_table_here() -> None:
    known = {*MOBILEONE, *MOBILENETV1, *MOBILEFORMER}
    assert {name.partition(".")[0] for name in CATALOGUE} == known


# --------------------------------------------------------------------------- the counter itself


class Attention(nn.Module):
    """A patch convolution, self-attention on the patches, a Linear: every kind of product once."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 8, 4, 4, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.patches(x)).flatten(2).transpose(1, 2)
        mixed: Tensor = self.out(nn.functional.scaled_dot_product_attention(tokens, tokens, tokens))
        return mixed


def test_convolutions_products_and_linears_are_counted_by_their_formulas() -> None:
    height, width = 16, 24
    patches = (height // 4) * (width // 4)
    count = count_flops(Attention(), (height, width))
    assert count.macs == patches * 8 * (1 * 4 * 4) + 2 * patches * patches * 8 + patches * 8 * 3
    assert count.params == (8 * 16 + 8) + 2 * 8 + (8 * 3 + 3)
    assert count.elementwise == patches * 8
    assert count.gate_macs == 0


def test_a_network_is_counted_as_in_eval_mode_and_left_as_it_was() -> None:
    net = create_model("mobilenetv1_025", in_chans=4)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    count = count_flops(net, 64)
    assert net.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in net.parameters())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())
    assert count == count_flops(net.eval(), 64)
    assert (
        count.macs - count_flops(create_model("mobilenetv1_025"), 64).macs == 8 * 9 * 32 * 32
    )  # one more input channel


def test_counting_needs_no_memory_and_knows_half_precision() -> None:
    with torch.device("meta"):
        net = create_model("mobileone_s1")
    assert count_flops(net.half(), 224).macs == MOBILEONE["mobileone_s1"][3]


def test_a_network_without_a_convolution_is_refused() -> None:
    with pytest.raises(ValueError, match="no convolution"):
        count_flops(nn.Linear(3, 3), 224)


class _EveryRule(nn.Module):
    """Operations whose shapes are worked out here and not by torch, with broadcasting, strides, dilation and tails."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5, stride=2, padding=1, dilation=2)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 8, 3, stride=2)
        self.rows, self.tokens = nn.LayerNorm(8), nn.Linear(8, 6, bias=False)
        self.head = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(torch.relu(self.norm(self.stem(x))))
        y = torch.maximum(y * y.mean((2, 3), keepdim=True).sigmoid(), nn.functional.hardtanh_(y - 1.0))
        tokens = self.rows(y.flatten(2).mT)
        mixed = self.tokens((tokens @ tokens.mT).softmax(-1) @ tokens)
        return self.head(torch.cat([y.mean((-1, -2)), nn.functional.silu(mixed).mean(1)], dim=-1))


def test_shapes_that_are_worked_out_here_are_torchs() -> None:
    model, image = _EveryRule().eval(), torch.zeros(1, 3, 33, 29)
    with FlopCounterMode(display=False) as theirs:
        model(image)
    assert count_flops(model, (33, 29)).macs == theirs.get_total_flops() // 2


def test_no_compiler_is_imported_to_count_to_fuse_or_to_open_fused_weights() -> None:
    """torch's takes over a second, which was most of the time of `onefold fuse` and `onefold predict`."""
    code = """
import sys, torch
from onefold.models import count_flops, create_model
from onefold.models.load_weights import _empty_fused
from onefold.reparam import fuse
for name in ("mobilenetv1_025", "mobileformer_26m"):
    model = create_model(name, num_classes=2).eval()
    count_flops(model, 64), count_flops(fuse(model), 64), count_flops(_empty_fused(model), 64)
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")
