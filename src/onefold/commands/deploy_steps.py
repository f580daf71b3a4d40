"""The steps of an export and of a deployment with the seconds that each takes about, to tell what is left.

The seconds were read off on two cores of a server's processor for networks of 10 to 1000 million multiply-adds. What is
shown depends on their proportions alone: the time that was spent says how fast this machine is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from onefold.commands.bench import COLD_S, LIMITS_S, RUNTIME_MACS_PER_S, timing_seconds
from onefold.commands.calibration_cache import PHOTO_S, CalibrationOptions, calibration_seconds
from onefold.commands.deploy_results import QUICK_MAX_SCORED, DeployOptions
from onefold.commands.open_network import Network
from onefold.models.flops import count_flops
from onefold.progress_steps import Steps
from onefold.runtimes import import_runtime

_EXPORT_S, _OPEN_S, _EXPLAIN_S = 4.0, 0.7, 2.5
_TORCH_MACS_PER_S = 8e9


def export_steps(runtimes: Sequence[str], order: CalibrationOptions | None, macs: int) -> Steps:
    """The steps of an export: calibration and its check, where there is an order for it, and one for each runtime."""
    calibrate = (
        [] if order is None else [("calibrating int8", calibration_seconds(order, macs)), ("checking int8", 1.0)]
    )
    return Steps([*calibrate, *((f"exporting to {runtime}", _EXPORT_S) for runtime in runtimes)])


class DeploySteps:
    """The steps of a deployment, each by a key, with what is done and the seconds that it takes about."""

    def __init__(self, steps: Mapping[str, tuple[str, float]]) -> None:
        self.timing_seconds = steps["time"][1]
        self._numbers = {key: number for number, key in enumerate(steps)}
        self._steps = Steps([*steps.values()])

    def begin(self, key: str) -> None:
        """Tell that a step begins: "calibrate", "export NAME", "score torch" or NAME, "time" or "explain"."""
        self._steps.begin(self._numbers[key])


def plan_deployment(
    network: Network,
    order: DeployOptions,
    wanted: Sequence[tuple[str, str]],
    kept: Collection[str],
    num_scored: int,
    *,
    calibrates: bool,
) -> DeploySteps:
    """The steps of a deployment to these runtimes and precisions, but for the artifacts that were kept."""
    macs, procedure = count_flops(network.model, network.preprocessing.size).macs, order.procedure
    why = {runtime: import_runtime(runtime).unavailable_reason for runtime, _ in wanted}
    runs = [f"{runtime}-{precision}" for runtime, precision in wanted if (w := why[runtime]) is None or w() is None]
    left = [f"{runtime}-{precision}" for runtime, precision in sorted(wanted, key=lambda each: each[1] == "int8")]
    left = [name for name in left if name not in kept]
    steps = {f"export {name}": (f"exporting {name}", _EXPORT_S) for name in left if not name.endswith("-int8")}
    if any(name.endswith("-int8") for name in left):
        seconds = calibration_seconds(order.calibration, macs) if calibrates else 0.5
        steps["calibrate"] = ("calibrating int8" if calibrates else "making int8", seconds)
    steps |= {f"export {name}": (f"exporting {name}", _EXPORT_S) for name in left if name.endswith("-int8")}
    scored = min(num_scored, QUICK_MAX_SCORED) if order.quick else num_scored
    steps["score torch"] = ("scoring the network", scored * (PHOTO_S + macs / _TORCH_MACS_PER_S))
    one = _OPEN_S + scored * (PHOTO_S + macs / RUNTIME_MACS_PER_S)
    steps |= {f"score {name}": (f"scoring {name}", one) for name in runs}
    timing = timing_seconds(1 + len(runs), macs, warmup=procedure.warmup_seconds, samples=procedure.samples)
    timing += 0.0 if order.quick else COLD_S * len(runs) + LIMITS_S
    steps["time"] = (f"timing {len(runs)} artifact{'s, interleaved' if len(runs) > 1 else ''}", timing * order.timed)
    steps["explain"] = ("writing README.md and report.html", _EXPLAIN_S)
    return DeploySteps(steps)
