"""What this machine is, as a latency's reader needs it: chip, cores, features, versions.

The name of the machine and of its user are not recorded: a results file can be published as it is."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from onefold.system_resources import cpu_affinity, cpu_quota, num_usable_cpus

_PACKAGES = (
    "onefold",
    "torch",
    "numpy",
    "onnx",
    "onnxruntime",
    "openvino",
    "executorch",
    "ai-edge-litert",
    "coremltools",
    "ncnn",
)

# What speeds up a convolution, under one name for every kernel's spelling of it.
_FEATURES = {
    "avx2": ("avx2",),
    "fma": ("fma",),
    "avx512": ("avx512f",),
    "vnni": ("avx512_vnni", "avx_vnni"),
    "bf16": ("avx512_bf16", "bf16", "feat_bf16"),
    "fp16": ("avx512_fp16", "asimdhp", "feat_fp16"),
    "amx": ("amx_tile",),
    "neon": ("asimd", "neon", "advsimd"),
    "dotprod": ("asimddp", "feat_dotprod"),
    "i8mm": ("i8mm", "feat_i8mm"),
    "sve": ("sve",),
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine as a value. What cannot be seen from here is None, or empty.

    `cpu_affinity` are the numbers of the processors that the measuring process was allowed to use.
    """

    chip: str
    architecture: str
    cores: int
    usable_cores: int
    quota: float | None = None
    memory_bytes: int | None = None
    features: tuple[str, ...] = ()
    system: str = ""
    python: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    governor: str | None = None
    max_mhz: float | None = None
    load: float | None = None
    affinity: tuple[int, ...] = ()

    @classmethod
    def detect(cls, packages: Sequence[str] = _PACKAGES, root: Path = Path("/")) -> Machine:
        """The machine this runs on; `packages` are those whose versions matter, `root` is where /proc and /sys are."""
        cpuinfo = _read(root / "proc/cpuinfo")
        return cls(
            chip=_chip(cpuinfo),
            architecture=platform.machine(),
            cores=os.cpu_count() or 1,
            usable_cores=num_usable_cpus(),
            quota=cpu_quota(root),
            memory_bytes=_memory(root),
            features=cpu_features(cpuinfo) or _features_of_macos(),
            system=f"{platform.system()} {platform.release()}".strip(),
            python=platform.python_version(),
            versions=_versions(packages),
            governor=_read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
            max_mhz=_max_mhz(root),
            load=load_average(root),
            affinity=cpu_affinity(),
        )

    @property
    def slug(self) -> str:
        """A short stable name for files: chip, cores and system, and nothing that changes from run to run."""
        system = self.system.split(" ")[0]
        words = re.sub(r"[^a-z0-9]+", "-", self.chip.lower()).strip("-")[:40].strip("-")
        return "-".join(part for part in (words or "unknown", f"{self.cores}c", system.lower()) if part)

    @property
    def available_cores(self) -> float:
        """How many cores' worth of time this process may use: what its affinity and its quota leave of them."""
        return min(self.usable_cores, self.quota or self.usable_cores)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {name.name: getattr(self, name.name) for name in fields(self)}
        lists = {"features": list(self.features), "affinity": list(self.affinity)}
        return {**plain, **lists, "versions": dict(self.versions)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Machine:
        """The inverse of `to_dict`; what is missing is unknown, and keys of a later version are left out."""
        numbers = {name: plain.get(name) for name in ("quota", "max_mhz", "load", "memory_bytes")}
        real = {name: None if value is None else float(value) for name, value in numbers.items()}
        memory = real.pop("memory_bytes")
        return cls(
            chip=str(plain["chip"]),
            architecture=str(plain.get("architecture", "")),
            cores=int(plain["cores"]),
            usable_cores=int(plain.get("usable_cores", plain["cores"])),
            memory_bytes=None if memory is None else int(memory),
            features=tuple(str(name) for name in plain.get("features", ())),
            system=str(plain.get("system", "")),
            python=str(plain.get("python", "")),
            versions={str(name): str(version) for name, version in plain.get("versions", {}).items()},
            governor=None if plain.get("governor") is None else str(plain["governor"]),
            affinity=tuple(int(number) for number in plain.get("affinity", ())),
            **real,
        )


def load_average(root: Path = Path("/")) -> float | None:
    """The load of the last minute, in runnable processes; None where the system does not say."""
    words = _read(root / "proc/loadavg").split()
    if words:
        return float(words[0])
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None


def current_mhz(root: Path = Path("/")) -> float | None:
    """The clock of the quickest of the processors that this process may use, now; None where the system hides it.

    The quickest, since the one that computes is, and those that idle tell nothing.
    """
    frequencies = root / "sys/devices/system/cpu"
    found = [_read(frequencies / f"cpu{number}/cpufreq/scaling_cur_freq").strip() for number in cpu_affinity() or (0,)]
    known = [int(khz) / 1000 for khz in found if khz.isdigit()]
    known = known or [float(mhz) for mhz in re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", _read(root / "proc/cpuinfo"), re.M)]
    return max(known, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _field(text: str, *names: str) -> str:
    """The value of the first line `name : value` under one of these names."""
    for name in names:
        found = re.search(rf"^{re.escape(name)}\s*:\s*(\S.*)$", text, re.MULTILINE)
        if found:
            return found.group(1).strip()
    return ""


def _chip(cpuinfo: str) -> str:
    named = _field(cpuinfo, "model name", "Model", "Hardware", "Processor") or _sysctl("machdep.cpu.brand_string")
    named = named or platform.processor() or platform.machine()
    named = re.sub(r"\((R|TM|C)\)|@.*$|\b\d+-Core Processor\b|\bCPU\b|\bProcessor\b|\bwith .* Graphics\b", " ", named)
    return " ".join(named.split()) or "unknown"


def cpu_features(cpuinfo: str) -> tuple[str, ...]:
    """What a Linux kernel's /proc/cpuinfo says that speeds up a convolution, in our words."""
    return _in_our_words(set(_field(cpuinfo, "flags", "Features").lower().split()))


def onefold_version() -> Mapping[str, str]:
    """The version of onefold, under its name."""
    return _versions(("onefold",))


def _features_of_macos() -> tuple[str, ...]:
    listed = re.findall(r"^hw\.optional\.(?:arm\.)?(\w+): 1$", _sysctl("hw.optional", bare=False), re.MULTILINE)
    return _in_our_words({name.lower() for name in listed})


def _in_our_words(flags: set[str]) -> tuple[str, ...]:
    return tuple(ours for ours, theirs in _FEATURES.items() if flags.intersection(theirs))


def _sysctl(name: str, bare: bool = True) -> str:
    """What macOS says of itself under `name`; empty elsewhere."""
    if platform.system() != "Darwin":
        return ""
    command = ["/usr/sbin/sysctl", *(["-n"] if bare else []), name]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _memory(root: Path) -> int | None:
    kib = _field(_read(root / "proc/meminfo"), "MemTotal").split(" ")[0]
    if kib.isdigit():
        return int(kib) * 1024
    macos = _sysctl("hw.memsize")
    return int(macos) if macos.isdigit() else None


def _max_mhz(root: Path) -> float | None:
    khz = _read(root / "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").strip()
    return int(khz) / 1000 if khz.isdigit() else None


def _versions(packages: Sequence[str]) -> Mapping[str, str]:
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
