"""`onefold export` and `deploy`: parse their arguments and print what was made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from onefold.cli import display
from onefold.cli.options import ImgSizeOption, ModelOption, SourceArgument, ThreadsOption, UseEmaOption, parse_runtimes
from onefold.cli.progress import show_progress
from onefold.runtimes import RUNTIMES


def export(
    source: SourceArgument,
    out: Annotated[Path, Option("--out", "-o", help="the folder for the artifacts")] = Path("artifacts"),
    to: Annotated[str, Option(help=f"runtimes, by comma: {', '.join(RUNTIMES)}")] = "onnx",
    precision: Annotated[str, Option(help="fp32, fp16, bf16, or int8 with --data; no runtime has all")] = "fp32",
    data: Annotated[str | None, Option(help="photos to calibrate int8 with: a folder, or digits")] = None,
    calibrate: Annotated[int, Option(min=2, help="how many photos to take, evenly")] = 200,
    weight_bits: Annotated[
        int, Option(min=7, max=8, help="7 for x86 processors without VNNI, as reduce_range in ONNX Runtime")
    ] = 8,
    per_tensor: Annotated[bool, Option("--per-tensor", help="one scale a weight tensor, for DSPs")] = False,
    model: ModelOption = None,
    use_ema: UseEmaOption = None,
    img_size: ImgSizeOption = None,
    no_fuse: Annotated[bool, Option("--no-fuse", help="export the training network as it is")] = False,
    opset: Annotated[
        int | None, Option(help="ONNX opset, 15 to 20: a lower one for an older ONNX Runtime", show_default="20")
    ] = None,
) -> None:
    """Export to runtimes, fused, with classes, preprocessing and a reference output inside.

    Each artifact is run once: its parity is how far its logits lie from PyTorch's, relative to the largest.
    """
    with show_progress("exporting"):
        from onefold.commands.export import export as export_to

        made = export_to(
            source,
            parse_runtimes(to),
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
    source: SourceArgument,
    data: Annotated[str, Option("--data", "--data-dir", help="photos to calibrate int8 with and to evaluate on")],
    out: Annotated[Path, Option("--out", "-o", help="the folder to make")] = Path("deploy"),
    to: Annotated[str, Option(help="runtimes, by comma")] = "onnx",
    int8: Annotated[bool, Option("--int8", help="int8 artifacts too, where the runtime supports them")] = False,
    half: Annotated[bool, Option("--half", help="fp16 or bf16 artifacts too, where the runtime supports them")] = False,
    val: Annotated[str | None, Option(help="labelled photos to evaluate on, if not those held out of --data")] = None,
    max_drop: Annotated[
        float, Option(min=0.0, help="points of top-1 that an artifact may lose, or of 10 to 99 photos one photo")
    ] = 1.0,
    calibrate: Annotated[int, Option(min=2, help="photos to calibrate with, chosen evenly")] = 200,
    weight_bits: Annotated[int, Option(min=7, max=8, help="7 for x86 processors without VNNI")] = 8,
    per_tensor: Annotated[bool, Option("--per-tensor", help="one scale a weight tensor, for DSPs")] = False,
    skip_layers: Annotated[int, Option(min=0, help="how many of the most sensitive layers stay in fp32")] = 0,
    samples: Annotated[int, Option(min=16, help="timed calls of each")] = 200,
    threads: ThreadsOption = 1,
    quick: Annotated[
        bool,
        Option("--quick", help="calibrates once, with no search, on at most 64 photos; scores 128, times 50 calls"),
    ] = False,
    minutes: Annotated[
        float | None, Option(help="after this time leave out, and name, later candidates, artifacts and the timing")
    ] = None,
    model: ModelOption = None,
    use_ema: UseEmaOption = None,
    img_size: ImgSizeOption = None,
) -> None:
    """Export, verify, evaluate and benchmark artifacts in one folder, with a README, a model card and a report.

    How int8 is calibrated is searched for on --data, unless --quick is given. The exit status is 1 if an artifact loses
    more than --max-drop points of top-1 or, without labels, changes more than that per cent of the predictions; where
    10 to 99 photos are scored, one of them may be lost in any case, unless --max-drop is 0.
    """
    with show_progress("deploying"):
        from onefold.commands.deploy import deploy as deploy_to

        made = deploy_to(
            source,
            data,
            out=out,
            to=parse_runtimes(to),
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
