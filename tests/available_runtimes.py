"""The runtimes that this machine has, of which tests with a case for each runtime are made.

A runtime that is not here is skipped once, by name and with its reason (`test_runtimes.test_it_is_here`), and not once
in every test.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution

import pytest

from onefold.errors import MissingExtra
from onefold.runtimes import RUNTIMES, import_runtime, web

RUN_ONLY = {"tensorrt"}  # packages without which an artifact is exported all the same


def missing(runtime: str) -> str | None:
    """Why nothing can be exported for a runtime here, or None."""
    for package in set(import_runtime(runtime).PACKAGES) - RUN_ONLY:
        try:
            distribution(package)
        except PackageNotFoundError:
            return f"{runtime} is not installed: there is no package {package}"
    if runtime == "web" and shutil.which("node") is None:
        return "web needs Node.js"
    try:
        if runtime == "web":
            web._node_modules()
    except MissingExtra as error:
        return str(error)
    return None


def unavailable(runtime: str) -> str | None:
    """Why a runtime cannot run here, or None."""
    reason: Callable[[], str | None] | None = import_runtime(runtime).unavailable_reason
    return missing(runtime) or (None if reason is None else reason())


def require(runtime: str) -> None:
    """Skip the test file that calls this where a runtime is missing."""
    if why := missing(runtime):
        pytest.skip(why, allow_module_level=True)


INSTALLED = tuple(runtime for runtime in RUNTIMES if missing(runtime) is None)
RUNNABLE = tuple(runtime for runtime in RUNTIMES if unavailable(runtime) is None)
