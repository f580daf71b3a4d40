"""What a trainer wrote beside the weights, in a checkpoint or in config.json: names of classes, preprocessing.

Values come from the restricted reader, so that objects are `UnpickledObject`s; `_plain_value` gives what some of them
stand for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from onefold.file_io import normalize_class_name, parse_json
from onefold.models.restricted_unpickler import Unordered, UnpickledObject, iter_objects
from onefold.models.state_dicts import NON_WEIGHT_KEYS, is_tensor
from onefold.models.weights_file import MMENGINE_PATTERN

NUM_IMAGENET_CLASSES = 1000  # classes
_MAX_SHOWN = 3  # names in a message
_MAX_NESTING, _MAX_MAPPINGS, _MAX_TEXT = 4, 2000, 16 << 20  # where names are looked for; bytes, of which
# the names of 21,841 classes make one million
_MAX_LICENCE = 200  # characters
_MAX_DEPTH = 8  # of what stands under a name
_NUMBER = re.compile(r"[0-9]{1,7}")

# Keys without underscores, in small letters, and with "to" for 2.
_NAMES = (
    *("classes", "classnames", "labelnames", "names", "labels", "categories", "idxtoclass", "idtolabel", "idtoclass"),
    *("idxtolabel", "indextoclass", "inttolabel", "classlist", "classlabels", "labellist", "targetnames", "vocab"),
)
_NUMBERS = ("classtoidx", "labeltoid", "labeltoidx", "classtoid", "classtoindex", "labelmap")
_METRICS = frozenset(
    ("acc", "acc1", "acc5", "accuracy", "loss", "top", "top1", "top5", "f1", "auc", "auroc", "ap", "map")
)
_METRICS |= {"precision", "recall", "error", "lr", "epoch", "step", "mse", "mae", "miou", "iou", "perplexity"}
_PARAMETER = re.compile(r"\w\.(weight|bias|running_mean|running_var|num_batches_tracked)$")
_FILE = re.compile(r"\.(png|jpe?g|bmp|webp|gif|tiff?|pth?|onnx|csv|json)$", re.IGNORECASE)
_TEXT_SEPARATORS = ("\n", ";", "|", ",")  # of names in one text


def find_class_names(
    values: Mapping[str, object], num_classes: int, remarks: list[str] | None = None
) -> tuple[str, ...] | None:
    """The names of so many classes, in NFC and the order of the logits, wherever a trainer wrote them; None if nowhere.

    They are lists under the names of `_NAMES`, mappings from number to name there or from name to number under those of
    `_NUMBERS`, COCO's categories, or texts with one name after another; at most four mappings deep, or JSON of one in a
    header. TensorFlow's background class is left off. Where two of them say different orders, the one that has numbers
    is taken. `remarks` gets a sentence on what was assumed, and where there are no names on what looked like some and
    was not taken.
    """
    queue: list[tuple[int, object]] = [(0, values)]
    seen: set[int] = set()  # a forged mapping contains itself, as often as it likes
    refused: list[str] = []
    found: list[tuple[str, tuple[str, ...], list[str]]] = []
    for depth, value in queue:  # grows
        mapping = value if isinstance(value, Mapping) else value.values if isinstance(value, UnpickledObject) else {}
        normalized = {str(key).lower().replace("_", "").replace("2", "to"): key for key in mapping}
        for word in (*_NAMES, *_NUMBERS):
            if word not in normalized:
                continue
            key, said = normalized[word], list[str]()
            names = _names_of(_plain_value(mapping[key]), num_classes, word in _NUMBERS, said)
            sentences = [f"its {key} {sentence}" for sentence in said]
            if names is None:
                refused += sentences
            else:
                found.append((str(key), names, sentences))
        for key, inner in mapping.items() if depth < _MAX_NESTING else ():
            if NON_WEIGHT_KEYS.search(str(key)):
                continue  # an optimizer's names are of its groups, and a logger's of what it measures
            if isinstance(inner, (Mapping, UnpickledObject)) and id(inner) not in seen and len(queue) < _MAX_MAPPINGS:
                seen.add(id(inner))
                queue.append((depth + 1, inner))
    said = refused[:_MAX_SHOWN]
    if found:
        first = found[0]
        others = [each for each in found if each[1] != first[1] and sorted(each[1]) == sorted(first[1])]
        numbered = [each for each in others if "to" in each[0].lower().replace("2", "to")]
        taken = numbered[0] if numbered else first
        other = first if numbered else others[0] if others else None
        said = taken[2]
        different = next((each for each in found if sorted(each[1]) != sorted(taken[1])), None)
        if different is not None and other is None:
            others_said = f"its {different[0]} ({_first(different[1])}) has others"
            said = [f"its {taken[0]} ({_first(taken[1])}) is taken, and {others_said}", *said]
        if other is not None:
            said = [f"its {taken[0]} ({_first(taken[1])}) is taken, and its {other[0]} has another order", *said]
    if remarks is not None:
        remarks += said
    return taken[1] if found else None


def _plain_value(value: object) -> object:
    """Give the list, mapping, text or number that a placeholder stands for, in lists and mappings too.

    They are numpy's arrays of texts and of objects, its texts, and OmegaConf's nodes, lists and mappings.
    """
    return _plain(value, {}, 0)


def _plain(value: object, known: dict[int, tuple[object, object]], depth: int) -> object:
    """Do the same; `known` has what was made of each object, since a forged file may hold one in itself, or often."""
    if isinstance(value, bytes) and len(value) < _MAX_TEXT:
        with suppress(ValueError):
            return value.decode()
    if not isinstance(value, (list, tuple, Mapping, UnpickledObject)) or depth > _MAX_DEPTH:
        return value
    if id(value) not in known:
        known[id(value)] = value, value
        made: object = value
        if isinstance(value, UnpickledObject):
            made = _plain(_of_placeholder(value), known, depth + 1)
        elif isinstance(value, Mapping):
            keys = ((_integer(_plain(key, known, depth + 1)), key) for key in value)
            made = {
                (name if isinstance(name, (str, int)) else key): _integer(_plain(value[key], known, depth + 1))
                for name, key in keys
            }
        else:
            kind = Unordered if isinstance(value, Unordered) else list
            made = kind(_plain(each, known, depth + 1) for each in value)
        known[id(value)] = value, made
    return known[id(value)][1]


def _integer(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _of_placeholder(value: UnpickledObject) -> object:
    for part in ("_content", "_val"):  # OmegaConf's
        if part in value.values:
            return value.values[part]
    with suppress(TypeError, ValueError, IndexError, AttributeError):
        if value.name == "numpy's scalar":
            return _texts(*value.args)[0]
        if value.name.endswith("multiarray._reconstruct"):
            _, _, kind, _, data = value.state
            return data if isinstance(data, list) else _texts(kind, data)
        if value.name.endswith("numeric._frombuffer"):
            return _texts(value.args[1], value.args[0])
    return value.values or value.elements


def _texts(kind: Any, data: Any) -> list[str]:
    """The texts in the bytes of an array of numpy's type U. Raises ValueError for any other."""
    code = kind.args[0] if isinstance(kind, UnpickledObject) and kind.name == "numpy.dtype" and kind.args else ""
    if not isinstance(code, str) or re.fullmatch(r"[<>]?U[1-9][0-9]{0,4}", code) is None:
        raise ValueError("not an array of texts")
    order: Any = kind.state[1] if isinstance(kind.state, tuple) and kind.state[1] in ("<", ">") else "="
    raw = data.encode("latin-1") if isinstance(data, str) else bytes(data)
    return [str(text) for text in np.frombuffer(raw, np.dtype(code.lstrip("<>")).newbyteorder(order))]


