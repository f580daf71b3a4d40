"""Trials: each remedy against the network as it is, interleaved; only what that confirms becomes a finding."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from onefold.accuracy_intervals import drop_interval
from onefold.advisor.layout_rules import layout_remarks
from onefold.advisor.rule import Case, Remedy, Rule
from onefold.advisor.variant import Variant, open_engine, profile_layers
from onefold.bench import Instruments, Procedure, Ratio, compare
from onefold.errors import OnefoldError
from onefold.runtimes.base import RuntimeEngine, first_error_line
from onefold.runtimes.exporter import TOLERANCES
from onefold.runtimes.layer_times import LayerTime
from onefold.runtimes.reference_logits import Floats, relative_difference, top1_agreement

_log = logging.getLogger("onefold")
_progress = logging.getLogger("onefold.progress")

LEAST_GAIN = 0.02
"""A change that gains less than this share of the time is not worth a command, however sure it is."""

_FP32_TOLERANCE = 1e-3  # of answers that should be the same: graphs are rewritten, and rounding moves
_NOW, _THEN = "now", "changed"

Scorer = Callable[[Variant], npt.NDArray[np.bool_]]
"""Which photos a variant is right on, in the same order for each."""


@dataclass(frozen=True, kw_only=True)
class AnswerChange:
    """How the answers changed: the largest difference relative to the largest logit, and the share of equal top-1.

    Both are of drawn images, None where the two do not take the same ones. `drop` is the loss of top-1 in points with
    its 95 % interval, on `photos` labelled photos; None where none were given.
    """

    difference: float | None = None
    agreement: float | None = None
    drop: tuple[float, float, float] | None = None
    photos: int = 0

    def describe(self) -> str:
        """The cost in accuracy as a text."""
        if self.drop is None:
            return "accuracy: not known (give --data)"
        value, low, high = self.drop
        return f"top-1 {-value:+.1f} points (95 % CI {-high:+.1f} to {-low:+.1f}) on {self.photos} photos"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What an interleaved comparison measured, for one image: the times in nanoseconds, their ratio, the answers."""

    before_ns: float
    after_ns: float
    ratio: Ratio
    answers: AnswerChange

    @property
    def is_faster(self) -> bool:
        """Whether the change is faster beyond all doubt, and by enough to be worth it."""
        certain = self.ratio.verdict == "faster" and self.ratio.is_robust_to_noise
        return certain and self.ratio.value <= 1 - LEAST_GAIN


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A remedy that was tried: what was measured, or the `problem` that kept it from being tried or from counting."""

    remedy: Remedy
    timing: Timing | None = None
    problem: str | None = None

    @property
    def is_confirmed(self) -> bool:
        """Whether it is a finding."""
        return self.problem is None and self.timing is not None and self.timing.is_faster

    def why_not(self) -> str:
        """Why it is none, in few words."""
        if self.problem is not None or self.timing is None:
            return self.problem or "not tried"
        ratio = self.timing.ratio
        seen = f"{1 / ratio.value:.2f}x, {1 / ratio.high:.2f}-{1 / ratio.low:.2f}"
        return f"{seen}, too noisy to tell" if not ratio.is_robust_to_noise else seen


@dataclass(frozen=True, kw_only=True)
class Combination:
    """Several confirmed remedies at once, measured together against the network as it was."""

    rules: tuple[str, ...]
    changes_answers: bool
    variant: Variant
    timing: Timing


@dataclass(frozen=True, kw_only=True)
class Advice:
    """All that was tried on one network in one runtime, and what of it helped."""

    case: Case
    trials: tuple[Trial, ...]
    combinations: tuple[Combination, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def findings(self) -> list[Trial]:
        """What the comparisons confirmed, the largest gain first."""
        confirmed = [
            (each.timing.ratio.value, i) for i, each in enumerate(self.trials) if each.is_confirmed and each.timing
        ]
        return [self.trials[i] for _, i in sorted(confirmed)]

    @property
    def unconfirmed(self) -> list[Trial]:
        """What they did not confirm."""
        return [each for each in self.trials if not each.is_confirmed]


@dataclass(frozen=True, kw_only=True)
class TrialBench:
    """How variants are opened, profiled, timed and scored; tests give their own."""

    procedure: Procedure = field(default_factory=lambda: Procedure(warmup_calls=5, warmup_seconds=0.3, samples=60))
    instruments: Instruments = field(default_factory=Instruments)
    open: Callable[[Variant], RuntimeEngine] = open_engine
    profile: Callable[[Variant], Sequence[LayerTime]] = profile_layers
    score: Scorer | None = None

    def measure(self, before: Variant, after: Variant, *, asks_accuracy: bool = False) -> Timing:
        """Time two variants interleaved, and compare their answers; whatever a runtime raises passes through."""
        engines = [self.open(before)]
        try:
            engines.append(self.open(after))
            answers = self._answers(before, after, engines, asks_accuracy=asks_accuracy)
            calls = {
                _NOW: _call(engines[0], before.images()),
                _THEN: _call(engines[1], after.images()),
            }
            procedure = replace(self.procedure, threads=max(before.threads, after.threads))
            measured = compare(calls, procedure, instruments=self.instruments)
        finally:
            for engine in engines:
                engine.close()
        ratio, scale = measured.ratio(_THEN), before.batch / after.batch
        per_image = replace(ratio, value=ratio.value * scale, low=ratio.low * scale, high=ratio.high * scale)
        return Timing(
            before_ns=measured.measurements[_NOW].median_ns / before.batch,
            after_ns=measured.measurements[_THEN].median_ns / after.batch,
            ratio=per_image,
            answers=answers,
        )

    def _answers(
        self, before: Variant, after: Variant, engines: Sequence[RuntimeEngine], *, asks_accuracy: bool
    ) -> AnswerChange:
        found = AnswerChange()
        if before.input_shape == after.input_shape:
            count = math.lcm(before.batch, after.batch)
            images = before.images(count * -(-4 // count))
            ours, theirs = (answer_in_batches(e, v, images) for e, v in zip(engines, (before, after), strict=True))
            agreement = top1_agreement(theirs, ours) if ours.ndim == theirs.ndim == 2 else None
            found = replace(found, difference=relative_difference(theirs, ours), agreement=agreement)
        if not asks_accuracy or self.score is None:
            return found
        right, still = self.score(before), self.score(after)
        lost, won, count = int((right & ~still).sum()), int((~right & still).sum()), len(right)
        return replace(found, drop=(100 * (lost - won) / count, *drop_interval(lost, won, count)), photos=count)

    def try_remedy(self, before: Variant, remedy: Remedy) -> Trial:
        """Apply a remedy to a variant and measure what it gains; what fails is a problem of the trial, not an error."""
        rule, before = remedy.rule, remedy.against or before
        try:
            after = remedy.apply(before)
            if after is None:
                return Trial(remedy=remedy, problem="nothing to change")
            timing = self.measure(before, after, asks_accuracy=rule.changes_answers)
        except Exception as error:  # a runtime may raise anything for a graph that it does not take
            return Trial(remedy=remedy, problem=f"cannot be tried: {first_error_line(error)[:160]}")
        return Trial(remedy=remedy, timing=timing, problem=answers_problem(before, after, timing, rule.changes_answers))


def answers_problem(before: Variant, after: Variant, timing: Timing, changes_answers: bool) -> str | None:
    """Why a change does not count, by its answers: those that should be the same are not, or are not numbers."""
    difference = timing.answers.difference
    if difference is None:
        return None
    precisions = {before.precision, after.precision} - {"fp32"}
    allowed = max((TOLERANCES[each] for each in precisions), default=_FP32_TOLERANCE)
    if changes_answers:
        return None if math.isfinite(difference) else "its answers are not finite"
    return None if difference <= allowed else f"its answers differ by {difference:.2g} of the largest"


def advise_on(case: Case, rules: Iterable[Rule], trial_bench: TrialBench) -> Advice:
    """Try what the rules find in a network; put together what helped, and measure that too.

    Rules whose confirmed remedies are `adopted`, as fusing is, come first and change what the others start from.
    """
    start, trials = case.variant, list[Trial]()
    rules = sorted(rules, key=lambda rule: not rule.adopted)
    remarks: list[str] = []
    for number, rule in enumerate(rules):
        _progress.debug("trying %s", rule.name, extra={"done": number, "total": len(rules)})
        best: Trial | None = None
        for remedy in _detected(rule, case):
            trial = trial_bench.try_remedy(case.variant, remedy)
            trials.append(trial)
            if trial.is_confirmed and (best is None or _ratio(trial) < _ratio(best)):
                best = trial
        if best is not None and rule.adopted:
            changed = best.remedy.apply(case.variant)
            assert changed is not None
            case = replace(case, variant=changed, layers=tuple(trial_bench.profile(changed)))
            remarks.append(f"the rules after `{rule.name}` were tried on the network that it gave")
    _progress.debug("tried", extra={"done": len(rules), "total": len(rules)})
    if any(trial.remedy.against not in (None, case.variant) for trial in trials):
        remarks.append("int8 and other resolutions are made of the fused network, and were compared with it")
    found = Advice(case=case, trials=tuple(trials), remarks=(*remarks, *layout_remarks(case), *_memory_remarks(case)))
    return replace(found, combinations=tuple(_combinations(found, start, trial_bench)))


def _detected(rule: Rule, case: Case) -> Iterable[Remedy]:
    """The remedies of a rule; none, and a note, where what it asks for cannot be made."""
    try:
        yield from rule.detect(case)
    except OnefoldError as error:
        _log.info("%s: rule %s cannot be tried: %s", case.source, rule.name, error)


def apply_all(variant: Variant, remedies: Iterable[Remedy]) -> tuple[Variant, list[str]]:
    """Apply remedies one after the other, those that remake the graph first; with the names of those that applied."""
    names: list[str] = []
    for remedy in sorted(remedies, key=lambda each: each.rule.order):
        with suppress(Exception):  # what another one has changed may leave nothing to change, or nothing that is valid
            changed = remedy.apply(variant)
            if changed is not None:
                variant = changed
                names.append(remedy.rule.name)
    return variant, names


def _combinations(advice: Advice, start: Variant, trial_bench: TrialBench) -> Iterable[Combination]:
    """What helped, all at once: that which leaves the answers, and with what changes them."""
    best_of_rule: dict[str, Trial] = {}
    for trial in advice.findings:  # the best first
        best_of_rule.setdefault(trial.remedy.rule.name, trial)
    seen: set[tuple[str, ...]] = set()
    for with_changes in (False, True):
        chosen = [t.remedy for t in best_of_rule.values() if with_changes or not t.remedy.rule.changes_answers]
        if len(chosen) < 2:
            continue
        remade = next((each.against for each in chosen if each.against is not None), None)
        was_fused = any(each.rule.adopted for each in chosen)
        # int8 is made of the fused network: where fusing was not confirmed, that is what it is compared with.
        begin = start if remade is None or was_fused else remade
        variant, names = apply_all(begin, chosen)
        if len(names) < 2 or tuple(names) in seen:
            continue
        seen.add(tuple(names))
        changes = any(r.rule.changes_answers for r in chosen if r.rule.name in names)
        try:
            timing = trial_bench.measure(begin, variant, asks_accuracy=changes)
        except Exception:  # parts that work alone need not work together
            continue
        if answers_problem(begin, variant, timing, changes) is None:
            yield Combination(rules=tuple(names), changes_answers=changes, variant=variant, timing=timing)


def _memory_remarks(case: Case) -> Iterable[str]:
    """Layers that memory binds: no rewriting of them helps, and it is said only where they matter."""
    bound = [node for node in case.graph.nodes if (limits := case.bounds(node)) is not None and limits[1] > limits[0]]
    least = sum(case.least_ns(node) or 0.0 for node in bound)
    if bound and case.share_of(bound) >= 0.1 and least <= case.time_of(bound):
        yield (
            f"{len(bound)} layers are bound by memory: {case.evidence(bound)}; no rewriting of them helps, only fewer "
            "bytes do (lower resolution, narrower layers, int8)"
        )


def _ratio(trial: Trial) -> float:
    return math.inf if trial.timing is None else trial.timing.ratio.value


def _call(engine: RuntimeEngine, images: Floats) -> Callable[[], object]:
    return lambda: engine(images)


def answer_in_batches(engine: RuntimeEngine, variant: Variant, images: Floats) -> Floats:
    """The answers to images (N, C, H, W), N a multiple of the variant's batch, in calls of that batch."""
    parts = [engine(np.ascontiguousarray(part)) for part in np.split(images, len(images) // variant.batch)]
    return np.concatenate(parts)
