"""`onefold export` and `deploy`: parse their arguments and print what was made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from onefold.cli import display
from onefold.cli.shared_options import (
    ImgSizeOption,
    ModelOption,
    ThreadsOption,
    UseEmaOption,
    WeightsArgument,
    check_inputs,
    check_int8_options,
    parse_runtimes,
)
from onefold.cli.terminal_progress import show_progress
from onefold.progress_steps import show_step
from onefold.runtimes import RUNTIMES


def export(
    source: WeightsArgument,
    out: Annotated[Path, Option("--out", "-o", help="folder for the artifacts")] = Path("artifacts"),
    to: Annotated[str, Option(help=f"runtimes, separated by commas: {', '.join(RUNTIMES)}")] = "onnx",
    precision: Annotated[
        str, Option(help="fp32, fp16, bf16, or int8 with --data; not every runtime has each")
    ] = "fp32",
    data: Annotated[str | None, Option(help='calibration images for int8: a folder, or "digits"')] = None,
    calibrate: Annotated[int, Option(min=2, help="number of calibration images, evenly spaced over --data")] = 200,
    weight_bits: Annotated[
        int, Option(min=7, max=8, help="7 for x86 processors without VNNI, as reduce_range in ONNX Runtime")
    ] = 8,
    per_tensor: Annotated[
        bool, Option("--per-tensor", help="per-tensor weight scales instead of per-channel ones, for DSPs")
    ] = False,
    model: ModelOption = None,
    use_ema: UseEmaOption = None,
    img_size: ImgSizeOption = None,
    no_fuse: Annotated[bool, Option("--no-fuse", help="export the multi-branch network as it is")] = False,
    opset: Annotated[
        int | None, Option(help="ONNX opset, 15 to 20: a lower one for an older ONNX Runtime", show_default="20")
    ] = None,
) -> None:
    """Export fused networks to runtimes, each verified against PyTorch.

    An artifact holds the model, its classes, its preprocessing, and a reference input with its output. Each is run
    once: its parity is the largest difference of its logits from PyTorch's, relative to the largest logit. For int8
    that is the int8 network computed in PyTorch, not the fp32 one.
    """
    with show_progress("exporting"):
        runtimes = parse_runtimes(to)
        check_int8_options(precision, data=data, other_method=per_tensor or weight_bits != 8)
        check_inputs(source, places=[data], runtimes=runtimes, precision=precision, model=model)
        with show_step("importing PyTorch"):
            from onefold.commands.export import export as export_to

        made = export_to(
            source,
            runtimes,
            out=out,
            precision=precision,
            data=data,
            calibrate=calibrate,
            weight_bits=weight_bits,
            per_tensor=per_tensor,
            model=model,
            use_ema=use_ema,
            img_size=img_size,
            no_fuse=no_fuse,
            opset=opset,
        )
    display.print_artifacts(made)


def deploy(
    source: WeightsArgument,
    data: Annotated[
        str, Option("--data", "--data-dir", help="images to calibrate int8 on, and others of them to evaluate on")
    ],
    out: Annotated[Path, Option("--out", "-o", help="new folder to write")] = Path("deploy"),
    to: Annotated[str, Option(help="runtimes, separated by commas")] = "onnx",
    int8: Annotated[bool, Option("--int8", help="int8 artifacts too, where the runtime supports them")] = False,
    half: Annotated[bool, Option("--half", help="fp16 or bf16 artifacts too, where the runtime supports them")] = False,
    val: Annotated[
        str | None, Option(help="labelled images to evaluate on, instead of those held out of --data")
    ] = None,
    max_drop: Annotated[
        float,
        Option(min=0.0, help="percentage points of top-1 that an artifact may lose; 0: none on these images"),
    ] = 1.0,
    calibrate: Annotated[int, Option(min=2, help="number of calibration images, evenly spaced over --data")] = 200,
    weight_bits: Annotated[int, Option(min=7, max=8, help="7 for x86 processors without VNNI")] = 8,
    per_tensor: Annotated[
        bool, Option("--per-tensor", help="per-tensor weight scales instead of per-channel ones, for DSPs")
    ] = False,
    skip_layers: Annotated[int, Option(min=0, help="number of the most sensitive layers that stay in fp32")] = 0,
    samples: Annotated[int, Option(min=16, help="timed calls of each artifact")] = 200,
    threads: ThreadsOption = 1,
    quick: Annotated[
        bool,
        Option(
            "--quick",
            help="no search for a calibration method; at most 64 images calibrate, 128 are scored, 50 calls timed",
        ),
    ] = False,
    minutes: Annotated[
        float | None,
        Option(help="time limit: what has not begun by then (methods, artifacts, timing) is left out, and named"),
    ] = None,
    model: ModelOption = None,
    use_ema: UseEmaOption = None,
    img_size: ImgSizeOption = None,
) -> None:
    """Export, verify, evaluate and benchmark artifacts in one folder.

    The folder has a README, a model card and a report beside them. The calibration method of int8 is chosen by a search
    on --data, unless --quick is given.

    The exit status is 1 if an artifact loses more than --max-drop points of top-1 or, without labels, changes more
    than that percentage of the predictions. An artifact is "undecided" if the 95 % interval of its loss contains
    --max-drop. The exit status is then 11 if the loss on these images is above --max-drop (of 10 to 99 images, one may
    be lost), and 0 if it is not. --max-drop 0 judges by these images alone: 1 if the loss is above 0, else 0. Whether
    the images are enough is said before the work.
    """
    with show_progress("deploying"):
        runtimes = parse_runtimes(to)
        check_inputs(source, places=[data, val], runtimes=runtimes, extras=["report"], model=model)
        with show_step("importing PyTorch"):
            from onefold.commands.deploy import deploy as deploy_to

        made = deploy_to(
            source,
            data,
            out=out,
            to=runtimes,
            int8=int8,
            half=half,
            val=val,
            max_drop=max_drop,
            calibrate=calibrate,
            weight_bits=weight_bits,
            per_tensor=per_tensor,
            skip_layers=skip_layers,
            samples=samples,
            threads=threads,
            quick=quick,
            minutes=minutes,
            model=model,
            use_ema=use_ema,
            img_size=img_size,
            say=display.print_line,
        )
    display.print_line(f"wrote {made.folder}")
    if made.recommended is not None:
        display.print_next("predict", made.folder / made.recommended, "PHOTOS")
