"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(max(1, min(2, os.cpu_count() or 1)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data and weights, or a skip that says where it was looked for."""
    folder = Path(os.environ.get("ONEFOLD_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "weights").is_dir():
        pytest.skip(f"needs the shared data folder, not found at {folder}; set ONEFOLD_TEST_DATA")
    return folder


@pytest.fixture
def seeded() -> int:
    """A fixed seed for torch, given back so that a test can state it."""
    torch.manual_seed(0)
    return 0
