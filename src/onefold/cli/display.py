"""How results look in a terminal: tables and answers on stdout, remarks on stderr."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from onefold.commands.fuse import FusedWeights
    from onefold.commands.models import ModelRow
    from onefold.commands.predict import Prediction
    from onefold.commands.run import Run
    from onefold.data import DatasetInfo
    from onefold.recipes import Recipe
    from onefold.runtimes import Artifact


def print_note(text: str) -> None:
    """Print a remark on stderr, as the log's are printed."""
    print(f"note: {text}".encode("utf-8", "backslashreplace").decode(), file=sys.stderr, flush=True)


def print_line(text: str) -> None:
    """A line for a person; it never fails on a name that the terminal cannot show."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def print_json(values: Iterable[Any]) -> None:
    """One JSON object a line."""
    for value in values:
        plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        print(json.dumps(plain, default=str), flush=True)


def print_facts(found: Mapping[str, str]) -> None:
    """One fact a line: its name, its text."""
    for name, text in found.items():
        print_line(f"{name:{max(map(len, found))}}  {text}")


# -------------------------------------------------------------------------------------------- tables


def _print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as their cells: the first to the left, numbers to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        cells = [
            cell.ljust(width) if i == 0 or not _is_numeric(lines[1:], i) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print_line("  ".join(cells).rstrip())


def _is_numeric(lines: Sequence[Sequence[str]], column: int) -> bool:
    return all(line[column][:1] in "0123456789-+" for line in lines)


def print_models(rows: Iterable[ModelRow]) -> None:
    """The catalogue, one network a line; counts are exact."""
    head = ["model", "size", "params", "folded", "MACs", "folded", "top-1 %", "stated by"]
    _print_table(
        head,
        [
            [
                row.name,
                str(row.size),
                f"{row.train['params']:,}",
                f"{row.folded['params']:,}",
                f"{row.train['macs']:,}",
                f"{row.folded['macs']:,}",
                "-" if row.top1 is None else f"{row.top1:.1f}",
                row.source or "-",
            ]
            for row in rows
        ],
    )


def print_recipes(recipes: Iterable[Recipe]) -> None:
    """The recipes, one a line, with what they promise."""
    _print_table(
        ["recipe", "model", "data", "epochs", "expected top-1 %"],
        [[r.name, r.model, r.data.spec or "--data", str(r.plan.epochs), _expected(r)] for r in recipes],
    )


def _expected(recipe: Recipe) -> str:
    if recipe.expect is None:
        return "-"
    return f"{recipe.expect.top1:.1f} ({recipe.expect.source})"


def print_dataset(info: DatasetInfo, *, most: int | None = 8) -> None:
    """What a dataset holds, in a few lines on stderr."""
    for line in info.lines(most):
        print(line, file=sys.stderr, flush=True)


def print_recipe(chosen: Recipe, *, to: TextIO | None = None) -> None:
    """The complete recipe, each field under the name by which it can be changed; beside a progress, on stderr."""
    for path, value in _fields(chosen.to_dict()):
        print(f"  {path:32} {value}".encode("utf-8", "backslashreplace").decode(), file=to or sys.stderr)


def print_changed_fields(chosen: Recipe, typed: Sequence[str] = ()) -> None:
    """The fields in which a recipe differs from the one of its name, on stderr; all of them are in recipe.json.

    What the user has `typed`, the words of the command line, is not repeated. Numbers have three digits.
    """
    from onefold.recipes import find_recipe

    before = dict(_fields(find_recipe(chosen.name).to_dict()))
    words = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in typed if word.startswith("-")}
    known = {_OTHERWISE.get(word, word) for word in words}
    changed = {
        path: value
        for path, value in _fields(chosen.to_dict())
        if before.get(path) != value and not known & {path, path.rpartition(".")[2]}
    }
    if changed:
        print(f"changed from {chosen.name}:", file=sys.stderr)
    for path, value in changed.items():
        line = f"  {path} {_rounded(value)}" + (f", not {_rounded(before[path])}" if path in before else "")
        print(line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)


_OTHERWISE = {"b": "batch_size", "data": "spec", "data_dir": "spec", "img_size": "size"}  # option -> field of a recipe


def _rounded(text: str) -> str:
    """A field's text with three digits of each number in it that has more."""
    return re.sub(r"(?<![\w./-])\d+\.\d{3,}(e-?\d+)?", lambda number: f"{float(number[0]):.3g}", text)


