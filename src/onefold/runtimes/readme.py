"""The README.md inside an artifact: what the model is, how photos are prepared for it, and code that loads it.

What people wrote - names, classes, a licence, a source - goes into text only, escaped so that it cannot leave its line
or start a tag.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from onefold.runtimes.artifact import MANIFEST, Artifact
from onefold.runtimes.loading import CHANNELS_LAST, PLATFORMS, Preparation, code, platforms, preparation

_RUNTIMES = {
    "eager": "PyTorch",
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
    "executorch": "ExecuTorch",
    "litert": "LiteRT",
    "ncnn": "ncnn",
    "coreml": "Core ML",
    "mnn": "MNN",
    "tensorrt": "TensorRT",
    "web": "ONNX Runtime Web",
}
_PRECISIONS = {
    "fp32": "32-bit floating point",
    "fp16": "16-bit floating point",
    "bf16": "computed in bfloat16",
    "int8": "8-bit whole numbers",
}
_CONTENTS = {
    "reference.npz": "the proof: images (B, C, H, W) and PyTorch's logits for them, float32",
}
_KERNELS = {
    "bilinear": "the triangle filter (bilinear, antialiased: widened where it reduces, so that it averages)",
    "bicubic": "the cubic filter (a = -0.5, antialiased: widened where it reduces, so that it averages)",
    "nearest": "the nearest pixel",
}
_MOST_CLASSES = 10
_SEE = "https://github.com/onefold/onefold/blob/main/docs/artifacts.md"


def handbook(artifact: Artifact) -> str:
    """The text of an artifact's README.md; `files` are those that lie beside it."""
    prepared = preparation(artifact)
    chapters = [
        *_head(artifact),
        ("## The model", _table(_facts(artifact))),
        ("## What goes in", _unknown(artifact) if prepared is None else _steps(artifact, prepared)),
        ("## What comes out", _output(artifact)),
        ("## How it was checked", _proof(artifact)),
        *_quantization(artifact),
        ("## Limits", _list(_limits(artifact, prepared))),
        ("## Files", _files(artifact)),
        *_use(artifact, prepared),
    ]
    return "\n\n".join(part for chapter in chapters for part in chapter if part) + "\n"


def _head(artifact: Artifact) -> list[tuple[str, str]]:
    runtime, precision = _called(artifact.runtime, _RUNTIMES), _called(artifact.precision, _PRECISIONS)
    title = f"# {_line(artifact.model)} for {runtime}, {_line(artifact.precision)}"
    what = (
        f"A classifier of images into {artifact.num_classes} classes, for {runtime}, {precision}. It was exported by "
        f"[onefold]({_SEE}); code that runs it without onefold is below."
    )
    parts = [(title, what)]
    if not artifact.fused:
        parts.append(
            ("**It is not fused**: branches that fold into one convolution are still apart. It is slower.", "")
        )
    if artifact.details.get("untrained") is True:
        parts.append(("**Its weights are random** and were never trained: good for timing it, not for use.", ""))
    return parts


def _facts(artifact: Artifact) -> dict[str, str]:
    shape = " x ".join(map(str, artifact.input_shape))
    return {
        "model": artifact.model,
        "runtime": _called(artifact.runtime, _RUNTIMES),
        "precision": f"{artifact.precision}: {_called(artifact.precision, _PRECISIONS)}",
        "structure": "fused: one convolution a unit" if artifact.fused else "NOT FUSED",
        "drift of the fused network": "not measured" if artifact.drift is None else f"{artifact.drift:.1e}, relative",
        "shape of an image": f"{shape} (channels x height x width)",
        "classes": str(artifact.num_classes) + ("" if artifact.classes is not None else ", not named"),
        "licence of the weights": artifact.licence or "not stated",
        "source of the weights": artifact.source or "not stated",
        "made with": ", ".join(f"{name} {version}" for name, version in sorted(artifact.made_with.items())),
        **{name: str(value) for name, value in artifact.details.items() if isinstance(value, str | int | float)},
    }


def _steps(artifact: Artifact, prepared: Preparation) -> str:
    size, short = prepared.size, prepared.short
    colours = "red, green, blue" if prepared.channels == 3 else "grey"
    grey = "(19595 R + 38470 G + 7471 B + 32768) / 65536, rounded down: the photo as one channel"
    steps = [
        "decode the photo to 8-bit RGB; turn it as its EXIF orientation says; put it on white where it is transparent; "
        "pay no heed to its colour profile",
        f"resize it with {_KERNELS[prepared.interpolation]} so that its short side has {short} pixels "
        f"({size} / {prepared.crop_pct:g}, rounded) and its long side long x {short} / short, rounded down",
        f"keep the middle {size} x {size} pixels; the left and upper margins are (side - {size}) / 2, halves rounded "
        "to the even number",
        *([] if prepared.channels == 3 else [grey]),
        f"value / 255, minus {_listed(prepared.mean)}, divided by {_listed(prepared.std)} ({colours})",
    ]
    return f"{_layout(artifact)} Photos become that so:\n\n{_list(steps, numbered=True)}"


def _unknown(artifact: Artifact) -> str:
    told = ", ".join(f"{name} {value}" for name, value in artifact.preprocessing.items())
    return (
        f"{_layout(artifact)} How photos become that was not, or not wholly, said when it was exported"
        f"{_line(f': {told}' if told else '')}. So the code below takes the images of `reference.npz`."
    )


