"""The README.md inside an artifact: what the model is, how photos are preprocessed for it, and code that loads it.

Text that people wrote - names, classes, a licence, a source - goes into prose only, escaped so that it cannot leave its
line or start a tag. Code is made of templates: snippets/<runtime>.<platform>.md, or .<precision>.md where a precision
needs another, in Markdown with @name@ where a value or another file of that folder goes. Only numbers and words of our
own are inserted into code, never text such as the names of classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files

from onefold.runtimes.artifact import MANIFEST_FILE, Artifact

PLATFORMS: dict[str, str] = {
    "python": "Python",
    "cpp": "C++",
    "swift": "Swift",
    "kotlin": "Kotlin",
    "javascript": "JavaScript",
}

_CHANNELS_LAST = ("litert",)

_RUNTIMES = {
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
    "int8": "8-bit integers",
}
_KERNEL_NAMES = {
    "bilinear": "the triangle filter (bilinear, antialiased: widened where it reduces, so that it averages)",
    "bicubic": "the cubic filter (a = -0.5, antialiased: widened where it reduces, so that it averages)",
    "nearest": "the nearest pixel",
}
_DEEP_OPENED = (  # interp clips
    "Image.fromarray(np.interp(np.asarray(Image.open(sys.argv[1]), float), value_range, (0, 255)).round().astype('B'))"
)
_MAX_CLASSES_SHOWN = 10
_DOCS = "https://github.com/onefold/onefold/blob/main/docs/artifacts.md"

# The keys of a manifest's preprocessing, and the variables for them in the Python snippet.
_VARIABLES = {
    "size": "size",
    "crop_pct": "crop",
    "mean": "mean",
    "std": "std",
    "interpolation": "kernel",
    "channels": "channels",
}

# The radius of each interpolation kernel, and its weight at the distance d, as Pillow defines them.
_KERNEL_CODE: dict[str, tuple[str, str]] = {
    "bilinear": ("widen", "1 - d"),
    "bicubic": ("2 * widen", "d < 1 ? (1.5 * d - 2.5) * d * d + 1 : ((2.5 - 0.5 * d) * d - 4) * d + 2"),
    "nearest": ("0.5", "1.0"),
}
_LUMA = "(19595 * {0} + 38470 * {1} + 7471 * {2} + 32768) >> 16"

# The compute mode that code selects for a precision, where the runtime's default would be another one.
_MODES: dict[str, dict[str, str]] = {
    "coreml": {"fp32": "CPU_ONLY", "fp16": "CPU_AND_NE", "int8": "CPU_ONLY"},
    "mnn": {"fp32": "High", "fp16": "Low"},
}

_SWIFT_MODES = {"CPU_ONLY": "cpuOnly", "CPU_AND_NE": "cpuAndNeuralEngine"}

_PLACEHOLDER = re.compile(r"@([a-z_.]+)@")


def render_readme(artifact: Artifact) -> str:
    """Render the text of an artifact's README.md; `artifact.files` are the files beside it."""
    preprocessing = read_preprocessing(artifact)
    sections = [
        *_introduction(artifact),
        ("## The model", _table(_properties(artifact))),
        ("## Input", _unknown_input(artifact) if preprocessing is None else _input(artifact, preprocessing)),
        ("## Output", _output(artifact)),
        ("## How it was checked", _parity(artifact)),
        *_quantization(artifact),
        ("## Limits", _list(_limits(artifact, preprocessing))),
        ("## Files", _files(artifact)),
        *_usage(artifact, preprocessing),
    ]
    return "\n\n".join(part for section in sections for part in section if part) + "\n"


def _introduction(artifact: Artifact) -> list[tuple[str, str]]:
    runtime, precision = _display_name(artifact.runtime, _RUNTIMES), _display_name(artifact.precision, _PRECISIONS)
    title = f"# {_escaped(artifact.model)} for {runtime}, {_escaped(artifact.precision)}"
    what = (
        f"A classifier of images into {artifact.num_classes} classes, for {runtime}, {precision}. It was exported by "
        f"[onefold]({_DOCS}); code that runs it without onefold is below."
    )
    parts = [(title, what)]
    if not artifact.fused:
        parts.append(
            ("**It is not fused**: branches that could be one convolution are still separate. It is slower.", "")
        )
    if artifact.details.get("untrained") is True:
        parts.append(("**Its weights are random** and were never trained: use it to measure latency only.", ""))
    return parts


