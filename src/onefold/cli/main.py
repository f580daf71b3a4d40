"""The Typer application of `onefold VERB ...`: parses arguments and prints; the work is done in onefold.commands.

torch is imported by the verbs that need it, so that `onefold --help` answers at once. Exit status: see `errors`.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from onefold import __version__
from onefold.cli import advise as advising
from onefold.cli import bench as benchmarking
from onefold.cli import deploy as deploying
from onefold.cli import display, exit_status
from onefold.cli import study as studying
from onefold.cli.shared_options import (
    BatchSizeOption,
    ClassesOption,
    ImgSizeOption,
    JsonOption,
    ModelOption,
    SourceArgument,
    ThreadsOption,
    UseEmaOption,
    WeightsArgument,
    check_inputs,
)
from onefold.cli.terminal_progress import show_progress, show_training_progress
from onefold.errors import BadArgument, NotWritable
from onefold.system_resources import keep_freed_memory, limit_library_threads

if TYPE_CHECKING:
    from onefold.recipes import Recipe

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_WHOLE = ("--curriculum", "--dropout", "--erase", "--mixing", "--start")  # fields of a recipe that have no dot
_OF_COMMAND_LINE = ("list_recipes", "max_restarts", "processes", "quiet", "show")  # options of train
_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"onefold {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, Option("--version", help="print the version and stop", is_eager=True, callback=_version)
    ] = False,
    debug: Annotated[bool, Option("--debug", help="show tracebacks")] = False,
) -> None:
    """Mobile vision backbones with re-parameterizable blocks: train, fuse, quantize, export, benchmark, report.

    Start with `onefold demo`. `onefold VERB --help` explains each command.
    """
    if debug:
        os.environ["ONEFOLD_DEBUG"] = "1"


@app.command()
def models(
    pattern: Annotated[str, Argument(help='a name or pattern, such as "mobileone*"')] = "*",
    img_size: ImgSizeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the networks: input sizes, costs, published accuracies.

    Parameters and multiply-adds are exact, before and after fusing.
    """
    from onefold.commands.models import model_rows

    with show_progress("counting"):
        rows = list(model_rows(pattern, img_size))
    display.print_json(rows) if as_json else display.print_models(rows)


