"""write_report: one HTML file that holds everything - text, tables, figures, style - and needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onefold.errors import BadData
from onefold.report.answers import answers, looked_at
from onefold.report.evidence import Evidence, evidence
from onefold.report.html import Markup, classed, element, joined
from onefold.report.latencies import latencies
from onefold.report.load import Run, gather
from onefold.report.provenance import again, artifacts, machines, procedure
from onefold.report.style import STYLE
from onefold.report.summary import lead, tiles, title, warnings
from onefold.report.training import training
from onefold.storage import write_text

# No script, no font, nothing from elsewhere, whatever a name in the inputs may hold; pictures lie in the page itself.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_report(
    path: Path, *, runs: Sequence[Path] = (), results: Sequence[Path] = (), artifacts: Sequence[Path] = ()
) -> None:
    """Write the page about run folders, results files (JSON lines) and artifact folders to `path`.

    The same inputs give the same bytes. What is missing or damaged is said on the page. Raises BadData where nothing
    at all is given, MissingExtra where matplotlib is not installed, NotWritable.
    """
    if not (runs or results or artifacts):
        raise BadData("a report needs something to report: give a run folder, a results file or an artifact folder")
    write_text(Path(path), render(evidence(gather(runs, results, artifacts))))


def render(found: Evidence) -> str:
    """The whole page."""
    sections = _sections(found)
    links = [element("li", element("a", name, attributes={"href": f"#{key}"})) for key, name, _ in sections]
    heading = title(found)
    head = element(
        "head",
        element("meta", attributes={"charset": "utf-8"}),
        element("meta", attributes={"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", attributes={"http-equiv": "Content-Security-Policy", "content": _POLICY}),
        element("meta", attributes={"name": "color-scheme", "content": "light dark"}),
        element("title", f"{heading} - onefold report"),
        element("style", Markup(STYLE)),
    )
    top = element("header", element("h1", heading), classed("p", "lead", lead(found)), tiles(found))
    body = element(
        "body",
        top,
        element("nav", element("ul", *links), attributes={"aria-label": "Sections"}),
        element("main", warnings(found), *(_section(*each) for each in sections)),
        element(
            "footer", element("p", "Made by onefold from the files named above. Nothing here is loaded from elsewhere.")
        ),
    )
    return f"<!doctype html>\n{element('html', head, body, attributes={'lang': 'en'})}\n"


def _sections(found: Evidence) -> list[tuple[str, str, Markup]]:
    """(anchor, name, content) of every part; those without inputs say so."""
    inputs = found.inputs
    nothing = {
        "training": "No training run was given.",
        "latency": "No measured latency was given.",
        "artifacts": "No exported artifact was given.",
    }
    missing = {key: classed("p", "note", text) for key, text in nothing.items()}
    return [
        ("training", "Training", _training(inputs.runs) if inputs.runs else missing["training"]),
        ("latency", "Latency", latencies(found) if found.groups else missing["latency"]),
        ("artifacts", "Artifacts", artifacts(inputs) if inputs.exports else missing["artifacts"]),
        ("procedure", "How it was measured", joined(procedure(inputs.all_measurements), machines(found.machines))),
        ("again", "How to reproduce it", again(found)),
    ]


def _training(runs: Sequence[Run]) -> Markup:
    return joined(looked_at(runs), training(runs), answers(runs))


def _section(key: str, name: str, content: Markup) -> Markup:
    return element("section", element("h2", name), content, attributes={"id": key})
