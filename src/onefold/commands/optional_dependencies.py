"""The optional packages that a command needs: found from its arguments before its work, named with one command."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec

from onefold.commands.predictor import is_timm
from onefold.data.remote_files import OBJECT_STORE_PREFIXES
from onefold.errors import MissingExtra
from onefold.report.format import join_words
from onefold.runtimes import tensorrt

_REQUIREMENT = re.compile(r"(?P<package>[\w.-]+).*\bextra\s*==\s*['\"](?P<extra>[\w.-]+)['\"]")


def require_extras(wanted: Iterable[str]) -> None:
    """Raise MissingExtra where packages of these extras are not installed: it names all, and one command."""
    lacking = {extra: packages for extra in dict.fromkeys(wanted) if (packages := missing_packages(extra))}
    if lacking.get("tensorrt") == ["tensorrt"] and tensorrt.unavailable_reason():
        del lacking["tensorrt"]  # without a GPU it is exported all the same, and runs elsewhere
    if lacking:
        names = list(dict.fromkeys(name for packages in lacking.values() for name in packages))
        raise MissingExtra(
            f"{join_words(names)} {'is' if len(names) == 1 else 'are'} needed and not installed", *lacking
        )


def missing_packages(extra: str) -> list[str]:
    """The packages of an extra that are not installed; none where onefold itself is not, as in a source tree."""
    return [package for package in packages_by_extra().get(extra, []) if not _is_installed(package)]


def packages_by_extra() -> dict[str, list[str]]:
    """The packages of each extra, as this installation's metadata state them."""
    found: dict[str, list[str]] = {}
    try:
        stated = metadata.requires("onefold") or []
    except metadata.PackageNotFoundError:
        return found
    for match in filter(None, map(_REQUIREMENT.match, stated)):
        found.setdefault(match["extra"], []).append(match["package"])
    return found


def extras_for_sources(*sources: object) -> list[str]:
    """The extras that places of images and sources of networks need, as far as their names say."""
    found = []
    for source in sources:
        text = os.fspath(source) if isinstance(source, str | os.PathLike) else ""
        if text == "digits":
            found.append("digits")
        elif is_timm(text):
            found.append("timm")
        elif text.startswith(OBJECT_STORE_PREFIXES):
            found.append("cloud")
        if text.endswith(".parquet"):
            found.append("parquet")
    return found


def _is_installed(package: str) -> bool:
    """Whether there is a distribution of this name, or a module: onnxruntime-gpu has onnxruntime's."""
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return find_spec(package.replace("-", "_")) is not None