def _names_of(given: object, num_classes: int, by_name: bool, remarks: list[str]) -> tuple[str, ...] | None:
    """One text for each class; None where `given` is anything else. What is assumed or refused is in `remarks`."""
    assumed = ""
    if isinstance(given, Unordered):
        if len(given) == num_classes:
            remarks.append(f"({_first(sorted(map(str, given)))}) are not used: they are a set, which has no order")
        return None
    if isinstance(given, str) and len(given) < _MAX_TEXT:
        given = _from_text(given, num_classes)
    is_coco = isinstance(given, (list, tuple)) and all(isinstance(each, Mapping) and "id" in each for each in given)
    if is_coco and isinstance(given, (list, tuple)):
        given = {each["id"]: each.get("name") for each in given}
    if isinstance(given, Mapping):
        by_name = by_name or not all(_NUMBER.fullmatch(str(key)) for key in given)
        pairs = ((value, key) if by_name else (key, value) for key, value in given.items())
        table = {int(str(number)): name for number, name in pairs if _NUMBER.fullmatch(str(number))}
        if len(table) < len(given) or not table:
            if by_name and len(given) == num_classes and any(map(is_tensor, given.values())):
                remarks.append(f"({_first(map(str, given))}) are not used: their numbers are tensors, not integers")
            return None
        numbers = sorted(table)
        if numbers == list(range(1, len(table) + 1)):
            assumed = "are numbered from 1: the first is taken for output 0"
        elif is_coco and numbers != list(range(len(table))):
            assumed = f"have the ids {numbers[0]} to {numbers[-1]} with gaps: they are taken in the ids' order"
        elif numbers != list(range(len(table))):
            remarks.append(
                f"({_first(map(str, table.values()))}) are not used: their numbers are not 0 to {len(table) - 1}"
            )
            return None
        given = [table[number] for number in numbers]
    if isinstance(given, (list, tuple)) and given and all(map(_is_id_and_name, given)):  # ["n01440764", "tench"]
        given = [name for _, name in given]
    if not isinstance(given, (list, tuple)) or not all(type(name) in (str, int) and name != "" for name in given):
        if isinstance(given, (list, tuple)) and len(given) == num_classes and any(type(n) is str for n in given):
            remarks.append("are not used: some of them are empty, or no text")
        return None
    if any(type(name) is int for name in given) and len(set(given)) < len(given):
        return None  # the labels of some images
    names = [normalize_class_name(str(name)) for name in given]
    for pattern, what in ((_PARAMETER, "parameters"), (_FILE, "files")):
        if len(names) > 1 and all(map(pattern.search, names)):
            remarks.append(f"({_first(names)}) are not used: they name {what}, not classes")
            return None
    words = [set(re.split(r"[^a-z0-9]+", name.lower())) for name in names]
    if 2 * sum(bool(each & _METRICS) for each in words) > len(names) > 1:
        remarks.append(f"({_first(names)}) are not used: they name metrics, not classes")
        return None
    names = names[1:] if len(names) == num_classes + 1 == NUM_IMAGENET_CLASSES + 1 else names
    if len(names) != num_classes:
        if len(names) > 1 and any(type(name) is str for name in given):
            remarks.append(
                f"({_first(names)}) are not used: they are {len(names)}, of a network with {num_classes} outputs"
            )
        return None
    remarks += [f"({_first(names)}) {assumed}"] if assumed else []
    if double := sorted(name for name, count in Counter(names).items() if count > 1):
        remarks.append(f"call several outputs alike ({_first(double)}): which of them is which cannot be told by name")
    return tuple(names)


