"""What a phone is, and how it fares: heat, battery, screen. Its serial number is not kept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from onefold.bench import Machine
from onefold.bench.machine import cpu_features, onefold_version
from onefold.errors import BadArgument
from onefold.phone.adb import Adb

THERMAL_STATUS = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
"""Android's thermal statuses; from "moderate" on it slows the processor down."""

_LEAST_PERCENT = 20
_WARM_BATTERY = 40.0  # degrees Celsius, above which many phones begin to limit themselves
_CPU = "/sys/devices/system/cpu"


@dataclass(frozen=True, kw_only=True)
class PhoneInfo:
    """A phone as a value; `max_khz` has each core's highest clock, by its number, None where it is not known."""

    model: str
    soc: str
    system: str
    architecture: str
    cores: int
    features: tuple[str, ...] = ()
    memory_bytes: int | None = None
    max_khz: Mapping[int, int] = field(default_factory=dict)
    governors: Mapping[int, str] = field(default_factory=dict)
    is_emulator: bool = False

    def cpu_mask(self, wanted: str, threads: int) -> tuple[int, ...]:
        """The cores that `big`, `little`, `all` or a list such as 4-7 stands for; BadArgument for anything else.

        `big` is the quickest kind of core, and the next kind too where there are fewer of it than threads.
        """
        every = tuple(range(self.cores))
        if wanted == "all":
            return every
        if wanted in ("big", "little"):
            return self._kind(wanted, threads)
        if re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", wanted) is None:
            raise BadArgument(f"cores are big, little, all, or numbers such as 4-7, not {wanted!r}")
        spans = [part.partition("-") for part in wanted.split(",")]
        chosen = sorted({n for low, _, high in spans for n in range(int(low), int(high or low) + 1)} & {*every})
        if not chosen:
            raise BadArgument(f"this phone has the cores 0-{self.cores - 1}, and none of {wanted}")
        return tuple(chosen)

    def machine(self, cores: Sequence[int]) -> Machine:
        """The machine that these cores are, as a measurement records it."""
        governors = {self.governors[core] for core in cores if core in self.governors}
        clocks = [self.max_khz[core] for core in cores if core in self.max_khz]
        return Machine(
            chip=f"{self.model} ({self.soc})" if self.soc else self.model,
            architecture=self.architecture,
            cores=self.cores,
            usable_cores=len(cores),
            memory_bytes=self.memory_bytes,
            features=self.features,
            system=self.system,
            versions=onefold_version(),
            governor=", ".join(sorted(governors)) or None,
            max_mhz=max(clocks) / 1000 if clocks else None,
        )

    def _kind(self, wanted: str, threads: int) -> tuple[int, ...]:
        if len(self.max_khz) < self.cores:
            raise BadArgument(f"this phone does not tell which cores are {wanted}: give --cores all, or their numbers")
        chosen: list[int] = []
        for clock in sorted({*self.max_khz.values()}, reverse=wanted == "big"):
            chosen += [core for core, khz in self.max_khz.items() if khz == clock]
            if len(chosen) >= threads:
                break
        return tuple(sorted(chosen))


@dataclass(frozen=True, kw_only=True)
class PhoneCondition:
    """How a phone fares now; None where it does not say.

    `heat` counts as `THERMAL_STATUS` does, temperatures are in Celsius.
    """

    heat: int | None = None
    percent: int | None = None
    charging: bool | None = None
    battery_celsius: float | None = None
    awake: bool | None = None
    saving: bool | None = None

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why nothing should be measured now, a clause each; empty where nothing speaks against it."""
        found = []
        if self.heat is not None and self.heat >= 2:
            found.append(f"it is hot (thermal status {THERMAL_STATUS[min(self.heat, 6)]}) and slows itself down")
        if self.percent is not None and self.percent < _LEAST_PERCENT and not self.charging:
            found.append(f"its battery is at {self.percent} %, and phones slow down below {_LEAST_PERCENT} %")
        if self.saving:
            found.append("its battery saver is on")
        return tuple(found)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a reader of the figures must know, a sentence each: all refusals, and lesser things."""
        found = [f"Of the phone: {clause}." for clause in self.refusals]
        if self.heat is None:
            found.append("Whether the phone was hot is not known: it does not tell.")
        if self.heat == 1:
            found.append("The phone was warm (thermal status light).")
        if self.charging:
            found.append("The phone was charging, which warms it: over wireless adb it need not be.")
        if self.battery_celsius is not None and self.battery_celsius >= _WARM_BATTERY:
            found.append(f"The phone's battery was at {self.battery_celsius:.0f} degrees Celsius.")
        if self.awake is False:
            found.append("The phone's screen was off, and then some keep their quick cores asleep.")
        return tuple(found)


