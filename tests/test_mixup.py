"""Mixup and CutMix: shares that say what is in the images, one draw per batch, keyed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from image_fixtures import batches
from onefold.data import Mixing, MixupLoader
from onefold.data.sampler import batch_generator, sample_generator
from onefold.errors import BadArgument
from onefold.train import cross_entropy


@pytest.mark.parametrize("mixing", [Mixing(mixup=0.2), Mixing(cutmix=1.0), Mixing(mixup=0.8, cutmix=1.0, p=0.7)])
def test_shares_sum_to_one_and_tell_what_is_in_the_images(mixing: Mixing) -> None:
    """Image i is one-hot in channel i: what is left of each channel is what its label must say."""
    labels = torch.tensor([2, 0, 4, 1])
    images = F.one_hot(labels, 5).float()[:, :, None, None].expand(-1, -1, 32, 24).contiguous()
    kept = []
    for step in range(60):
        mixed, shares = mixing(images, labels, 5, batch_generator(0, 0, step, 0))
        torch.testing.assert_close(shares.sum(1), torch.ones(4))
        torch.testing.assert_close(mixed.mean((2, 3)), shares)
        kept.append(float(shares[0, 2]))
    assert len(set(kept)) > 20


@pytest.mark.parametrize("mixing", [Mixing(mixup=0.2), Mixing(cutmix=1.0)])
def test_mixing_equal_images_changes_nothing(mixing: Mixing) -> None:
    images, labels = torch.randn(1, 3, 16, 16).expand(6, -1, -1, -1).contiguous(), torch.full((6,), 3)
    for step in range(10):
        mixed, shares = mixing(images, labels, 5, batch_generator(0, 1, step, 0))
        assert torch.equal(mixed, images)
        assert torch.equal(shares, F.one_hot(labels, 5).float())


def test_cutmix_pastes_one_rectangle() -> None:
    images = torch.stack([torch.zeros(1, 20, 30), torch.ones(1, 20, 30)])
    for step in range(40):
        mixed, shares = Mixing(cutmix=1.0)(images, torch.tensor([0, 1]), 2, batch_generator(0, 0, step, 0))
        where = mixed[0, 0].nonzero()
        if len(where):
            (top, left), (bottom, right) = where.min(0).values, where.max(0).values
            assert mixed[0, 0, top : bottom + 1, left : right + 1].all()
            assert len(where) == (bottom - top + 1) * (right - left + 1)
        assert float(shares[0, 1]) == pytest.approx(len(where) / 600, abs=1e-6)
        assert torch.equal(mixed[1], 1 - mixed[0])


def test_the_share_is_beta_distributed() -> None:
    images, labels = torch.zeros(2, 1, 1, 1), torch.tensor([0, 1])
    mixing = Mixing(mixup=0.2)
    drawn = [float(mixing(images, labels, 2, batch_generator(5, 0, i, 0))[1][0, 0]) for i in range(4000)]
    assert np.mean(drawn) == pytest.approx(0.5, abs=0.03)
    assert np.var(drawn) == pytest.approx(1 / (4 * (2 * 0.2 + 1)), rel=0.05)  # of Beta(a, a): 1 / (4 (2 a + 1))


def test_the_loss_of_shares_is_the_mix_of_the_losses() -> None:
    logits, labels, others = torch.randn(6, 5), torch.randint(5, (6,)), torch.randint(5, (6,))
    for smoothing in (0.0, 0.1):
        shares = 0.3 * F.one_hot(labels, 5) + 0.7 * F.one_hot(others, 5)
        mixed = cross_entropy(logits, shares, smoothing=smoothing)
        one, other = (cross_entropy(logits, t, smoothing=smoothing) for t in (labels, others))
        torch.testing.assert_close(mixed, 0.3 * one + 0.7 * other)
        smoothed = (1 - smoothing) * F.one_hot(labels, 5) + smoothing / 5
        derived = -(smoothed * (logits - logits.exp().sum(1, keepdim=True).log())).sum(1).mean()
        torch.testing.assert_close(one, derived)
    with pytest.raises(BadArgument, match=r"labels of shape \(6, 4\) for logits of shape \(6, 5\): expected \(6,\)"):
        cross_entropy(logits, shares[:, :4])


def mixed(rank: int = 0, **given: object) -> MixupLoader:
    return MixupLoader(batches(rank=rank, **given), Mixing(mixup=0.4, cutmix=1.0), num_classes=3, seed=4, rank=rank)


def test_mixing_is_keyed_by_epoch_step_and_rank() -> None:
    whole, again, late = list(mixed().epoch(1)), list(mixed(num_workers=2).epoch(1)), list(mixed().epoch(1, 2))
    for (a, b), (c, d) in zip(whole[2:] + whole, late + again, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
    draws = {
        tuple(batch_generator(seed, epoch, step, rank).random(2))
        for seed in (0, 1)
        for epoch in (0, 1)
        for step in (0, 1)
        for rank in (0, 1)
    }
    assert len(draws) == 16
    assert tuple(sample_generator(0, 0, 0).random(2)) not in draws
