"""Fixtures that several test files share."""

from __future__ import annotations

import importlib
import os
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings
from torch import nn

from available_runtimes import missing

ROOT = Path(__file__).resolve().parents[1]

if not torch.cuda.is_available():  # triton reads this once, when whoever comes first imports it
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # grpc, where a package brings it, prints when a test forks
settings.register_profile("onefold", deadline=None)  # a busy machine is no failure
settings.load_profile("onefold")
torch.set_num_threads(1)  # tests run side by side, one process a core; threads would only wait for each other
for name in [name for name in os.environ if name.startswith("MALLOC_")]:
    del os.environ[name]  # tests tell how much memory a process keeps
# Under nohup, or behind a shell's `&`, these are ignored, and every process that a test starts inherits that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


# Of a runtime that is missing nothing is collected; test_runtimes.test_it_is_here says so by name.
collect_ignore = [f"test_{runtime}.py" for runtime in ("coreml", "executorch", "mnn", "web") if missing(runtime)]
SHARED_DATA = Path(os.environ.get("ONEFOLD_TEST_DATA", ROOT.parent / "shared" / "data"))
if not (SHARED_DATA / "weights").is_dir():  # said by the fixture below, to the tests that only need it among others
    collect_ignore.append("test_real_weights.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options for CI: a second environment runs what the first could not, no test twice, and ends in time."""
    group = parser.getgroup("onefold")
    group.addoption("--write-passed", type=Path, metavar="FILE", help="write the ids of the tests that passed to FILE")
    group.addoption("--deselect-passed", type=Path, metavar="FILE", help="leave out the tests whose ids FILE holds")
    group.addoption("--time-limit", type=float, metavar="MINUTES", help="skip, and count, what has not begun by then")


class WritePassed:
    """Writes the id of each test that passed to a file, one a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(report.nodeid + "\n")


_BEGAN = pytest.StashKey[float]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_BEGAN] = time.monotonic()
    path = config.getoption("write_passed")
    if path is not None and not hasattr(config, "workerinput"):  # xdist's workers report to the process that writes
        config.pluginmanager.register(WritePassed(path))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = config.getoption("deselect_passed")
    if path is not None:
        passed = set(path.read_text(encoding="utf-8").splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = [item for item in items if item.nodeid not in passed]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("time_limit")
    if limit is not None and time.monotonic() - item.config.stash[_BEGAN] > 60 * limit:
        pytest.skip(f"not begun within {limit:g} minutes, the time limit of this run")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """One thread again, whatever the test before has set."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_calibration_of_another_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Calibrations are kept in a folder of this run: those of an earlier one would be found, and nothing computed."""
    folder = tmp_path_factory.mktemp("calibrations")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onefold.commands.calibration_cache.calibration_cache", lambda: folder)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data and weights, or a skip that says where it was looked for."""
    if not (SHARED_DATA / "weights").is_dir():
        pytest.skip(
            f"needs the shared data folder, not found at {SHARED_DATA}; set ONEFOLD_TEST_DATA (test_real_weights.py is "
            "left out without it)"
        )
    return SHARED_DATA


@pytest.fixture
def seeded() -> int:
    """A fixed seed for torch, given back so that a test can state it."""
    torch.manual_seed(0)
    return 0


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    """timm, for parity tests only; torchvision's operator schemas are declared first, which its CPU build lacks."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("timm")
    except ImportError as error:
        pytest.skip(f"needs timm (pip install --no-deps timm torchvision): {error}")


def shaken(model: nn.Module) -> nn.Module:
    """The model in eval mode with random norm statistics, gains and biases, so that folding has work to do."""
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_(std=0.3)
            norm.running_var.uniform_(0.5, 2.0)
            if norm.weight is not None:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias, std=0.3)
    return model.eval()