def _layout(artifact: Artifact) -> str:
    channels, height, width = artifact.input_shape
    last = artifact.runtime in CHANNELS_LAST
    shape = (height, width, channels) if last else (channels, height, width)
    kind = "int8 on a grid that is in the file" if last and artifact.precision == "int8" else "float32"
    many = "1" if "images_per_call" in artifact.details or artifact.runtime == "executorch" else "any number"
    return f"Images ({many}, {', '.join(map(str, shape))}), {'NHWC' if last else 'NCHW'}, {kind}."


def _output(artifact: Artifact) -> str:
    kind = "int8 on a grid that is in the file" if artifact.runtime in CHANNELS_LAST else "float32"
    text = f"Logits, {artifact.num_classes} an image, {kind if artifact.precision == 'int8' else 'float32'}; softmax "
    text += "makes them shares. "
    if artifact.classes is None:
        return text + "Nobody named the classes: what is known of them is their number."
    shown = ", ".join(f"{i} {_line(name)}" for i, name in enumerate(artifact.classes[:_MOST_CLASSES]))
    more = f", ... (all of them in `{MANIFEST}`)" if len(artifact.classes) > _MOST_CLASSES else ""
    return f"{text}The classes, in their order: {shown}{more}."


def _proof(artifact: Artifact) -> str:
    parity = artifact.parity
    if parity is None:
        return (
            "It was not run where it was made: that machine cannot run it. `reference.npz` holds images and PyTorch's "
            "logits for them; onefold compares them when it first loads it, and code of yours can."
        )
    return (
        f"On the machine that exported it, its logits for the {parity.images} images of `reference.npz` differed from "
        f"PyTorch's by {parity.difference:.1e} of the largest logit ({parity.tolerance:g} is allowed), and the best "
        f"class was the same for {100 * parity.top1_agreement:g} %. Ask it again on yours: the file holds images "
        "(B, C, H, W) and PyTorch's logits."
    )


def _quantization(artifact: Artifact) -> list[tuple[str, str]]:
    told = artifact.details.get("quantization")
    if not isinstance(told, Mapping):
        return []
    rows = {str(name): str(value) for name, value in told.items() if not isinstance(value, Mapping)}
    layers = told.get("layers")
    after = f"\n\nThe noise of each layer, in decibels, is in `{MANIFEST}`." if isinstance(layers, Mapping) else ""
    return [("## How it was quantized", _table(rows) + after)]


def _limits(artifact: Artifact, prepared: Preparation | None) -> list[str]:
    size = " x ".join(map(str, artifact.input_shape[1:]))
    limits = [
        f"It sees {size} pixels and always answers with one of its classes, also for what is none of them.",
        "What it scores on photos of yours is for you to measure: `onefold eval` does.",
        "Hashes tell damage from health, not friend from foe. Take models from people you trust.",
    ]
    if prepared is not None:
        limits.insert(
            1,
            "The code below reads 8-bit photos; onefold itself also 16-bit grey ones, and of strips longer "
            "than 16 times their width it keeps the middle.",
        )
    if artifact.precision == "int8":
        limits.insert(
            1, "It is a network of 8 bits: its answers are near those of the network it was made from, not the same."
        )
    return limits


def _files(artifact: Artifact) -> str:
    rows = {f"`{name}`": f"{stored.num_bytes:,} bytes" for name, stored in artifact.files.items()}
    told = {f"`{name}`": what for name, what in _CONTENTS.items()}
    rows = {name: f"{size}{f'; {told[name]}' if name in told else ''}" for name, size in rows.items()}
    rows[f"`{MANIFEST}`"] = "all of the above for programs, and the SHA-256 of every file, this one too"
    return _table(rows)


def _use(artifact: Artifact, prepared: Preparation | None) -> list[tuple[str, str]]:
    """A chapter a platform; all but Python's must know how photos are prepared."""
    known = platforms(artifact.runtime)
    chosen = known if prepared is not None else tuple(name for name in known if name == "python")
    if not chosen:
        return [("## Use", "`onefold predict FOLDER PHOTOS`, with the path of this folder.")]
    where = "Run it in this folder, with the path of a photo. It prints the best class and its share."
    return [
        (f"## {PLATFORMS[name]}", f"{where}\n\n{code(artifact, name)}" if name == "python" else code(artifact, name))
        for name in chosen
    ]


def _called(name: str, names: Mapping[str, str]) -> str:
    return names.get(name) or _line(name)


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _list(lines: Iterable[str], *, numbered: bool = False) -> str:
    return "\n".join(f"{f'{i}.' if numbered else '-'} {line}" for i, line in enumerate(lines, 1))


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())])


def _cell(text: str) -> str:
    return _line(text) if not text.startswith("`") else text


def _line(text: str) -> str:
    """A text that stays in its line and its cell, and is shown as it is written."""
    plain = " ".join(text.split()).encode("utf-8", "backslashreplace").decode("utf-8")
    shown = "".join(each if each.isprintable() else "?" for each in plain).replace("<", "&lt;")
    for sign in ("\\", "`", "*", "|", "[", "]"):
        shown = shown.replace(sign, f"\\{sign}")
    return shown