def _properties(artifact: Artifact) -> dict[str, str]:
    shape = " x ".join(map(str, artifact.input_shape))
    fused = "fused: one convolution per unit" if artifact.fused else "NOT FUSED"
    if artifact.fused and artifact.details.get("left_norms"):
        fused = "partly fused: all but the norms that follow no convolution"
    return {
        "model": artifact.model,
        "runtime": _display_name(artifact.runtime, _RUNTIMES),
        "precision": f"{artifact.precision}: {_display_name(artifact.precision, _PRECISIONS)}",
        "structure": fused,
        "drift of the fused network": "not measured" if artifact.drift is None else f"{artifact.drift:.1e}, relative",
        "shape of an image": f"{shape} (channels x height x width)",
        "classes": str(artifact.num_classes) + ("" if artifact.classes is not None else ", not named"),
        "licence of the weights": artifact.licence or "not stated",
        "source of the weights": artifact.source or "not stated",
        "made with": ", ".join(f"{name} {version}" for name, version in sorted(artifact.made_with.items())),
        **{name: str(value) for name, value in artifact.details.items() if isinstance(value, str | int | float)},
    }


def _input(artifact: Artifact, preprocessing: PreprocessingSpec) -> str:
    size, short = preprocessing.size, preprocessing.short
    colours = "red, green, blue" if preprocessing.channels == 3 else "grey"
    grey = "(19595 R + 38470 G + 7471 B + 32768) / 65536, rounded down: the photo as one channel"
    low, high = preprocessing.value_range or (0, 0)
    deep = (
        f"where its samples have more than 8 bits: (value - {low:g}) / ({high:g} - {low:g}) x 255, rounded, at least 0 "
        "and at most 255"
    )
    steps = [
        *([deep] if preprocessing.value_range else []),
        "decode the photo to 8-bit RGB; turn it as its EXIF orientation says; put it on white where it is transparent; "
        "ignore its colour profile",
        f"resize it with {_KERNEL_NAMES[preprocessing.interpolation]} so that its short side has {short} pixels "
        f"({size} / {preprocessing.crop_pct:g}, rounded) and its long side long x {short} / short, rounded down",
        f"keep the middle {size} x {size} pixels; the left and upper margins are (side - {size}) / 2, halves rounded "
        "to the even number",
        *([] if preprocessing.channels == 3 else [grey]),
        f"value / 255, minus {_joined(preprocessing.mean)}, divided by {_joined(preprocessing.std)} ({colours})",
    ]
    return f"{_layout(artifact)} Preprocess a photo like this:\n\n{_list(steps, numbered=True)}"


def _unknown_input(artifact: Artifact) -> str:
    if artifact.input_shape[0] not in (1, 3):
        return (
            f"{_layout(artifact)} Photos have no {artifact.input_shape[0]} channels: how images are prepared for it is "
            "with who trained it. So the code below uses the images of `reference.npz`."
        )
    known = ", ".join(f"{name} {value}" for name, value in artifact.preprocessing.items())
    return (
        f"{_layout(artifact)} The preprocessing of photos was not, or not completely, stated at the export"
        f"{_escaped(f': {known}' if known else '')}. So the code below uses the images of `reference.npz`."
    )


def _layout(artifact: Artifact) -> str:
    channels, height, width = artifact.input_shape
    last = artifact.runtime in _CHANNELS_LAST
    shape = (height, width, channels) if last else (channels, height, width)
    kind = "int8, whose scale and zero point are in the file" if last and artifact.precision == "int8" else "float32"
    many = "1" if "images_per_call" in artifact.details or artifact.runtime == "executorch" else "any number"
    return f"Images ({many}, {', '.join(map(str, shape))}), {'NHWC' if last else 'NCHW'}, {kind}."


def _output(artifact: Artifact) -> str:
    kind = "int8, whose scale and zero point are in the file" if artifact.runtime in _CHANNELS_LAST else "float32"
    text = f"Logits, {artifact.num_classes} per image, {kind if artifact.precision == 'int8' else 'float32'}; softmax "
    text += "makes them probabilities. "
    if artifact.classes is None:
        return text + "The classes have no names, only numbers."
    shown = ", ".join(f"{i} {_escaped(name)}" for i, name in enumerate(artifact.classes[:_MAX_CLASSES_SHOWN]))
    more = f", ... (all of them in `{MANIFEST_FILE}`)" if len(artifact.classes) > _MAX_CLASSES_SHOWN else ""
    return f"{text}The classes, in their order: {shown}{more}."


def _parity(artifact: Artifact) -> str:
    parity = artifact.parity
    if parity is None:
        return (
            "It was not run on the machine that exported it, which has no such runtime. `reference.npz` holds images "
            "and PyTorch's logits for them; onefold compares them when it loads the artifact, and your code can."
        )
    allowed = f"{parity.tolerance:g} is allowed"
    if artifact.details.get("untrained") is True and artifact.precision == "int8":
        allowed = "this is not judged, since the weights are random"
    return (
        f"On the machine that exported it, its logits for the {parity.images} images of `reference.npz` differed from "
        f"those of {artifact.compared_with} by {parity.difference:.1e} of the largest logit ({allowed}), and the top "
        f"class was the same for {100 * parity.top1_agreement:g} %. Repeat it on your machine: the file holds images "
        "(B, C, H, W) and PyTorch's logits."
    )