@app.command(context_settings=_OVERRIDES)
def train(
    context: typer.Context,
    recipe: Annotated[str, Option(help="FAMILY:NAME; `onefold train --list` lists them")] = "photos:scratch",
    data: Annotated[str | None, Option("--data", "--data-dir", help='a folder of photos, or "digits"')] = None,
    val: Annotated[str | None, Option(help="a separate validation set")] = None,
    model: Annotated[
        str | None, Option(help="another network than the recipe's: a name of `onefold models`, or timm:NAME")
    ] = None,
    weights: Annotated[
        str | None, Option(help="pretrained weights to start from: a file, a run folder, or a hub id")
    ] = None,
    use_ema: UseEmaOption = None,
    start: Annotated[
        str | None,
        Option(
            help="plain: the weights as they are, or random initialization; skips: zero-initialized branches, so that "
            "each block begins as its skip connection; expanded: fused weights with their branches added again"
        ),
    ] = None,
    head: Annotated[
        str | None,
        Option(
            help="classifier: kept (from the weights), fresh (random), or probe (fitted to the frozen features first)"
        ),
    ] = None,
    teacher: Annotated[
        str | None, Option(help="distill from this network: a run folder, weights, or timm:NAME")
    ] = None,
    out: Annotated[
        Path | None, Option("--out", "--output", help="run folder; by default a new one, runs/<recipe>")
    ] = None,
    resume: Annotated[
        Path | None, Option(help="run folder to resume; with --data and --val if its images have moved")
    ] = None,
    img_size: ImgSizeOption = None,
    epochs: Annotated[int | None, Option(help="number of epochs; the warm-up is scaled with it")] = None,
    int8: Annotated[bool, Option("--int8", help="quantization-aware training for int8")] = False,
    batch_size: Annotated[int | None, Option("--batch-size", "-b", help="images per step (--plan.batch_size)")] = None,
    scale_to_batch: Annotated[
        int | None,
        Option(help="batch size with lr and EMA decay scaled to it: linearly for SGD, by the root for AdamW"),
    ] = None,
    lr: Annotated[float | None, Option(help="learning rate (--plan.optimizer.lr)")] = None,
    seed: Annotated[int | None, Option(help="random seed (--plan.seed)")] = None,
    threads: Annotated[int | None, Option(min=1, max=1024, help="CPU threads; by default one per core")] = None,
    device: Annotated[str, Option(help="auto (cuda where there is a GPU), cpu or cuda")] = "auto",
    log_to: Annotated[str, Option(help="loggers beside TensorBoard: wandb, trackio")] = "",
    no_check: Annotated[bool, Option("--no-check", help="skip the data check")] = False,
    quiet: Annotated[bool, Option("--quiet", "-q", help="no progress, only warnings and the result")] = False,
    processes: Annotated[int, Option(min=1, max=1024, help="data-parallel processes on this machine")] = 1,
    max_restarts: Annotated[int, Option(min=0, help="restarts in a row after a process was lost")] = 3,
    list_recipes: Annotated[bool, Option("--list", help="list the recipes and stop")] = False,
    show: Annotated[bool, Option("--show", help="print the complete recipe with all overrides, and stop")] = False,
) -> None:
    """Train a network on images by a recipe.

    Any field of the recipe can be overridden: --plan.epochs 5, --data.seed 1 ... What was found in the data is printed,
    and saved with the complete recipe in the run folder. Images lie in class folders: data/train/<class>/ and
    data/val/<class>/, or data/<class>/, of which a random fifth is held out for validation; `onefold data PLACE` shows
    how any other place is read.
    """
    changes = _dotted(context)
    options = {name: value for name, value in context.params.items() if name not in _OF_COMMAND_LINE}
    if list_recipes:
        with show_progress("reading the recipes"):
            from onefold.recipes import all_recipes

            found = all_recipes()
        display.print_recipes(found)
        return
    if "RANK" not in os.environ:  # the weights need not be on the machines of the other processes
        with nullcontext() if quiet else show_progress("reading the recipe"):
            from onefold.commands.input_checks import check_training_inputs

            check_training_inputs(options, changes, is_shown=show)
    if processes > 1 and "RANK" not in os.environ:
        given = list(context.obj)
        with show_progress("starting"):
            from onefold.commands.run import new_run_folder
            from onefold.recipes import find_recipe
            from onefold.train import import_training_modules
            from onefold.train.launch import launch

            import_training_modules()
            if out is None and resume is None:  # chosen once, for all processes
                given += ["--out", str(new_run_folder(find_recipe(recipe)))]
        raise typer.Exit(launch(lambda: main(given), processes, max_restarts))
    with ExitStack() as stack:
        on_progress = None if show or quiet else stack.enter_context(show_training_progress())
        if show:
            stack.enter_context(show_progress("reading the recipe"))
        from onefold.commands.train import Callbacks
        from onefold.commands.train import train as train_network

        callbacks = Callbacks(on_recipe=_show) if show else Callbacks()
        if on_progress is not None:
            callbacks = Callbacks(
                on_start=partial(display.print_changed_fields, typed=context.obj),
                on_data=display.print_dataset,
                on_progress=on_progress,
            )
        run = train_network(**options, changes=changes, callbacks=callbacks)
    if os.environ.get("RANK", "0") == "0":  # the run folder need not be on the machines of the others
        display.print_training_result(run)


def _show(recipe: Recipe) -> None:
    """Print the complete recipe, and go no further."""
    display.print_recipe(recipe, to=sys.stdout)
    raise typer.Exit


@app.command()
def data(
    place: Annotated[str, Argument(help='a folder, tar shards, Parquet files, a table of labels, or "digits"')],
    seed: Annotated[int, Option(min=0, max=2**32 - 1, help="random seed of the split, where there is no val")] = 0,
    val_fraction: Annotated[
        float, Option(min=0.0, max=1.0, help="fraction of train that becomes val, where there is no val")
    ] = 0.2,
    as_json: JsonOption = False,
) -> None:
    """Show how a dataset is read, and what is left out of it.

    Its classes, its splits and where they come from. No image is decoded. `train`, `eval`, `export` and `deploy` read a
    place in the same way.
    """
    with show_progress(f"reading {place}"):
        from onefold.data import read_dataset

        found = read_dataset(place, seed=seed, val_fraction=val_fraction).info
    display.print_json([found.to_dict()]) if as_json else display.print_line("\n".join(found.lines()))