def _is_id_and_name(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(type(text) is str for text in value)


def _from_text(text: str, num_classes: int) -> object:
    """Read a text that is JSON, or so many names one after another; what is neither is None."""
    if text[:1] in ("[", "{"):
        try:
            return parse_json(text)
        except ValueError:
            return None
    parts = ([part.strip() for part in text.strip().split(separator)] for separator in _TEXT_SEPARATORS)
    return next((names for names in parts if len(names) == num_classes > 1), None)


def _first(names: Iterable[str]) -> str:
    shown = [name if len(name) <= 60 else f"{name[:57]}..." for name in names]
    return ", ".join(shown[:_MAX_SHOWN]) + (", ..." if len(shown) > _MAX_SHOWN else "")


def find_preprocessing(extras: Mapping[str, object]) -> dict[str, Any]:
    """What a trainer's arguments or configuration in a checkpoint say of preprocessing, as keys of a config.json."""
    for found in iter_objects({key: extras[key] for key in extras if not NON_WEIGHT_KEYS.search(str(key))}):
        values = found.values if isinstance(found, UnpickledObject) else found
        for key, inner in values.items() if isinstance(values, Mapping) else ():
            if isinstance(inner, str) and MMENGINE_PATTERN.search(inner[:_MAX_TEXT]):
                return {"data_preprocessor": inner[:_MAX_TEXT]}  # mmengine keeps its configuration as Python's text
            inner = inner.values if isinstance(inner, UnpickledObject) else inner
            if key in ("data_preprocessor", "img_norm_cfg") and isinstance(inner, Mapping):
                return {"data_preprocessor": inner}
    for key in ("pretrained_cfg", "default_cfg"):  # timm's own, also as JSON in the header of a safetensors file
        given = extras.get(key)
        with suppress(ValueError):
            given = parse_json(given) if isinstance(given, str) and len(given) < _MAX_TEXT else given
        given = given.values if isinstance(given, UnpickledObject) else given
        if isinstance(given, Mapping) and given:
            return {"pretrained_cfg": given}
    for key in ("args", "config", "hyper_parameters", "hparams", "opt"):
        given = extras.get(key)
        table = given.values if isinstance(given, UnpickledObject) else given
        if not isinstance(table, Mapping):
            continue
        keys = ("mean", "std", "crop_pct", "crop_mode", "interpolation", "input_size")
        stated = {key: table[key] for key in keys if table.get(key) is not None}
        sizes = (table.get(key) for key in ("val_crop_size", "img_size", "image_size"))
        size, resized = next((size for size in sizes if size is not None), None), table.get("val_resize_size")
        if isinstance(size, (int, list, tuple)) and "input_size" not in stated:
            stated["input_size"] = size
        if isinstance(size, int) and isinstance(resized, int) and resized:  # torchvision's
            stated["crop_pct"] = size / resized
        if stated:
            return {"pretrained_cfg": stated}
    return {}


def find_licence(extras: Mapping[str, object]) -> str:
    """The licence that a checkpoint or the header of a safetensors file states, in one line; empty where none is."""
    stated = next((extras[key] for key in ("license", "licence") if isinstance(extras.get(key), str)), "")
    return " ".join(str(stated)[:_MAX_LICENCE].split())


def adapt_preprocessing_to_channels(preprocessing: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Give the preprocessing for so many channels; for other than are stated by the averages of their mean and std.

    The catalogue states those of colours, and so do timm's configurations of networks for grey images.
    """
    made = {**preprocessing, "channels": channels}
    other = {key: made[key] for key in ("mean", "std") if len(made.get(key, ())) not in (0, channels)}
    return made | {key: (sum(values) / len(values),) * channels for key, values in other.items()}
