"""results/<machine>-roofline.json: what this machine can do at the most, measured once and kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onefold.bench import Bound, Machine, Roofline, Work, measure_roofline
from onefold.storage import write_text

# Bytes of a parameter in the network that runs.
_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


def measured_limits(results: Path, threads: Sequence[int], *, again: bool = False) -> Roofline:
    """The machine's limits with these numbers of threads: from the file, or measured, two seconds each, and kept there.

    `again` measures in any case; of two rates for one thing the quicker stays, for others' work only slows.
    """
    machine = Machine.this(packages=())
    path = results / f"{machine.slug}-roofline.json"
    known = _read(path)
    if known is None or known.features != machine.features:
        known = Roofline(limits=(), features=machine.features)
    wanted = [number for number in threads if again or number not in known.threads]
    if wanted:
        known = known.with_limits(measure_roofline(wanted).limits)
        write_text(path, json.dumps(known.to_dict(), indent=1) + "\n")
    return known


def bound(roofline: Roofline, subject: Mapping[str, Any], threads: int) -> Bound | None:
    """The least time of one call of a subject; None where its multiply-adds or its precision are not known."""
    size = _BYTES.get(str(subject["precision"]).split("-")[0])
    if size is None or "macs" not in subject or "params" not in subject:
        return None
    batch, (channels, height, width) = subject.get("batch", 1), subject["input_shape"]
    num_bytes = size * subject["params"] + 4 * batch * channels * height * width
    work = Work(macs=batch * subject["macs"], num_bytes=num_bytes, precision=subject["precision"], threads=threads)
    return roofline.bound(work)


def _read(path: Path) -> Roofline | None:
    try:
        return Roofline.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