@app.command("eval")
def evaluate(
    source: SourceArgument,
    data: Annotated[str | None, Option("--data", "--data-dir", help='labelled images, or "digits"')] = None,
    split: Annotated[
        str | None, Option(help="train, val or test; by default val and test, as far as they exist")
    ] = None,
    model: ModelOption = None,
    use_ema: UseEmaOption = None,
    classes: ClassesOption = None,
    img_size: ImgSizeOption = None,
    batch_size: BatchSizeOption = 32,
    threads: ThreadsOption = 2,
    results: Annotated[Path, Option(help="folder to keep the accuracy in, for `bench` and `report`")] = Path("results"),
    as_json: JsonOption = False,
) -> None:
    """Evaluate a network or an artifact on labelled images.

    Top-1, top-5, loss and expected calibration error (15 bins). Without --data a run is evaluated on the val and test
    splits of its own data, and its predictions on val are kept for `report`. Of a place with val or test those are
    scored; of one without, all images that the network was not trained on. Where training images, or copies of them by
    their pixels, are scored all the same, the line says how many. ImageNet-A, -R and -Sketch are recognized by their
    folders, -C by corruption/severity/class, ReaL labels by a real.json beside val/.
    """
    with show_progress(f"scoring {source}"):
        check_inputs(source, places=[data], model=model, classes=classes)
        from onefold.commands.evaluate import evaluate as evaluate_source

        found = evaluate_source(
            source,
            data,
            split=split,
            model=model,
            use_ema=use_ema,
            classes=classes,
            img_size=img_size,
            batch_size=batch_size,
            threads=threads,
            results=results,
        )
    if as_json:
        display.print_json({"subject": found.subject, **each.to_dict()} for each in found)
    else:
        display.print_line(repr(found))
    if found.not_written:
        raise type(found.not_written[0])("; ".join(map(str, found.not_written)))


@app.command()
def predict(
    source: SourceArgument,
    images: Annotated[list[Path], Argument(help="photos, or folders of photos")],
    out: Annotated[
        Path | None, Option("--out", "-o", help="write a table instead of printing: a .csv or .jsonl file")
    ] = None,
    sort_into: Annotated[
        Path | None, Option(help="copy each photo into a subfolder named after its class, in this new folder")
    ] = None,
    min_confidence: Annotated[
        float, Option(min=0.0, max=1.0, help="below this probability (0 to 1) a prediction is called unsure")
    ] = 0.0,
    model: ModelOption = None,
    use_ema: UseEmaOption = None,
    classes: ClassesOption = None,
    img_size: ImgSizeOption = None,
    top: Annotated[
        int | None, Option(min=1, help="most likely classes to print per image; by default 5, without those of 0.0 %")
    ] = None,
    batch_size: BatchSizeOption = 32,
    threads: ThreadsOption = 2,
    as_json: JsonOption = False,
) -> None:
    """Predict the classes of photos, of any format and orientation.

    Files that cannot be read and paths that do not exist are named and counted, and the others are predicted.
    """
    with show_progress("predicting"):
        from onefold.commands import predict as prediction

        if out is not None:
            prediction.check_table_path(out)
        if sort_into is not None:
            prediction.check_empty_folder(sort_into)
        check_inputs(source, model=model, classes=classes)
        is_listed = as_json or (out is None and sort_into is None)
        found = prediction.predict(
            source,
            images,
            model=model,
            use_ema=use_ema,
            classes=classes,
            img_size=img_size,
            top=top,
            min_confidence=min_confidence,
            batch_size=batch_size,
            threads=threads,
            on_prediction=lambda each: display.print_prediction(each, as_json=as_json, listed=is_listed),
        )
        try:
            written = [] if out is None else [found.write(out)]
            written += [] if sort_into is None else [found.sort_into(sort_into)]
        except NotWritable:
            for each in () if is_listed else found:  # they are not lost
                if each.problem is None:
                    display.print_line(str(each))
            raise
    for made in written:
        display.print_note(f"wrote {made}: {', '.join(f'{count} {name}' for name, count in found.counts().items())}")


