"""What this installation is: versions, the machine, where the compiled C++ code comes from, and which extras it has."""

from __future__ import annotations

import platform

import torch

import onefold
from onefold import cpp_extension
from onefold.bench import Machine
from onefold.commands.optional_dependencies import missing_packages, packages_by_extra

_OF_OTHERS = {"all", "demo", "dev", "docs"}  # extras that are made of others, or are for working on onefold


def info() -> dict[str, str]:
    """Describe this installation, for a report of a mistake: name -> text. What is not compiled yet is compiled."""
    machine, known = Machine.detect(packages=()), sorted(packages_by_extra().keys() - _OF_OTHERS)
    lacking = [extra for extra in known if missing_packages(extra)]
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "onefold": f"{onefold.__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        "machine": f"{machine.chip}, {machine.usable_cores} of {machine.cores} cores, {machine.system} "
        f"{machine.architecture}; {' '.join(machine.features)}",
        "GPU": ", ".join(gpus) or "none",
        "C++ code": _compiled_code(),
        "extras": ", ".join(extra for extra in known if extra not in lacking) or "none",
        "not installed": f'pip install "onefold[{",".join(lacking)}]"' if lacking else "none",
    }


def _compiled_code() -> str:
    """Where each library comes from, those from one place together."""
    if cpp_extension.is_native_disabled("ONEFOLD_KERNELS"):
        return "switched off by ONEFOLD_KERNELS=plain"
    for name in cpp_extension.LIBRARY_SOURCES:
        cpp_extension.load_library(name)
    found: dict[str, list[str]] = {}
    for name in cpp_extension.LIBRARY_SOURCES:
        found.setdefault(cpp_extension.LIBRARY_ORIGINS[name], []).append(name)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{', '.join(names)}: {origin}" for origin, names in found.items())
