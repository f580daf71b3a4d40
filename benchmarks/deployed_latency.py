"""MobileOne deployed: our artifact against the best of timm's network in any runtime, and against the machine's limit.

    python benchmarks/deployed_latency.py [--models mobileone_s0,...] [--threads 1,2] [--samples 120]
                                          [--folder artifacts/deployed] [--runtimes onnx,openvino,litert,executorch]
                                          [--openings 4] [--lead 2]

For each network and number of threads ours in fp32 and int8 and timm's in fp32, in every runtime, are timed in the
same rounds, each once a round in an order drawn anew, after two calls of its own as in a stream of images (`--lead 0`:
after another network's call, with the caches full of that). timm's fold is timm's own (`reparameterize_model`), so that
the network compared with is what a user of timm has. Before anything else an A/A self-test of one artifact.
All are opened several times, in orders drawn anew: where a network's weights come to lie in memory is worth some per
cent, and two files of one network differ by as much. Our default artifact of a precision is the one with the least
median of *other* rounds: the first third chooses, the rest is told, for timm's likewise. The ratio is the geometric
mean over the openings, and their range is told. The limit is that of `onefold limits`, measured in the same run.

Weights are drawn at random, norms settled: a latency does not depend on them. Appends every raw sample to
benchmarks/results/deployed-<machine>.jsonl and writes a dated table beside it.
"""

from __future__ import annotations

import argparse
import datetime
import math
import random
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median

from latency_against_timm import Job, declare_operators, export_one, is_missing, make_photos, network_of, place_of, say
from onefold.bench import Comparison, Machine, Procedure, append_results, compare, measure_noise_floor
from onefold.bench.timing_noise import paired_ratio_interval
from onefold.commands.bench import latency_bound, load_or_measure_roofline, make_timed_call
from onefold.commands.calibration_cache import CalibrationOptions, calibrated_network
from onefold.commands.open_network import Network
from onefold.commands.predictor import Predictor, open_predictor
from onefold.errors import OnefoldError
from onefold.file_io import write_text
from onefold.quantize import MINMAX_METHOD

HERE = Path(__file__).parent
MODELS = tuple(f"mobileone_s{n}" for n in range(5))
QUICK = replace(MINMAX_METHOD, power_of_two_scales=True)  # how kernels are rounded does not change how long they take


def timms_own(name: str) -> Network:
    """timm's network, its norms settled, folded by timm."""
    from timm.utils.model import reparameterize_model

    from onefold.commands.open_network import open_network

    opened = open_network(f"timm:{name}")
    return replace(opened, model=reparameterize_model(opened.model).eval(), title=f"timm:{name}")


def export_all(job: Job, name: str) -> None:
    """Every artifact of one size that is not there yet."""
    for title, precisions in ((name, ("fp32", "int8")), (f"timm:{name}", ("fp32",))):
        missing = [
            (runtime, precision)
            for precision in precisions
            for runtime in job.runtimes
            if is_missing(job, place_of(job, title, runtime, precision))
        ]
        if not missing:
            continue
        network = timms_own(name) if title.startswith("timm:") else network_of(name)
        made = None
        if any(precision == "int8" for _, precision in missing):
            made = calibrated_network(network, CalibrationOptions(data=job.photos, count=8, method=QUICK))
        for to in missing:
            export_one(job, network, made if to[1] == "int8" else None, to)


def opened(job: Job, name: str, threads: int, stack: ExitStack, seed: int = 0) -> dict[str, Predictor]:
    """Everything of one size, by "ours fp32 onnx" and the like; the order in which they are opened is the seed's."""
    places = {
        f"{who} {precision} {runtime}": place_of(job, title, runtime, precision)
        for title, who in ((name, "ours"), (f"timm:{name}", "timm"))
        for precision in ("fp32", "int8")
        for runtime in job.runtimes
    }
    found = {}
    for title in random.Random(seed).sample(sorted(places), len(places)):
        if (places[title] / "manifest.json").is_file():
            try:
                found[title] = stack.enter_context(open_predictor(places[title], threads=threads))
            except OnefoldError as error:
                say(f"  left out: {places[title]}: {error}")
    return found


def best_of(outcome: Comparison, kind: str) -> str:
    """The quickest of a kind in the first third of the rounds."""
    names = [name for name in outcome.measurements if name.startswith(kind)]
    third = len(outcome.twin.samples_ns) // 3
    return min(names, key=lambda name: median(outcome.measurements[name].latencies_ns[:third]))