@app.command()
def fuse(
    source: WeightsArgument,
    out: Annotated[Path, Option("--out", "-o", help="file to write")] = Path("fused.safetensors"),
    model: ModelOption = None,
    use_ema: UseEmaOption = None,
    tolerance: Annotated[
        float | None,
        Option(
            min=0.0,
            show_default="1e-4, or 16 times the network's own rounding",
            help="largest relative difference of outputs that is accepted",
        ),
    ] = None,
) -> None:
    """Fuse each multi-branch block into one convolution.

    The outputs of the fused network are compared with those of the original on random images before it is saved.
    """
    with show_progress("fusing"):
        check_inputs(source, model=model)
        from onefold.commands.fuse import fuse as fuse_weights

        made = fuse_weights(source, out, model=model, use_ema=use_ema, tolerance=tolerance)
    display.print_fused_weights(made)


for verb in (
    *(deploying.export, deploying.deploy, advising.advise),
    *(benchmarking.bench, benchmarking.limits, benchmarking.profile, benchmarking.phone, studying.study),
):
    app.command()(verb)


@app.command()
def report(
    folders: Annotated[
        list[Path] | None,
        Argument(help="folders that are searched for runs, results and artifacts; by default the current one"),
    ] = None,
    out: Annotated[Path, Option("--out", "-o", help="page to write")] = Path("report.html"),
) -> None:
    """Write one HTML page of everything trained, exported and measured.

    The page is self-contained: it loads nothing from elsewhere.
    """
    with show_progress("writing the report"):
        from onefold.commands.report import report as write

        page = write(*(folders or [Path()]), out=out)
    display.print_line(str(page))


@app.command()
def demo(
    out: Annotated[Path, Option("--out", "-o", help="folder for all that it writes")] = Path("demo"),
    seed: Annotated[int, Option(min=0, max=2**32 - 1, help="random seed of the training")] = 0,
    epochs: Annotated[int | None, Option(min=1, help="number of epochs")] = None,
) -> None:
    """Run the whole pipeline on scikit-learn's digits.

    Train MobileOne-S0, fuse, deploy, benchmark, report. The exit status is 1 where an artifact fails its gate: an fp32
    answer that is not the network's, or int8 that loses more than one point of top-1 (11 if that may be chance). The
    report is written all the same, and says so.
    """
    from onefold.commands.demo import demo as run

    with show_training_progress() as on_progress:
        page = run(out, say=display.print_line, on_progress=on_progress, seed=seed, epochs=epochs)
    typer.echo(f"\nThe report: {page}")


@app.command()
def info(as_json: JsonOption = False) -> None:
    """Show what is installed: versions, machine, compiled code, extras."""
    with show_progress("looking at this installation"):
        from onefold.commands.info import info as describe

        found = describe()
    display.print_json([found]) if as_json else display.print_facts(found)


def _dotted(context: typer.Context) -> dict[str, str]:
    """--plan.epochs 5 and --plan.epochs=5 as {"plan.epochs": "5"}; --mixing none, for a part as a whole."""
    rest, changes = list(context.args), {}
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not flag.startswith("-"):
            raise BadArgument(exit_status.unexpected_argument_error(flag))
        if not flag.startswith("--") or ("." not in flag and flag not in _WHOLE):
            raise BadArgument(exit_status.unknown_option_error(context, flag))
        if not equals:
            if not rest:
                raise BadArgument(f"{flag} needs a value: {flag} 5")
            value = rest.pop(0)
        changes[flag.removeprefix("--").replace("-", "_")] = value
    return changes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status. Errors meant for a user are one line on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    limit_library_threads()
    if arguments is None and given[:1] == ["train"]:  # of a process that does nothing else
        keep_freed_memory()
    status = exit_status.run_command(lambda: int(app(args=given or ["--help"], standalone_mode=False, obj=given) or 0))
    # This process ends: looking for garbage in all that torch holds takes seconds, in silence. Libraries that nanobind
    # binds print everything that was not collected, as an error of theirs.
    if arguments is None and not {"jaxlib", "triton"} & sys.modules.keys():
        gc.freeze()
    return status