def _quantization(artifact: Artifact) -> list[tuple[str, str]]:
    quantization = artifact.details.get("quantization")
    if not isinstance(quantization, Mapping):
        return []
    rows = {str(name): str(value) for name, value in quantization.items() if not isinstance(value, Mapping)}
    has_layers = isinstance(quantization.get("layers"), Mapping)
    note = f"\n\nThe signal-to-noise ratio of each layer, in decibels, is in `{MANIFEST_FILE}`." if has_layers else ""
    return [("## How it was quantized", _table(rows) + note)]


def _limits(artifact: Artifact, preprocessing: PreprocessingSpec | None) -> list[str]:
    size = " x ".join(map(str, artifact.input_shape[1:]))
    limits = [
        f"Its input is {size} pixels, and its answer is always one of its classes, even for an image of none of them.",
        "Measure its accuracy on your own photos: `onefold eval` does.",
        "Hashes detect damage, not malice. Take models from people you trust.",
    ]
    if preprocessing is not None:
        reads = "8-bit photos" + (" (that for Python: of more bits too)" if preprocessing.value_range else "")
        limits.insert(
            1,
            f"The code below reads {reads}; onefold itself also 16-bit grey ones, and of strips longer "
            "than 16 times their width it keeps the middle.",
        )
    if artifact.precision == "int8":
        limits.insert(
            1, "It is an int8 model: its logits are close to those of the float model it was made from, not equal."
        )
    return limits


def _files(artifact: Artifact) -> str:
    rows = {f"`{name}`": f"{stored.num_bytes:,} bytes" for name, stored in artifact.files.items()}
    if "`reference.npz`" in rows:
        rows["`reference.npz`"] += "; images (B, C, H, W) and PyTorch's logits for them, float32"
    rows[f"`{MANIFEST_FILE}`"] = "all of the above for programs, and the SHA-256 of every file, including this one"
    return _table(rows)


def _usage(artifact: Artifact, preprocessing: PreprocessingSpec | None) -> list[tuple[str, str]]:
    """Make one section per platform; without a complete preprocessing only Python's, which can use the reference."""
    available = list_platforms(artifact.runtime)
    chosen = available if preprocessing is not None else tuple(name for name in available if name == "python")
    if not chosen:
        return [("## Use", "`onefold predict FOLDER PHOTOS`, with the path of this folder.")]
    instruction = "Run it in this folder, with the path of a photo. It prints the top class and its probability."
    before = dict.fromkeys(chosen, "") | {"python": f"{instruction}\n\n"}
    if preprocessing is not None and preprocessing.value_range:
        low, high = preprocessing.value_range
        deep = (
            f"This code takes 8-bit pictures and does not apply the network's value range, {low:g} to {high:g}: make "
            "such pictures of samples with more than 8 bits first, as step 1 of Input says.\n\n"
        )
        before |= {name: deep for name in chosen if name != "python"}
    return [(f"## {PLATFORMS[name]}", before[name] + render_code(artifact, name)) for name in chosen]


def _display_name(name: str, names: Mapping[str, str]) -> str:
    return names.get(name) or _escaped(name)


def _joined(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _list(lines: Iterable[str], *, numbered: bool = False) -> str:
    return "\n".join(f"{f'{i}.' if numbered else '-'} {line}" for i, line in enumerate(lines, 1))


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())])


def _cell(text: str) -> str:
    return _escaped(text) if not text.startswith("`") else text


def _escaped(text: str) -> str:
    """Escape text that people wrote, so that it stays in its line and table cell and starts no Markdown or HTML."""
    plain = " ".join(text.split()).encode("utf-8", "backslashreplace").decode("utf-8")
    escaped = "".join(char if char.isprintable() else "?" for char in plain).replace("<", "&lt;")
    for char in ("\\", "`", "*", "|", "[", "]"):
        escaped = escaped.replace(char, f"\\{char}")
    return escaped


# ------------------------------------------------------------------------------ code from templates


@dataclass(frozen=True, kw_only=True)
class PreprocessingSpec:
    """A complete preprocessing, as the manifest states it; `order` is the order of its keys there."""

    order: tuple[str, ...]
    size: int
    crop_pct: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    channels: int
    value_range: tuple[float, ...]  # of samples with more than 8 bits: two numbers, or none

    @property
    def short(self) -> int:
        """The short side of a photo in pixels after resizing, before the crop."""
        return round(self.size / self.crop_pct)


