"""artifact -> results/<machine>.jsonl: how fast things answer, measured side by side in one run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from onefold.bench import (
    Cold,
    Comparison,
    Energy,
    Machine,
    Measurement,
    Procedure,
    Roofline,
    append,
    compare,
    measure,
    measure_cold,
    measure_energy,
    pinned,
    planted,
    self_test,
)
from onefold.commands.limits import bound, measured_limits
from onefold.commands.open import Floats, Predictor, is_artifact, open_predictor
from onefold.errors import BadArgument
from onefold.storage import write_text

_MORE_ATTEMPTS = 3

DISTINCT = 64
"""Different inputs that a measurement cycles through, so that nothing can be remembered from call to call."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What to measure: artifacts or weights, and how. `batch` images a call.

    A network that is not fused is refused unless `allow_unfused`, and then labelled in every row. `cold` has every
    artifact started in a fresh process too. `pin` names the processors to use. Two controls, each of one source: `aa`
    measures it against itself, `plant` against itself made slower by a share (0.02: 2 %).
    """

    sources: Sequence[str]
    procedure: Procedure
    batch: int = 1
    allow_unfused: bool = False
    name: str | None = None
    cold: bool = True
    pin: tuple[int, ...] | None = None
    aa: bool = False
    plant: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """One thing to measure: `cold` and `energy` are filled in once it was."""

    source: str
    call: Callable[[], object]
    subject: dict[str, object]
    cold: Cold | None = None
    energy: Energy | None = None


def bench(order: Bench, results: Path) -> tuple[Measurement | Comparison, Path]:
    """Measure one source, or several interleaved against the first; appends to `results`/<machine>.jsonl."""
    _must_be_sound(order)
    with pinned(order.pin), ExitStack() as opened:
        candidates = _opened(order, results, opened)
        outcome = _timed(order, candidates)
        completed = {title: _completed(each, order) for title, each in candidates.items()}
    outcome = _held_against_limits(_told(outcome, completed), order, results)
    path = results / f"{Machine.this().slug}.jsonl"
    append(path, [outcome])
    return outcome, path


def _must_be_sound(order: Bench) -> None:
    if order.batch < 1:
        raise BadArgument(f"batch must be 1 or more, not {order.batch}")
    if not order.sources:
        raise BadArgument("there is nothing to measure: give artifacts, runs or files of weights")
    if (order.aa or order.plant is not None) and len(order.sources) > 1:
        raise BadArgument("a self-test is of one source: give --aa or --plant one artifact, run or file of weights")
    if order.aa and order.plant is not None:
        raise BadArgument("--aa and --plant are two tests: give one of them; the second holds the first in it")
    if order.plant is not None and not 0 < order.plant <= 10:
        raise BadArgument(f"the slowdown to plant must lie above 0 and be at most 1000 %, not {100 * order.plant:g} %")


def _opened(order: Bench, results: Path, opened: ExitStack) -> dict[str, _Candidate]:
    """What is to be measured, under its title; closed with `opened`."""
    candidates: dict[str, _Candidate] = {}
    for source in order.sources:
        predictor = opened.enter_context(
            open_predictor(source, name=order.name, threads=order.procedure.threads, fused=False)
        )
        must_be_fused(bool(predictor.facts["fused"]), source, order.allow_unfused)
        subject = {**predictor.facts, "batch": order.batch, **known_accuracy(predictor.facts, results)}
        call = call_of(predictor, order.batch)
        candidates[free_title(predictor.title, candidates)] = _Candidate(source=source, call=call, subject=subject)
    return candidates


def _timed(order: Bench, candidates: dict[str, _Candidate]) -> Measurement | Comparison:
    calls = {title: each.call for title, each in candidates.items()}
    subjects = {title: each.subject for title, each in candidates.items()}
    title = next(iter(calls))
    if order.aa:
        return self_test(calls[title], order.procedure, {**subjects[title], "name": title})
    if order.plant is not None:
        slower = f"{title} made {100 * order.plant:g} % slower"
        calls[slower] = planted(calls[title], order.plant, time.perf_counter_ns)
        subjects[slower] = {**subjects[title], "planted": order.plant}
    if len(calls) == 1:
        return measure(calls[title], order.procedure, {**subjects[title], "name": title})
    return compare(calls, order.procedure, subjects)


def _completed(candidate: _Candidate, order: Bench) -> _Candidate:
    """Its energy, and where it is an artifact its start in a fresh process."""
    seen = None
    if order.aa or order.plant is not None:  # a control says something of the machine, not of its subject
        return candidate
    if order.cold and is_artifact(Path(candidate.source)):
        arguments = [candidate.source, str(order.procedure.threads), str(order.batch)]
        seen = measure_cold("onefold.runtimes.alone:first_call", arguments)
    return replace(candidate, cold=seen, energy=measure_energy(candidate.call))


def _told(outcome: Measurement | Comparison, completed: dict[str, _Candidate]) -> Measurement | Comparison:
    """The outcome with what was found beside the times."""

    def told(measurement: Measurement) -> Measurement:
        candidate = completed.get(str(measurement.subject["name"]))
        return measurement if candidate is None else replace(measurement, cold=candidate.cold, energy=candidate.energy)

    return _each(outcome, told)


def _held_against_limits(outcome: Measurement | Comparison, order: Bench, results: Path) -> Measurement | Comparison:
    """The outcome with the least times that this machine could take.

    Whoever is quicker than a limit proves that it was measured on a busy machine: then it is measured anew, some times.
    """
    threads = order.procedure.threads
    for attempt in range(1 + _MORE_ATTEMPTS):
        held_against = partial(_bounded, roofline=measured_limits(results, [threads], again=attempt > 0))
        outcome = _each(outcome, held_against)
        measured = outcome.measurements.values() if isinstance(outcome, Comparison) else [outcome]
        if not any(each.beats_limit for each in measured):
            break
    return outcome


def _bounded(measurement: Measurement, roofline: Roofline) -> Measurement:
    return replace(measurement, bound=bound(roofline, measurement.subject, measurement.procedure.threads))


def _each(outcome: Measurement | Comparison, change: Callable[[Measurement], Measurement]) -> Measurement | Comparison:
    if isinstance(outcome, Measurement):
        return change(outcome)
    return replace(outcome, measurements={name: change(each) for name, each in outcome.measurements.items()})


def note_accuracy(predictor: Predictor, data: str, top1: float, results: Path) -> None:
    """Keep the accuracy of what answered, so that measurements of the same bytes can be shown with it."""
    path = results / "accuracy.json"
    known = _accuracies(results)
    known[_identity(predictor.facts)] = {"top1": top1, "top1_on": data}
    write_text(path, json.dumps(known, indent=1, sort_keys=True) + "\n")


def known_accuracy(facts: Mapping[str, Any], results: Path) -> dict[str, object]:
    """What `note_accuracy` kept of the same bytes; empty where nothing."""
    return _accuracies(results).get(_identity(facts), {})


def _accuracies(results: Path) -> dict[str, dict[str, object]]:
    try:
        known = json.loads((results / "accuracy.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _identity(facts: Mapping[str, Any]) -> str:
    return str(facts.get("sha256") or f"{facts['model']}:{facts['runtime']}:{facts['fused']}:{facts['source']}")


def must_be_fused(fused: bool, source: str, allowed: bool) -> None:
    """Raises BadArgument for a network that is not, unless that is allowed."""
    if not fused and not allowed:
        raise BadArgument(
            f"{source} is not fused, and its time says nothing of the deployed network: `onefold fuse` it first, "
            "or pass --allow-unfused to measure it and have every row say so"
        )


def free_title(title: str, taken: Collection[str]) -> str:
    """The title, numbered where it is taken: two sources may be of one kind."""
    if title not in taken:
        return title
    number = 2
    while f"{title} #{number}" in taken:
        number += 1
    return f"{title} #{number}"


def call_of(predictor: Predictor, batch: int = 1) -> Callable[[], object]:
    """A call without arguments that answers the next of some made-up inputs, the same for all who take their shape."""
    inputs = list(_drawn((batch, *predictor.facts["input_shape"])))
    turn = 0

    def call() -> object:
        nonlocal turn
        turn = (turn + 1) % len(inputs)
        return predictor.answer(inputs[turn])

    return call


_known: WeakValueDictionary[tuple[int, ...], Floats] = WeakValueDictionary()
"""Inputs by their shape, as long as a call holds them."""


def _drawn(shape: tuple[int, ...]) -> Floats:
    found = _known.get(shape)
    if found is None:
        found = _known[shape] = np.random.default_rng(0).standard_normal((DISTINCT, *shape), dtype=np.float32)
    return found
