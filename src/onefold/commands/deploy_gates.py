"""The gates of a deployment: whether an artifact keeps the network's accuracy, has lost it, or too few photos can tell.

What an artifact loses is measured on the photos that are held out, and is known as well as they are many: its 95 %
interval lies within what may be lost (passed), above it (failed), or holds the bound (undecided, and never called
passed). Undecided stops a deployment like a failure, with an exit status of its own, where more was lost on these
photos than may be; of 10 to 99 photos one may be lost all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onefold.accuracy_intervals import drop_interval, photos_to_decide
from onefold.bench import Measurement
from onefold.checksums import write_sealed_json
from onefold.errors import GateFailed, GateUndecided
from onefold.report import GATES_FILE
from onefold.report.format import format_count
from onefold.runtimes import Artifact
from onefold.runtimes.exporter import RANDOM_WEIGHTS_NOTE

Verdict = Literal["passed", "failed", "undecided"]

_ONE_MAY_BE_LOST = range(10, 100)  # photos: one of them is more than 1 point, and at most 10
_MOST_ADVISED = 10  # points: an artifact that loses more is of no use, so a larger bound is no remedy


@dataclass(frozen=True, kw_only=True)
class ArtifactResult:
    """What came of one artifact: `top1` in percent, None without labels; `changed` answers of `count`; its latency.

    `lost` photos were right in PyTorch and are wrong in it, `won` the other way round; without labels all that changed
    are lost. `drop` is in points of top-1, or in percent of the answers. `num_held_out` photos could have been scored.
    `same_logits` is whether its logits are the network's to the bit, as those of one trained for int8 may be in int8.
    """

    name: str
    artifact: Artifact
    top1: float | None
    changed: int
    count: int
    lost: int
    won: int
    measurement: Measurement | None = None
    num_held_out: int | None = None
    same_logits: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether its logits are known to be the network's: of 32 bits by its parity where no prediction changed."""
        return not self.changed and (self.same_logits or self.artifact.precision == "fp32")

    @property
    def drop(self) -> float:
        """What was lost, less what was won, in percent of the photos."""
        return 100 * (self.lost - self.won) / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the drop on all photos of the kind."""
        return drop_interval(self.lost, self.won, self.count)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A check that an artifact must pass before it is shipped, and in one sentence what was measured and is allowed.

    `verdict` is undecided where the photos are too few to tell what was lost from what may be, and then `within_bound`
    is whether no more was lost on these photos, one photo of 10 to 99 included; `remedy` is what would decide it.
    """

    name: str
    kind: Literal["fusing", "parity", "accuracy"]
    verdict: Verdict
    sentence: str
    within_bound: bool = True
    remedy: str = ""

    @property
    def passed(self) -> bool:
        """Whether it is shown that the artifact may be shipped."""
        return self.verdict == "passed"

    @property
    def holds(self) -> bool:
        """Whether it lets a deployment end with exit status 0."""
        return self.passed or (self.verdict == "undecided" and self.within_bound)


def accuracy_gate(result: ArtifactResult, max_drop: float, *, exact_fp32: bool = False) -> Gate:
    """Judge what an artifact lost against `max_drop` points; 0 is judged on these photos alone, without an interval.

    With `exact_fp32` no prediction may differ that a 32-bit artifact gives. One that gives all of the network's in 32
    bits passes, for its logits were compared when it was exported, and so does one in any precision whose logits are
    the network's to the bit. int8 of random weights is undecided.
    """
    name, precision, count = result.name, result.artifact.precision, result.count
    if exact_fp32 and precision == "fp32" and result.changed:
        sentence = f"{result.changed} of {count} predictions of {name} differ from the network's, and none may"
        return Gate(name=name, kind="parity", verdict="failed", sentence=sentence)
    if result.artifact.details.get("untrained") is True and precision != "fp32":
        differ = f"{result.changed} of {count} predictions of {name} differ from the fp32 network's"
        return Gate(name=name, kind="accuracy", verdict="undecided", sentence=f"{differ}. {RANDOM_WEIGHTS_NOTE}")
    lost = f"{result.drop:.2f} " + ("points of top-1" if result.top1 is not None else "% of the predictions")
    low, high = result.interval
    sentence = (
        f"{name} lost {lost} (95 % interval {low:.1f} to {high:.1f}, {count} photos), and {max_drop:g} may be lost"
    )
    is_within = result.drop <= max_drop or (one_may_be_lost(count, max_drop) and result.drop <= 100 / count)
    if max_drop > 0 and result.is_exact:
        return Gate(
            name=name, kind="accuracy", verdict="passed", sentence=f"{sentence}: {describe_same_logits(result)}"
        )
    if max_drop <= 0:
        verdict: Verdict = "passed" if is_within else "failed"
    elif high <= max_drop:
        verdict = "passed"
    elif low > max_drop:
        verdict = "failed"
    else:
        return Gate(
            name=name,
            kind="accuracy",
            verdict="undecided",
            sentence=f"{sentence}: {_undecided(result, max_drop)}",
            within_bound=is_within,
            remedy=_remedy(result, max_drop),
        )
    return Gate(name=name, kind="accuracy", verdict=verdict, sentence=sentence)


def describe_same_logits(result: ArtifactResult) -> str:
    """Say why an artifact passes on any number of photos: one that `is_exact`."""
    if result.artifact.precision != "fp32":
        return "its logits are the network's, to the bit, on all of these photos"
    parity = result.artifact.parity
    found = "" if parity is None else f", {parity.difference:.1e}"
    return f"its logits are PyTorch's{found}"


