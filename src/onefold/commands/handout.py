"""README.md of a deployment: which artifact to take, by what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onefold.commands.deploy import DeployResult, Verdict


def handout(done: DeployResult) -> str:
    """The page, in Markdown."""
    network = done.network
    lines = [f"# {network.card.model}, for devices", ""]
    if done.failed:
        lines += [f"**Not to be shipped: {', '.join(gate.sentence for gate in done.failed)}.**", ""]
    float_score = "without labels" if done.top1 is None else f"top-1 {done.top1:.2f} % in PyTorch, fp32"
    lines += [f"Scored on {done.data}: {float_score}.", "", *_table(done), "", *_choice(done), ""]
    lines += [
        "Each folder is complete by itself: its `README.md` has code that loads it (Python without PyTorch, C++, "
        "Swift, Kotlin, JavaScript, as far as the runtime has them), its `manifest.json` the classes and the "
        "preprocessing, its `reference.npz` a pair of images with the answers that it must give.",
        "",
        "`report.html` draws the measurements; `results/` has every sample. `MODEL_CARD.md` says what the network is.",
    ]
    return "\n".join(lines) + "\n"


def _table(done: DeployResult) -> list[str]:
    head = ["artifact", "top-1 %", "lost, points", "answers changed", "latency, median", "threads", "machine", "size"]
    rows = [_row(each) for each in done.verdicts]
    scored = {each.name for each in done.verdicts}
    folders = sorted(path.name for path in done.folder.iterdir() if (path / "manifest.json").is_file())
    rows += [[name, "not run here", *["-"] * (len(head) - 2)] for name in folders if name not in scored]
    return [_line(head), "|---" + "|--:" * (len(head) - 1) + "|", *map(_line, rows)]


def _row(each: Verdict) -> list[str]:
    timed = each.measurement
    return [
        each.name,
        "-" if each.top1 is None else f"{each.top1:.2f}",
        "-" if each.top1 is None else f"{each.drop:.2f}",
        f"{each.changed} of {each.count}",
        "-" if timed is None else f"{timed.median_ns / 1e6:.2f} ms ({timed.verdict})",
        "-" if timed is None else str(timed.procedure.threads),
        "-" if timed is None else timed.machine.chip,
        f"{each.artifact.num_bytes / 2**20:.1f} MiB",
    ]


def _choice(done: DeployResult) -> list[str]:
    """The quickest that may be shipped, by this machine's times."""
    failed = {gate.name for gate in done.failed}
    fit = [each for each in done.verdicts if each.measurement is not None and each.name not in failed]
    if not fit:
        return ["Nothing here was both timed and good enough to be recommended."]
    best = min(fit, key=lambda each: each.measurement.median_ns if each.measurement else 0.0)
    return [
        f"Quickest of those that keep their accuracy, on this machine: **{best.name}**. A phone is another machine: "
        "measure there (`onefold phone`)."
    ]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