def read_preprocessing(artifact: Artifact) -> PreprocessingSpec | None:
    """Read an artifact's preprocessing; None where it is incomplete, or does not fit the input shape."""
    stated = artifact.preprocessing
    if set(stated) - {"value_range"} != set(_VARIABLES):
        return None
    value_range = _floats(stated.get("value_range"))
    spec = PreprocessingSpec(
        order=tuple(stated),
        size=artifact.input_shape[1],
        crop_pct=(*_floats([stated["crop_pct"]]), 0.0)[0],
        mean=_floats(stated["mean"]),
        std=_floats(stated["std"]),
        interpolation=str(stated["interpolation"]),
        channels=artifact.input_shape[0],
        value_range=value_range,
    )
    is_valid = (
        (stated["channels"], stated["size"], stated["size"]) == artifact.input_shape
        and spec.channels in (1, 3)
        and 0 < spec.crop_pct <= 1
        and len(spec.mean) == len(spec.std) == spec.channels
        and min(spec.std) > 0
        and spec.interpolation in _KERNEL_CODE
        and (not value_range or (len(value_range) == 2 and value_range[0] < value_range[1]))
        and bool(value_range) == ("value_range" in stated)
    )
    return spec if is_valid else None


def list_platforms(runtime: str) -> tuple[str, ...]:
    """List the platforms that have a template; none for an unknown runtime."""
    return tuple(platform for platform in PLATFORMS if _template(f"{runtime}.{platform}") is not None)


def render_code(artifact: Artifact, platform: str) -> str:
    """Render the Markdown that shows how to use the artifact on one of the platforms of `list_platforms`."""
    name = f"{artifact.runtime}.{platform}"
    text = _template(f"{name}.{artifact.precision}") or _template(name)
    assert text is not None, f"there is no snippets/{name}.md"
    channels, height, width = artifact.input_shape
    modes = _MODES.get(artifact.runtime, {"": ""})
    mode = modes.get(artifact.precision, min(modes.values()))
    preprocessing = read_preprocessing(artifact)
    values = {
        "channels": str(channels),
        "height": str(height),
        "width": str(width),
        "num_classes": str(artifact.num_classes),
        "mode": mode,
        "mode_swift": _SWIFT_MODES.get(mode, ""),
        "answer": "@class_names.python@" if artifact.classes is not None else "@class_numbers.python@",
        "photo": "@reference_input.python@" if preprocessing is None else "@photo.python@",
    }
    if preprocessing is not None:
        values |= _preprocessing_values(preprocessing, channels_last=artifact.runtime in _CHANNELS_LAST)
    return _fill_in(text, values).rstrip()


def _preprocessing_values(spec: PreprocessingSpec, *, channels_last: bool) -> dict[str, str]:
    """Write a preprocessing as expressions of the templates' languages."""
    size, channels = spec.size, spec.channels
    radius, weight = _KERNEL_CODE[spec.interpolation]
    # Kotlin has no ternary operator: "test ? yes : no" becomes "if (test) yes else no".
    yes, _, no = weight.partition(" : ")
    test, _, yes = yes.rpartition(" ? ")
    is_rgb = channels == 3
    return {
        "names": ", ".join(_VARIABLES.get(key, key) for key in spec.order),
        "opened": _DEEP_OPENED if spec.value_range else "Image.open(sys.argv[1])",
        "grey": "" if is_rgb else '.convert("L")',
        "size": str(size),
        "short": str(spec.short),
        "mean": ", ".join(map(repr, spec.mean)),
        "std": ", ".join(map(repr, spec.std)),
        "index": f"(i * {size} + j) * {channels} + c" if channels_last else f"(c * {size} + i) * {size} + j",
        "level": "p[c]" if is_rgb else _LUMA.format("p[0]", "p[1]", "p[2]"),
        "level_kotlin": "p[c]" if is_rgb else f"({_LUMA.format('p[0]', 'p[1]', 'p[2]')})".replace(">>", "shr"),
        "radius": radius,
        "weight": weight,
        "weight_kotlin": f"if ({test}) {yes} else {no}" if test else weight,
    }


def _fill_in(text: str, values: Mapping[str, str]) -> str:
    """Replace every placeholder, including those inside what is inserted."""

    def replacement(match: re.Match[str]) -> str:
        value = values[match[1]] if match[1] in values else _template(match[1])
        assert value is not None, f"a template has @{match[1]}@: no such value, and no snippets/{match[1]}.md"
        return _fill_in(value.rstrip("\n"), values)

    return _PLACEHOLDER.sub(replacement, text)


def _template(name: str) -> str | None:
    path = files("onefold.runtimes") / "snippets" / f"{name}.md"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _floats(value: object) -> tuple[float, ...]:
    """Read a list of numbers; empty where it is no list, or holds anything else."""
    if not isinstance(value, list | tuple):
        return ()
    numbers = [item for item in value if isinstance(item, int | float) and not isinstance(item, bool)]
    return tuple(map(float, numbers)) if len(numbers) == len(value) else ()