def report_lines(outcome: Comparison, name: str, threads: int, results: Path) -> list[str]:
    """The table of one size: medians, and their share of the limit."""
    limits = load_or_measure_roofline(results, [threads])
    lines = [
        f"{name}, {threads} thread(s), {len(outcome.twin.samples_ns)} rounds, "
        f"{outcome.twin.procedure.lead_calls} lead calls; A/A band {100 * outcome.floor.floor:.1f} %"
    ]
    for title, each in sorted(outcome.measurements.items()):
        share = latency_bound(limits, each.subject, threads)
        of_limit = (
            ""
            if share is None
            else f"{100 * (share.ns or 0) / each.median_ns:5.0f} % of the limit ({share.limited_by})"
        )
        p90 = "-" if each.p90_ns is None else f"{each.p90_ns / 1e6:.2f}"
        times = f"{each.median_ns / 1e6:7.2f} ms  p90 {p90:>6}  spread {100 * each.spread:4.0f} %"
        lines.append(f"  {title:24} {times}  {of_limit}  {each.verdict}")
    return lines


def ratios(outcomes: list[Comparison]) -> list[str]:
    """Our default artifacts over timm's best: the geometric mean of all openings, and each of them."""
    lines = []
    for kind in ("ours fp32", "ours int8"):
        found = []
        for outcome in outcomes:
            rival, mine = best_of(outcome, "timm fp32"), best_of(outcome, kind)
            third = len(outcome.twin.samples_ns) // 3
            a, b = (outcome.measurements[each].latencies_ns[third:] for each in (rival, mine))
            value, low, high = paired_ratio_interval(a, b, 0)
            found.append((value, f"{mine} over {rival} {value:.3f}x (95 % CI {low:.3f}-{high:.3f})"))
        values = [value for value, _ in found]
        mean = math.prod(values) ** (1 / len(values))
        lines.append(f"  {kind}: {mean:.3f}x, in {len(values)} openings {min(values):.3f}-{max(values):.3f}")
        lines += [f"    {text}" for _, text in found]
    return lines


def run(job: Job, procedures: list[Procedure], openings: int, results: Path) -> str:
    machine, started = Machine.detect(), datetime.datetime.now(datetime.timezone.utc)
    parts = [
        f"{machine.chip}, {machine.cores} cores, {machine.system}; {started:%Y-%m-%d %H:%M} UTC; load {machine.load}"
    ]
    parts += [", ".join(f"{package} {version}" for package, version in machine.versions.items())]
    for name in job.names:
        export_all(job, name)
    for procedure in procedures:
        with ExitStack() as stack:
            first = opened(job, job.names[0], procedure.threads, stack)
            subject = next(title for title in first if title.startswith("ours fp32"))
            floor = measure_noise_floor(
                make_timed_call(first[subject]), replace(procedure, samples=max(300, procedure.samples))
            )
        ratio = f"{floor.value:.4f} (95 % CI {floor.low:.4f}-{floor.high:.4f})"
        parts += ["", f"A/A, {job.names[0]} {subject}, {procedure.threads} thread(s), against itself: ratio {ratio}"]
        say(parts[-1])
        for name in job.names:
            outcomes = []
            for seed in range(openings):
                with ExitStack() as stack:
                    found = opened(job, name, procedure.threads, stack, seed)
                    calls = {title: make_timed_call(predictor) for title, predictor in found.items()}
                    outcomes.append(compare(calls, procedure, {t: {**p.facts, "batch": 1} for t, p in found.items()}))
            append_results(results / f"deployed-{machine.slug}.jsonl", outcomes)
            parts += ["", *report_lines(outcomes[0], name, procedure.threads, results), *ratios(outcomes)]
            say("\n".join(parts[-len(found) - 2 * openings - 4 :]))
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--runtimes", default="onnx,openvino,litert,executorch")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--samples", type=int, default=120)
    parser.add_argument("--openings", type=int, default=4)
    parser.add_argument("--lead", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("artifacts/deployed"))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--export-only", action="store_true")
    given = parser.parse_args()
    declare_operators()
    with tempfile.TemporaryDirectory() as aside:
        job = Job(
            names=tuple(given.models.split(",")),
            runtimes=tuple(given.runtimes.split(",")),
            precisions=("fp32", "int8"),
            folder=given.folder,
            photos=make_photos(Path(aside) / "photos"),
            again=False,
        )
        if given.export_only:
            for name in job.names:
                export_all(job, name)
            return
        procedures = [
            Procedure(samples=given.samples, lead_calls=given.lead, threads=int(count))
            for count in given.threads.split(",")
        ]
        text = run(job, procedures, given.openings, given.results)
    print(text)
    write_text(given.results / f"{datetime.date.today().isoformat()}-deployed-latency.txt", text)


if __name__ == "__main__":
    sys.exit(main())