def _fields(plain: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(plain, dict):
        for key, value in plain.items():
            yield from _fields(value, f"{path}.{key}" if path else key)
    elif isinstance(plain, list) and plain and isinstance(plain[0], dict):
        for number, value in enumerate(plain):
            yield from _fields(value, f"{path}.{number}")
    else:
        yield path, json.dumps(plain, ensure_ascii=False)


def print_artifacts(made: Sequence[Artifact]) -> None:
    """What was exported, with the proof of it."""
    for artifact in made:
        fused = (
            "   NOT FUSED" if not artifact.fused else "   partly fused" if artifact.details.get("left_norms") else ""
        )
        fused += "   random weights: accuracy unknown" if artifact.details.get("untrained") else ""
        fused += f"   {artifact.details['answers']}" if artifact.details.get("answers") else ""
        size = sum(stored.num_bytes for stored in artifact.files.values()) / 2**20
        print_line(f"{artifact.folder}  {size:.1f} MiB  {_parity(artifact)}{fused}")


def _parity(artifact: Artifact) -> str:
    """How the runtime's answer compared with PyTorch's."""
    found = artifact.parity
    if found is None:
        return "not run where it was exported: the first load where it runs checks its answer"
    return f"parity with PyTorch {found.difference:.1e}, top-1 equal on {100 * found.top1_agreement:.0f} %"


# ------------------------------------------------------------------------------------------ outcomes


def print_training_result(run: Run) -> None:
    """Where the best weights are, how they score, and what one must know of the score."""
    best, (low, high) = run.best, run.best.interval
    weights = "weights" if run.recipe.plan.ema is None else "EMA weights"
    print_line(
        f"best top-1 {best.top1:.2f} % (95 % interval {low:.1f} to {high:.1f}; epoch {best.epoch}), the fused "
        f"{weights} on {best.count} image{'' if best.count == 1 else 's'}"
    )
    for remark in run.remarks:
        print_line(f"note: {remark}")
    print_line(f"weights: {best.weights}")


def print_fused_weights(made: FusedWeights) -> None:
    """What folding changed, and the proof that the answer is not among it."""
    before, after = made.before, made.after
    print_line(f"{made.path}: {'was fused already' if made.was_fused else f'drift {made.drift:.1e}'}")
    if made.left_norms:
        print_line(
            f"partly fused: {made.left_norms} norms follow no convolution that they could be folded into, and stay"
        )
    print_line(f"parameters {before.params:,} -> {after.params:,}, multiply-adds {before.macs:,} -> {after.macs:,}")


def print_prediction(answer: Prediction, *, as_json: bool, listed: bool = True) -> None:
    """One image: its likeliest classes where they are `listed`, or on stderr why it was not read."""
    if as_json:
        print_json([answer.to_dict()])
    elif answer.problem is not None:
        print(str(answer).encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
    elif listed:
        print_line(str(answer))


if TYPE_CHECKING:
    from onefold.bench import Comparison, Measurement, Roofline
    from onefold.runtimes import Profile

_WHAT = {"fp32": "multiply-adds in fp32", "bf16": "multiply-adds in bf16", "int8": "multiply-adds in int8"}


def print_latencies(outcome: Measurement | Comparison, path: Path, *, as_json: bool) -> None:
    """Latencies of one call, what share of the machine's limit each reaches, and in words what is faster than what."""
    from onefold.bench import Comparison

    together = outcome.measurements if isinstance(outcome, Comparison) else {str(outcome.subject["name"]): outcome}
    if as_json:
        print_json(_plain(m, outcome) for m in together.values())
        return
    head = ["", "median ms", "p90 ms", "min ms", "spread", "of the limit", "machine"]
    _print_table(head, [_row(name, m) for name, m in together.items()])
    for name, m in together.items():
        for line in _beside(m):
            print_line(f"  {name}: {line}")
    for reason in dict.fromkeys(reason for m in together.values() for reason in m.reasons):
        print_line(f"  {reason}")
    if isinstance(outcome, Comparison):
        _compared(outcome)
    print_line(f"appended to {path}")


def print_roofline(found: Roofline, threads: Collection[int], *, as_json: bool) -> None:
    """What the machine can do at the most with these numbers of threads, the best of five runs and their median."""
    limits = [limit for limit in found.limits if limit.threads in threads]
    for each in found.notes:
        print_note(each)
    if as_json:
        print_json(limits)
        return
    rows = []
    for number in sorted(threads):
        of_number = {limit.kind: limit for limit in limits if limit.threads == number and limit.num_bytes is None}
        for kind, what in _WHAT.items():
            if kind in of_number:
                limit = of_number[kind]
                rates = [f"{rate / 1e9:.1f}" for rate in (limit.best, limit.median)]
                rows.append([what, str(number), *rates, "GMAC/s", limit.how])
            else:  # such as bf16 on a processor without it
                rows.append([what, str(number), "not known", "", "", ""])
        for limit in (one for one in limits if one.threads == number and one.num_bytes is not None):
            rates = [f"{rate / 1e9:.1f}" for rate in (limit.best, limit.median)]
            rows.append([f"reading {_size(limit.num_bytes)} over and over", str(number), *rates, "GB/s", limit.how])
    _print_table(["", "threads", "best of five", "median", "unit", "by"], rows)
    print_line(
        "The best run is the limit, for what disturbs a run only slows it. A multiply-add is two operations (FLOP)."
    )


def print_layer_times(found: Profile, *, top: int, as_json: bool) -> None:
    """The slowest layers, and what each type of layer takes together."""
    total = found.ns or 1.0
    if as_json:
        for layer in found.layers:
            print_json([{"name": layer.name, "type": layer.kind, "ms": layer.ns / 1e6, "share": layer.ns / total}])
        return
    slowest = sorted(found.layers, key=lambda layer: -layer.ns)[:top]
    rows = [[layer.name, layer.kind, f"{layer.ns / 1e6:.3f}", f"{100 * layer.ns / total:.1f} %"] for layer in slowest]
    rest = len(found.layers) - len(slowest)
    if rest:
        others = total - sum(layer.ns for layer in slowest)
        rows.append([f"{rest} more", "", f"{others / 1e6:.3f}", f"{100 * others / total:.1f} %"])
    _print_table(["layer", "type", "ms", "share"], rows)
    kinds = ", ".join(
        f"{kind} {100 * ns / total:.1f} %" for kind, ns in found.time_by_type().items() if ns >= 0.005 * total
    )
    print_line(
        f"{found.artifact.title}: {total / 1e6:.3f} ms in {len(found.layers)} layers, medians of {found.calls} calls"
    )
    print_line(f"by type: {kinds}")


def _row(name: str, m: Measurement) -> list[str]:
    reached = (
        f"- ({_no_limit(m)})"
        if m.roofline_share is None or m.bound is None
        else f"{100 * m.roofline_share:.0f} % ({m.bound.limited_by})"
    )
    too_few = "needs 64 samples" if m.calls_per_sample == 1 else f"samples of {m.calls_per_sample} calls"
    p90 = f"- ({too_few})" if m.p90_ns is None else f"{m.p90_ns / 1e6:.3f}"
    times = [f"{m.median_ns / 1e6:.3f}", p90, f"{m.min_ns / 1e6:.3f}"]
    return [name, *times, f"{100 * m.spread:.1f} %", reached, m.verdict]


def _no_limit(m: Measurement) -> str:
    """Why no limit is known for a measurement."""
    if m.bound is not None:
        return f"no peak of {m.subject['precision']} was measured"
    return "its multiply-adds are not known" if "macs" not in m.subject else f"none for {m.subject['precision']}"


def _beside(m: Measurement) -> list[str]:
    """What was found beside the times: the least time, the start in a fresh process, memory, size."""
    parts = []
    if m.roofline_share is not None and m.bound is not None:
        parts.append(
            f"{100 * m.roofline_share:.0f} % of the roofline: {m.subject['precision']} with "
            f"{_threads(m.procedure.threads)} cannot take less than {(m.bound.ns or 0) / 1e6:.3f} ms here "
            f"({m.bound.how}; bound by {m.bound.limited_by})"
        )
    if m.beats_roofline:
        parts.append(
            "its fastest call took less than this peak allows: the peak was measured while the machine was busy "
            "(`onefold limits --again` measures anew), or the runtime needs fewer multiplications (Winograd)"
        )
    if m.cold is not None:
        peak = (
            "memory not visible" if m.cold.peak_bytes is None else f"{_size(m.cold.peak_bytes)} of memory at the peak"
        )
        times = f"opened in {m.cold.open_ns / 1e6:.0f} ms, first call {m.cold.first_ns / 1e6:.1f} ms"
        file = f", {_size(m.subject['num_bytes'])} on disk" if "num_bytes" in m.subject else ""
        parts.append(f"in a fresh process {times}, then {m.cold.warm_ns / 1e6:.1f} ms; {peak}{file}")
    return parts


def _compared(outcome: Comparison) -> None:
    for sentence in outcome.sentences():
        print_line(sentence)
    floor = f"{100 * outcome.floor.floor:.2g} %"
    if len(outcome.measurements) == 1:
        print_line(f"Noise floor: against itself it differs by up to {floor} here; a smaller difference is none.")
    for name, m in outcome.measurements.items():
        if "planted" in m.subject:
            found = outcome.ratio(name).verdict == "slower"
            line = f"The injected slowdown of {100 * m.subject['planted']:g} % was{'' if found else ' NOT'} detected"
            print_line(f"{line}; the noise floor is {floor}.")


def _plain(m: Measurement, outcome: Measurement | Comparison) -> dict[str, Any]:
    from onefold.bench import Comparison

    return {
        "subject": dict(m.subject),
        "median_ms": m.median_ns / 1e6,
        "verdict": m.verdict,
        "roofline": m.roofline_share,
        "bound": None if m.bound is None else {**m.bound.to_dict(), "side": m.bound.limited_by},
        "cold": None if m.cold is None else m.cold.to_dict(),
        "floor": outcome.floor.floor if isinstance(outcome, Comparison) else None,
    }


def _threads(number: int) -> str:
    return f"{number} thread{'s' if number > 1 else ''}"


def _size(num_bytes: int | None) -> str:
    count = num_bytes or 0
    return f"{count / 2**20:.3g} MiB" if count >= 2**20 else f"{count / 2**10:.3g} KiB"
