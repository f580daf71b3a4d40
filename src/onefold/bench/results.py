"""Results on disk: one JSON object a line, only ever appended.

`{"kind": "measurement", ...}` is a Measurement, `{"kind": "comparison", ...}` a Comparison with all its measurements.
The raw samples are the truth; `summary` repeats what they give, for people and other programs, and is not read back.
Each line has its own checksum: one that is damaged is left out, and said.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onefold.bench.cold_start import ColdStart
from onefold.bench.compare import Comparison
from onefold.bench.machine import Machine
from onefold.bench.measurement import Measurement, Procedure
from onefold.bench.roofline import LatencyBound
from onefold.bench.timing_noise import TimingNoise
from onefold.checksums import NO_CHECKSUM_NOTE, has_checksum, with_checksum
from onefold.errors import BadData, NotWritable
from onefold.file_io import parse_json


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a results file holds; `notes` are sentences about lines that were left out."""

    measurements: tuple[Measurement, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    notes: tuple[str, ...] = ()


def append_results(path: Path, results: Iterable[Measurement | Comparison]) -> None:
    """Add the results to the file and have them on the disk before returning; what is there is not touched.

    A line that a crash left half-written is closed first. NotWritable where there is no space or no permission.
    """
    lines = "".join(json.dumps(with_checksum(_plain(each)), allow_nan=False) + "\n" for each in results)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+", buffering=0) as file:
            rest = (("" if _ends_whole(file) else "\n") + lines).encode("ascii")  # json.dumps escapes all else
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
    except OSError as error:
        raise NotWritable(f"cannot add to {path}: {error.strerror or error}; choose a file you can write to") from error


def read_measurements(path: Path) -> list[Measurement]:
    """All measurements of a file, those inside comparisons too; a half-written line is left out with a warning."""
    results = read_results(path)
    for note in results.notes:
        warnings.warn(note, UserWarning, stacklevel=2)
    within = [each for comparison in results.comparisons for each in comparison.measurements.values()]
    return [*results.measurements, *within]


def read_results(path: Path) -> Results:
    """All measurements and comparisons of a file, in its order. BadData where it is no file of results."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise BadData(f"cannot read results from {path}: {error.strerror or error}") from error
    measurements, comparisons, notes, unchecked = [], [], list[str](), 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            plain = parse_json(line, parse_constant=_not_a_number)
        except ValueError:
            notes.append(f"{path.name}, line {number}: left out, it was cut off while being written, or is damaged.")
            continue
        try:
            unchecked += isinstance(plain, dict) and not has_checksum(plain)
        except ValueError as error:
            notes.append(f"{path.name}, line {number}: left out, it is damaged: {error}.")
            continue
        try:
            match _kind(plain):
                case "measurement":
                    measurements.append(_measurement(plain))
                case "comparison":
                    comparisons.append(_comparison(plain))
                case kind:
                    notes.append(f"{path.name}, line {number}: left out, {kind!r} is no kind of result known here.")
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise BadData(f"{path}, line {number}: this result is damaged ({error!r}); remove the line") from error
    if notes and not measurements and not comparisons:
        raise BadData(f"{path} holds no results: expected lines as `onefold bench` writes them. {notes[0]}")
    if unchecked:
        found = len(measurements) + len(comparisons)
        notes.append(f"{path.name}: of {found} results {unchecked} have {NO_CHECKSUM_NOTE}.")
    return Results(measurements=tuple(measurements), comparisons=tuple(comparisons), notes=tuple(notes))


def _plain(result: Measurement | Comparison) -> dict[str, Any]:
    if isinstance(result, Measurement):
        return {"kind": "measurement", **_plain_measurement(result)}
    ratios = {name: result.ratio(name) for name in list(result.measurements)[1:]}
    return {
        "kind": "comparison",
        "summary": {name: {**asdict(each), "verdict": each.verdict} for name, each in ratios.items()},
        "floor": asdict(result.floor),
        "measurements": {name: _plain_measurement(each) for name, each in result.measurements.items()},
        "twin": _plain_measurement(result.twin),
    }


def _plain_measurement(measurement: Measurement) -> dict[str, Any]:
    return {
        "subject": measurement.subject,
        "summary": {
            "median_ns": measurement.median_ns,
            "p90_ns": measurement.p90_ns,
            "p99_ns": measurement.p99_ns,
            "spread": measurement.spread,
            "roofline": measurement.roofline_share,
            "verdict": measurement.verdict,
            "reasons": measurement.reasons,
        },
        "machine": measurement.machine.to_dict(),
        "procedure": measurement.procedure.to_dict(),
        "noise": measurement.noise.to_dict(),
        "bound": None if measurement.bound is None else measurement.bound.to_dict(),
        "cold": None if measurement.cold is None else measurement.cold.to_dict(),
        "resolution_ns": measurement.resolution_ns,
        "overhead_ns": measurement.overhead_ns,
        "calls_per_sample": measurement.calls_per_sample,
        "warmup_ns": measurement.warmup_ns,
        "samples_ns": measurement.samples_ns,
    }


def _measurement(plain: Mapping[str, Any]) -> Measurement:
    subject = plain["subject"]
    if isinstance(subject, dict) and subject.get("runtime") == "eager":  # version 0.1.0's word
        subject = {**subject, "runtime": "PyTorch"}
    return Measurement(
        subject=subject,
        machine=Machine.from_dict(plain["machine"]),
        procedure=Procedure.from_dict(plain["procedure"]),
        noise=TimingNoise.from_dict(plain.get("noise", {})),
        bound=None if plain.get("bound") is None else LatencyBound.from_dict(plain["bound"]),
        cold=None if plain.get("cold") is None else ColdStart.from_dict(plain["cold"]),
        samples_ns=tuple(plain["samples_ns"]),
        warmup_ns=tuple(plain.get("warmup_ns", ())),
        calls_per_sample=plain.get("calls_per_sample", 1),
        resolution_ns=plain.get("resolution_ns", 1),
        overhead_ns=plain.get("overhead_ns", 0),
    )


def _comparison(plain: Mapping[str, Any]) -> Comparison:
    measured = {name: _measurement(each) for name, each in plain["measurements"].items()}
    return Comparison(measurements=measured, twin=_measurement(plain["twin"]))


def _kind(plain: Any) -> object:
    return plain.get("kind") if isinstance(plain, Mapping) else type(plain).__name__


def _ends_whole(file: io.FileIO) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _not_a_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