def read_phone_info(adb: Adb) -> PhoneInfo:
    """What the phone says of itself. Raises DeviceFailed."""
    properties = dict(re.findall(r"^\[(.*?)\]: \[(.*?)\]$", adb.shell_output("getprop"), re.MULTILINE))
    cpuinfo, memory = adb.shell_output("cat", "/proc/cpuinfo"), adb.shell_output("cat", "/proc/meminfo")
    cores = _cores(adb, cpuinfo)
    clocks, governors = (_of_cores(adb, cores, name) for name in ("cpuinfo_max_freq", "scaling_governor"))
    total = re.search(r"^MemTotal:\s+(\d+) kB", memory, re.MULTILINE)
    maker, model = properties.get("ro.product.manufacturer", ""), properties.get("ro.product.model", "")
    soc = f"{properties.get('ro.soc.manufacturer', '')} {properties.get('ro.soc.model', '')}".strip()
    named = model if model.lower().startswith(maker.lower()) else f"{maker} {model}"
    return PhoneInfo(
        model=named.strip() or "unknown phone",
        soc=soc or properties.get("ro.board.platform", "") or properties.get("ro.hardware", ""),
        system=f"Android {properties.get('ro.build.version.release', '')}".strip(),
        architecture=properties.get("ro.product.cpu.abi", ""),
        cores=cores,
        features=cpu_features(cpuinfo),
        memory_bytes=int(total.group(1)) * 1024 if total else None,
        max_khz={core: int(khz) for core, khz in clocks.items() if khz.isdigit()},
        governors=governors,
        is_emulator=properties.get("ro.kernel.qemu") == "1" or properties.get("ro.hardware") in ("goldfish", "ranchu"),
    )


def read_condition(adb: Adb) -> PhoneCondition:
    """How the phone fares now. Raises DeviceFailed."""
    battery = adb.shell_output("dumpsys", "battery")
    waking = re.search(r"mWakefulness=(\w+)", adb.shell_output("dumpsys", "power"))
    level, scale, tenths = (_number(battery, name) for name in ("level", "scale", "temperature"))
    status = _number(battery, "status")
    return PhoneCondition(
        heat=read_thermal_status(adb),
        percent=None if level is None else round(100 * level / (scale or 100)),
        charging=None if status is None else status == 2,
        battery_celsius=None if tenths is None else tenths / 10,
        awake=None if waking is None else waking.group(1) == "Awake",
        saving=adb.shell_output("settings", "get", "global", "low_power").strip() == "1",
    )


def read_thermal_status(adb: Adb) -> int | None:
    """The phone's thermal status alone; None where it has none."""
    found = re.search(r"^\s*Thermal Status: (\d+)", adb.shell_output("dumpsys", "thermalservice"), re.MULTILINE)
    return int(found.group(1)) if found else None


def _number(text: str, name: str) -> int | None:
    found = re.search(rf"^\s*{name}: (-?\d+)\s*$", text, re.MULTILINE)
    return int(found.group(1)) if found else None


def _cores(adb: Adb, cpuinfo: str) -> int:
    span = re.fullmatch(r"0-(\d+)", adb.shell_output("cat", f"{_CPU}/possible").strip())
    return int(span.group(1)) + 1 if span else max(1, len(re.findall(r"^processor\s*:", cpuinfo, re.MULTILINE)))


def _of_cores(adb: Adb, cores: int, name: str) -> dict[int, str]:
    """What each core's file of this name holds; those that cannot be read are left out."""
    files = [f"{_CPU}/cpu{core}/cpufreq/{name}" for core in range(cores)]
    ran = adb.shell(["grep", "-H", ".", *files])  # its status tells of the missing ones
    found = re.findall(rf"^{_CPU}/cpu(\d+)/cpufreq/{name}:(.+)$", ran.output, re.MULTILINE)
    return {int(core): value.strip() for core, value in found}
