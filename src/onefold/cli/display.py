"""How results look in a terminal: tables and answers on stdout, remarks on stderr."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
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
    print_table(
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
    print_table(
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

    The fields that the user has `typed`, in the words of the command line, come first, but for the place of the data;
    others were changed by these, or by the data and weights, which is said. Numbers have three digits.
    """
    from onefold.recipes import find_recipe

    before = dict(_fields(find_recipe(chosen.name).to_dict()))
    words = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in typed if word.startswith("-")}
    known = {_OTHERWISE.get(word, word) for word in words}
    changed = {
        path: value
        for path, value in _fields(chosen.to_dict())
        if before.get(path) != value and not (path in _PLACES and known & {path, path.rpartition(".")[2]})
    }
    if changed:
        print(f"changed from {chosen.name}:", file=sys.stderr)
    is_typed = {path: bool(known & {path, path.rpartition(".")[2]}) for path in changed}
    for path, value in sorted(changed.items(), key=lambda field: not is_typed[field[0]]):
        line = f"  {path} {_rounded(value)}" + (f", not {_rounded(before[path])}" if path in before else "")
        line += " (follows)" if typed and not is_typed[path] else ""
        print(line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)


_PLACES = ("data.spec", "data.val")  # which the lines about the data name
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
    from onefold.report.format import plain_size

    for artifact in made:
        fused = (
            "   NOT FUSED" if not artifact.fused else "   partly fused" if artifact.details.get("left_norms") else ""
        )
        fused += "   random weights: accuracy unknown" if artifact.details.get("untrained") else ""
        fused += f"   {artifact.details['answers']}" if artifact.details.get("answers") else ""
        print_line(f"{artifact.folder}  {plain_size(artifact.num_bytes)}  {_parity(artifact)}{fused}")


def _parity(artifact: Artifact) -> str:
    """How the runtime's answer compared with PyTorch's."""
    found = artifact.parity
    if found is None:
        return "not run where it was exported: the first load where it runs checks its answer"
    share = f"{100 * found.top1_agreement:.0f} %"
    return f"parity with {artifact.compared_with} {found.difference:.1e}, top-1 equal on {share}"


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
    print_next("fuse", run.folder, "--out", "fused.safetensors")


def print_next(*words: str | Path) -> None:
    """The command that is typed next, where one follows; words in capitals are the user's to fill in."""
    print_line(f"next: onefold {shlex.join(map(str, words))}")


def print_fused_weights(made: FusedWeights) -> None:
    """What folding changed, and the proof that the answer is not among it."""
    before, after = made.before, made.after
    if made.was_fused:  # which a note has said
        print_line(f"{made.path}: parameters {after.params:,}, multiply-adds {after.macs:,}")
    else:
        print_line(f"{made.path}: drift {made.drift:.1e}")
        if made.left_norms:
            print_line(
                f"partly fused: {made.left_norms} norms follow no convolution that they could be folded into, and stay"
            )
        counts = f"parameters {before.params:,} -> {after.params:,}, multiply-adds {before.macs:,} -> {after.macs:,}"
        print_line(counts)
    print_next("deploy", made.path, "--data", "PHOTOS", "--to", "onnx", *([] if made.left_norms else ["--int8"]))


def print_prediction(answer: Prediction, *, as_json: bool, listed: bool = True) -> None:
    """One image: its likeliest classes where they are `listed`, or on stderr why it was not read."""
    if as_json:
        print_json([answer.to_dict()])
    elif answer.problem is not None:
        print(str(answer).encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
    elif listed:
        print_line(str(answer))
