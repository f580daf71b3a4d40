"""Fused against unfused, in torch and in runtimes: latencies of one image, interleaved in one run.

    python benchmarks/fused_latency.py [--models mobileone_s0,mobilenetv1_100] [--samples 100] [--threads 1]

Prints a table and the comparison in words, and appends every raw sample to benchmarks/results/<machine>.jsonl.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from onefold.bench import Comparison, Machine, Procedure, append_results, compare
from onefold.commands.export import ExportOptions, export_to_runtimes
from onefold.commands.predictor import open_predictor
from onefold.models import CATALOGUE, create_model
from onefold.models.load_model import Card, save_weights

HERE = Path(__file__).parent


def weights_of(name: str, folder: Path) -> Path:
    """Fresh weights: a latency does not depend on their values."""
    path = folder / f"{name}.safetensors"
    card = Card(model=name, num_classes=1000, preprocessing=dict(CATALOGUE[name].input))
    save_weights(create_model(name), path, card)
    return path


def measured(name: str, procedure: Procedure, folder: Path) -> Comparison:
    """Torch unfused (the baseline), torch fused, ONNX Runtime fused, OpenVINO fused."""
    weights = weights_of(name, folder)
    artifacts = export_to_runtimes(weights, folder / name, ExportOptions(runtimes=["onnx", "openvino"]))
    threads = procedure.threads
    predictors = [open_predictor(weights, threads=threads, fused=fused) for fused in (False, True)]
    predictors += [open_predictor(artifact.folder, threads=threads) for artifact in artifacts]
    images = create_images(predictors[0].facts["input_shape"])
    calls = {p.title: (lambda p=p: p.session(images)) for p in predictors}
    outcome = compare(calls, procedure, {p.title: p.facts for p in predictors})
    for predictor in predictors:
        predictor.close()
    return outcome


def create_images(shape: tuple[int, ...]):
    import numpy as np

    return np.random.default_rng(0).standard_normal((1, *shape), dtype=np.float32)


def draw(outcomes: dict[str, Comparison], path: Path) -> None:
    """Bars of the medians, a group a network."""
    from matplotlib.figure import Figure

    colours = ("#c2410c", "#f59e0b", "#2563eb", "#0d9488")
    figure = Figure(figsize=(8, 0.9 + 1.0 * len(outcomes)), layout="constrained")
    axes = figure.subplots()
    kinds: list[str] = []
    for row, (name, outcome) in enumerate(outcomes.items()):
        for number, (title, m) in enumerate(outcome.measurements.items()):
            kind = title.removeprefix(f"{name} ").replace("eager fp32", "torch").replace(" fp32", "")
            label = kind if kind not in kinds else None
            kinds.append(kind)
            ms, y = m.median_ns / 1e6, row + 0.2 * number
            axes.barh(y, ms, 0.18, color=colours[number], label=label)
            axes.text(ms + 1, y, f"{ms:.1f}", va="center", fontsize=8)
    axes.set_yticks([row + 0.3 for row in range(len(outcomes))], list(outcomes))
    axes.invert_yaxis()
    axes.set_xlabel("median latency of one 224 px image, one thread, milliseconds")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="mobileone_s0,mobileone_s1,mobilenetv1_100,mobileformer_96m")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--figure", type=Path, default=HERE.parent / "docs" / "latency.svg")
    given = parser.parse_args()
    procedure = Procedure(samples=given.samples, threads=given.threads, warmup_calls=10)
    outcomes: dict[str, Comparison] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.models.split(","):
            outcome = outcomes[name] = measured(name, procedure, Path(folder))
            append_results(HERE / "results" / f"{Machine.detect().slug}.jsonl", [outcome])
            for title, measurement in outcome.measurements.items():
                spread = f"spread {100 * measurement.spread:.0f} %"
                print(f"{title:40} median {measurement.median_ns / 1e6:8.2f} ms  {spread}  {measurement.verdict}")
            print(*outcome.sentences(), "", sep="\n")
    draw(outcomes, given.figure)


if __name__ == "__main__":
    main()