def _undecided(result: ArtifactResult, max_drop: float) -> str:
    """Say that it cannot be told, what became of the photos, and how many would tell if they went on so."""
    one = ""
    if one_may_be_lost(result.count, max_drop) and max_drop < result.drop <= 100 / result.count:
        one = f" (1 photo is {100 / result.count:.2f} points, and one may be lost)"
    if result.top1 is None:
        became = f"{result.lost or 'none'} changed"
    elif result.lost or result.won:
        became = f"{result.lost or 'none'} became wrong and {result.won or 'none'} right"
    else:
        became = "none became wrong or right"
    photos = format_count(result.count, "photo")
    return f"this cannot be told by {photos}{one}, of which {became}; {_remedy(result, max_drop)}"


def _remedy(result: ArtifactResult, max_drop: float) -> str:
    """Say what decides it: so many photos, if they go on as these did, or a bound that these are enough for."""
    needed = photos_to_decide(result.lost, result.won, result.count, max_drop)
    more_held_out = result.num_held_out is not None and result.num_held_out > result.count
    where = f"without --quick {result.num_held_out} are scored" if more_held_out else "--val FOLDER"
    more = "many more photos would tell" if needed is None else f"if it goes on so about {needed} photos tell"
    bound = math.ceil(result.interval[1])
    larger = f", or --max-drop {bound} if so much may be lost" if bound <= _MOST_ADVISED else ""
    return f"{more} ({where}{larger})"


def one_may_be_lost(count: int, max_drop: float) -> bool:
    """Whether one photo of `count` may be lost though it is more than `max_drop` points.

    An int8 network changes the answer to a photo here and there that the float network hardly knew: on so few photos a
    gate that one of them fails would judge by chance. From 100 photos on the bound is what it says, and with fewer than
    10 one photo is so large a share that nothing would be left of the gate.
    """
    return 0 < max_drop < 100 / count and count in _ONE_MAY_BE_LOST


def describe_held_out(count: int, num_held_out: int, *, labelled: bool = True) -> str:
    """Say before the work how many photos are scored, and what one of them is worth."""
    unit = "points of top-1" if labelled else "% of the predictions"
    if count < num_held_out:
        scored = f"{count} of {num_held_out} photos are scored, evenly"
    else:
        scored = f"{format_count(count, 'photo')} {'is' if count == 1 else 'are'} scored"
    return f"{scored}; one of them is {100 / count:.2f} {unit}"


def too_few_photos_note(count: int, max_drop: float, num_held_out: int | None = None) -> str:
    """Say before the work that `count` photos cannot show a loss below `max_drop` points, and what to type.

    Empty where they can, if no prediction changes, and where none may be lost.
    """
    needed = photos_to_decide(0, 0, count, max_drop) if max_drop > 0 else 0
    if needed is not None and count >= needed:
        return ""
    points = f"{max_drop:g} point{'' if max_drop == 1 else 's'}"
    bound = math.ceil(drop_interval(0, 0, count)[1])
    is_enough = needed is not None and num_held_out is not None and num_held_out >= needed
    more = f"without --quick {num_held_out} are scored" if is_enough else "give more held-out photos with --val FOLDER"
    takes = "more than a million" if needed is None else f"at least {needed}"
    larger = f", or a larger --max-drop: at least {bound}, by the same rule" if bound <= _MOST_ADVISED else ""
    return (
        f"{format_count(count, 'photo')} cannot tell a loss of {points} from none: that takes {takes}, if no "
        f"prediction changes, and several times as many if some do; {more}{larger}"
    )


def gates_error(gates: Sequence[Gate], folder: Path) -> GateFailed | None:
    """Give the error of those gates that do not hold, None where all do: GateUndecided where none has failed."""
    stopping = [gate for gate in gates if not gate.holds]
    failed = [gate for gate in stopping if gate.verdict == "failed"]
    if not stopping:
        return None
    parts = [gate.sentence.partition(": ") for gate in stopping]
    said = ", ".join(gate.sentence for gate in stopping)
    if len({tail for _, _, tail in parts}) == 1:  # what is the same of all, too few photos, is said once
        said = ", ".join(head for head, _, _ in parts) + "".join(parts[0][1:])
    table, keep = f"{folder / 'README.md'} has the table", "keep their" if len(stopping) > 1 else "keeps its"
    if not failed:
        return GateUndecided(
            f"whether {len(stopping)} of {len(gates)} artifacts {keep} accuracy cannot be told: {said}; {table}. "
            "More held-out photos tell, and --max-drop sets the largest loss that is accepted"
        )
    undecided = f", of {len(stopping) - len(failed)} it cannot be told" if len(stopping) > len(failed) else ""
    advice = ". More photos to calibrate with, or training for 8 bits (onefold train --int8), win accuracy back"
    return GateFailed(
        f"{len(failed)} of {len(gates)} artifacts failed their gate{undecided}: {said}; {table}"
        + (advice if any(gate.kind == "accuracy" for gate in failed) else "")
    )


def write_gates(gates: Sequence[Gate], results: Path, notes: Sequence[str] = ()) -> None:
    """Keep what each gate found, and how a deployment was cut short, in `results`/gates.json for the report."""
    values = [{**vars(gate), "passed": gate.passed} for gate in gates]
    found: dict[str, object] = {"gates": values, **({"notes": list(notes)} if notes else {})}
    write_sealed_json(results / GATES_FILE, found)
