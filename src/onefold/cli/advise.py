"""`onefold advise`: its arguments, and how findings are printed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from onefold.cli.display import print_json, print_line, print_note, print_table
from onefold.cli.shared_options import (
    BatchSizeOption,
    ImgSizeOption,
    JsonOption,
    ModelOption,
    ThreadsOption,
    UseEmaOption,
    check_inputs,
    parse_runtimes,
)
from onefold.cli.terminal_progress import show_progress
from onefold.errors import BadArgument

if TYPE_CHECKING:
    from onefold.advisor import Advice, Combination, Trial
    from onefold.advisor.trials import Timing


def advise(
    source: Annotated[
        str | None,
        Argument(
            help="a run, weights, a hub id, timm:NAME, a name of `onefold models`, module:function, or an .onnx file"
        ),
    ] = None,
    to: Annotated[str, Option(help="runtimes, separated by commas: onnx, openvino")] = "onnx",
    data: Annotated[
        str | None,
        Option("--data", "--data-dir", help="labelled photos: they calibrate int8, and tell what a change costs"),
    ] = None,
    model: ModelOption = None,
    use_ema: UseEmaOption = None,
    img_size: ImgSizeOption = None,
    threads: ThreadsOption = 1,
    batch_size: BatchSizeOption = 1,
    samples: Annotated[int, Option(min=16, help="timed calls of each side of a trial")] = 60,
    warmup: Annotated[float, Option(min=0.0, help="warm-up of each side in seconds")] = 0.3,
    only: Annotated[str | None, Option(help="rules to try, separated by commas; by default all")] = None,
    apply: Annotated[
        str | None, Option(help="write the network as these rules change it to --out, without timing it")
    ] = None,
    out: Annotated[Path | None, Option("--out", "-o", help="ONNX file to write, with --apply")] = None,
    results: Annotated[Path, Option(help="folder that keeps this machine's limits")] = Path("results"),
    list_rules: Annotated[bool, Option("--list", help="list the rules and stop")] = False,
    as_json: JsonOption = False,
) -> None:
    """Find why a network is slow here, and what helps.

    Every remedy is timed against the network as it is, interleaved, and its answers are compared. Printed is only what
    that confirmed: finding, evidence, change, predicted and measured gain, and the command. It ends with all that
    helped at once, measured.
    """
    if list_rules:
        _print_rules(as_json=as_json)
        return
    if source is None:
        raise BadArgument("there is nothing to advise on: give a network, or --list for the rules")
    if (apply is None) != (out is None):
        raise BadArgument("--apply and --out belong together: --apply RULE --out advised.onnx")
    from onefold.advisor.variant import check_advised_runtimes

    runtimes, names = parse_runtimes(to), _split(apply or only)
    check_advised_runtimes(runtimes)
    with show_progress(f"advising on {source}"):
        check_inputs(places=[data], runtimes=runtimes, model=model)
        from onefold.commands.advise import AdviseOptions, apply_rules
        from onefold.commands.advise import advise as advise_on
        from onefold.commands.predictor import select_ema_weights

        if out is not None:
            order = AdviseOptions(
                source=select_ema_weights(source, use_ema),
                runtimes=runtimes,
                data=data,
                model=model,
                img_size=img_size,
                batch=batch_size,
                rules=names,
            )
            applied = apply_rules(order, out)
        else:
            found = advise_on(
                source,
                runtimes,
                data=data,
                model=model,
                use_ema=use_ema,
                img_size=img_size,
                threads=threads,
                batch_size=batch_size,
                samples=samples,
                warmup=warmup,
                only=names,
                results=results,
            )
    if out is not None:
        print_line(f"{out}: {', '.join(applied)}")
        return
    for advice in found:
        print_json([_plain(advice)]) if as_json else _print_advice(advice)


def _split(names: str | None) -> list[str]:
    return [name.strip() for name in (names or "").split(",") if name.strip()]


def _print_rules(*, as_json: bool) -> None:
    from onefold.advisor import RULES

    if as_json:
        names = ("name", "looks_for", "remedy", "changes_answers", "source")
        print_json({name: getattr(rule, name) for name in names} for rule in RULES)
        return
    rows = [[r.name, r.looks_for, r.remedy, "change" if r.changes_answers else "stay", r.source] for r in RULES]
    print_table(["rule", "looks for", "remedy", "answers", "source"], rows)


def _print_advice(advice: Advice) -> None:
    variant = advice.case.variant
    shape = " x ".join(map(str, variant.input_shape))
    threads = f"{variant.threads} thread{'s' * (variant.threads > 1)}"
    print_line(f"{advice.case.source} in {variant.runtime} {variant.precision}, {threads}, {variant.batch} x {shape}")
    if not advice.findings:
        print_line("  nothing was found that a trial confirmed")
    for number, trial in enumerate(advice.findings, 1):
        _print_finding(number, trial)
    for each in advice.combinations:
        _print_combination(each)
    for remark in advice.remarks:
        print_line(f"  {remark}")
    if advice.unconfirmed:
        tried = "; ".join(
            f"{each.remedy.rule.name}: {each.remedy.change} ({each.why_not()})" for each in advice.unconfirmed
        )
        print_line(f"  tried and not confirmed, {len(advice.unconfirmed)}: {tried}")
    if any(trial.timing is not None and not trial.timing.ratio.is_robust_to_noise for trial in advice.trials):
        print_note("this machine was busy: some trials could not tell; run it again when it is idle")


def _print_finding(number: int, trial: Trial) -> None:
    remedy, timing = trial.remedy, trial.timing
    assert timing is not None
    print_line(f"{number}. {remedy.finding}")
    print_line(f"   evidence   {remedy.evidence}")
    print_line(f"   change     {remedy.change} (rule {remedy.rule.name})")
    predicted = "not known" if remedy.predicted is None else f"at most {1 / remedy.predicted:.2f}x"
    print_line(f"   predicted  {predicted}")
    print_line(f"   measured   {_measured(timing)}")
    print_line(f"   answers    {_answers(timing, remedy.rule.changes_answers)}")
    print_line(f"   command    {remedy.command}")


def _print_combination(found: Combination) -> None:
    what = "all that helped" if found.changes_answers else "all that helped and leaves the answers"
    print_line(f"{what} ({', '.join(found.rules)}): {_measured(found.timing)}")
    print_line(f"   answers    {_answers(found.timing, found.changes_answers)}")


def _measured(timing: Timing) -> str:
    ratio = timing.ratio
    gain = f"{1 / ratio.value:.2f}x (95 % CI {1 / ratio.high:.2f}-{1 / ratio.low:.2f})"
    return f"{timing.before_ns / 1e6:.3f} ms -> {timing.after_ns / 1e6:.3f} ms an image, {gain}"


def _answers(timing: Timing, changed: bool) -> str:
    answers = timing.answers
    seen = [] if answers.difference is None else [f"they differ by {answers.difference:.1g} of the largest"]
    if not changed:
        return f"stay: {', '.join(seen) or 'not compared'}"
    if answers.agreement is not None and answers.drop is None:
        seen.append(f"the same top-1 on {100 * answers.agreement:.0f} % of drawn images")
    return "; ".join([f"change: {', '.join(seen)}" if seen else "change", answers.describe()])


def _plain(advice: Advice) -> dict[str, Any]:
    variant = advice.case.variant
    return {
        "source": advice.case.source,
        "runtime": variant.runtime,
        "precision": variant.precision,
        "threads": variant.threads,
        "findings": [_plain_trial(each) for each in advice.findings],
        "combinations": [
            {"rules": list(each.rules), "changes_answers": each.changes_answers, **_plain_timing(each.timing)}
            for each in advice.combinations
        ],
        "not_confirmed": [
            {"rule": t.remedy.rule.name, "change": t.remedy.change, "why": t.why_not()} for t in advice.unconfirmed
        ],
        "remarks": list(advice.remarks),
    }


def _plain_trial(trial: Trial) -> dict[str, Any]:
    remedy, timing = trial.remedy, trial.timing
    assert timing is not None
    return {
        "rule": remedy.rule.name,
        "finding": remedy.finding,
        "evidence": remedy.evidence,
        "change": remedy.change,
        "predicted": remedy.predicted,
        "changes_answers": remedy.rule.changes_answers,
        **_plain_timing(timing),
        "command": remedy.command,
    }


def _plain_timing(timing: Timing) -> dict[str, Any]:
    ratio, answers = timing.ratio, timing.answers
    return {
        "before_ms": timing.before_ns / 1e6,
        "after_ms": timing.after_ns / 1e6,
        "ratio": ratio.value,
        "interval": [ratio.low, ratio.high],
        "difference": answers.difference,
        "agreement": answers.agreement,
        "top1_drop": None if answers.drop is None else list(answers.drop),
        "photos": answers.photos,
    }
