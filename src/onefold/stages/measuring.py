"""artifact -> results/<machine>.jsonl: how fast things answer, measured side by side in one run."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onefold.bench import Comparison, Machine, Measurement, Procedure, append, compare, measure
from onefold.errors import BadArgument
from onefold.files import write_text
from onefold.stages.network import Floats, Predictor, open_predictor

DISTINCT = 64
"""Different inputs that a measurement cycles through, so that nothing can be remembered from call to call."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What to measure: artifacts or weights, and how. `batch` images a call.

    A network that is not fused is refused unless `allow_unfused`, and then labelled in every row.
    """

    sources: Sequence[str]
    procedure: Procedure
    batch: int = 1
    allow_unfused: bool = False
    name: str | None = None


def bench(order: Bench, results: Path) -> tuple[Measurement | Comparison, Path]:
    """Measure one source, or several interleaved against the first; appends to `results`/<machine>.jsonl."""
    if order.batch < 1:
        raise BadArgument(f"batch must be 1 or more, not {order.batch}")
    if not order.sources:
        raise BadArgument("there is nothing to measure: give artifacts, runs or files of weights")
    with ExitStack() as opened:
        calls: dict[str, Callable[[], object]] = {}
        subjects: dict[str, dict[str, object]] = {}
        for source in order.sources:
            predictor = opened.enter_context(
                open_predictor(source, name=order.name, threads=order.procedure.threads, fused=False)
            )
            must_be_fused(bool(predictor.facts["fused"]), source, order.allow_unfused)
            title = free_title(predictor.title, calls)
            calls[title] = _call(predictor, order.batch)
            subjects[title] = {**predictor.facts, "batch": order.batch, **known_accuracy(predictor.facts, results)}
        if len(calls) == 1:
            title = next(iter(calls))
            outcome: Measurement | Comparison = measure(
                calls[title], order.procedure, {**subjects[title], "name": title}
            )
        else:
            outcome = compare(calls, order.procedure, subjects)
    path = results / f"{Machine.this().slug}.jsonl"
    append(path, [outcome])
    return outcome, path


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


def _call(predictor: Predictor, batch: int) -> Callable[[], object]:
    """A call without arguments that answers the next of some made-up inputs."""
    channels, height, width = predictor.facts["input_shape"]
    drawn = np.random.default_rng(0).standard_normal((DISTINCT, batch, channels, height, width), dtype=np.float32)
    inputs: list[Floats] = list(drawn)
    turn = 0

    def call() -> object:
        nonlocal turn
        turn = (turn + 1) % len(inputs)
        return predictor.answer(inputs[turn])

    return call
