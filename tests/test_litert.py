"""LiteRT's input: images converted to channels last, compiled and in numpy, the same bits as in the simulation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onefold.quantize.qparams import QParams
from onefold.runtimes import litert
from onefold.runtimes.reference_logits import Floats

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40), st.integers(1, 40))
SCALES = st.integers(1, 1000).map(lambda n: float(np.float32(n / 1000)))


@pytest.fixture(params=["compiled", "plain"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setenv("ONEFOLD_KERNELS", "plain")
        else:
            patch.delenv("ONEFOLD_KERNELS", raising=False)
        if request.param == "compiled" and litert.load_native_library() is None:
            pytest.skip("there is no C++ compiler")
        yield


def images(shape: tuple[int, ...]) -> Floats:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@given(shape=SHAPES)
def test_copied_images_are_the_same(shape: tuple[int, int, int, int]) -> None:
    planes = images(shape)
    place = np.full((shape[0], *shape[2:], shape[1]), np.nan, np.float32)
    litert.copy_channels_last(planes, place)
    assert np.array_equal(place, planes.transpose(0, 2, 3, 1))


@given(shape=SHAPES, scale=SCALES, zero=st.integers(-128, 127))
def test_quantized_images_are_those_of_the_simulation(
    shape: tuple[int, int, int, int], scale: float, zero: int
) -> None:
    planes = images(shape)
    half = planes.size // 2
    planes.flat[:half] = np.round(planes.flat[:half] * 4) / 4  # some of them ties
    place = np.zeros((shape[0], *shape[2:], shape[1]), np.int8)
    litert.quantize_channels_last(planes, place, scale, zero)
    true = QParams(scale, zero).fake_quantize(torch.from_numpy(planes)).numpy()
    assert np.array_equal((place.astype(np.float32) - np.float32(zero)) * np.float32(scale), true.transpose(0, 2, 3, 1))


def test_an_image_of_more_than_one_block() -> None:
    planes = images((1, 3, 100, 257)) * 3
    place = np.zeros((1, 100, 257, 3), np.int8)
    litert.quantize_channels_last(planes, place, 0.02, -3)
    true = np.clip(np.rint(planes * np.float32(1 / 0.02)) - 3, -128, 127)
    assert np.array_equal(place, true.transpose(0, 2, 3, 1))
