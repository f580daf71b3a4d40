"""Opening an artifact that this user did not export in a process of its own first, with bounds on its time and memory.

A manifest's checksums say nothing of its author, and vendors' parsers end the process by a signal for some forged
files, ask for all memory, or never end. So such an artifact is opened, and answers its reference images, in a child
process; only when that went well it is opened here. A marker in the cache folder remembers the digest of its files and
the versions of its runtime, so that this is done once. What `export` wrote here has its marker already.
"""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from onefold.errors import BadArtifact, OnefoldError, describe_exit_status
from onefold.file_io import cache_folder
from onefold.runtimes.artifact import Artifact, read_manifest
from onefold.runtimes.base import import_runtime, installed_versions

_LIMIT_S, _LIMIT_CPU_S = 60, 20  # a busy machine may take longer than its processors do
_LIMIT_BYTES, _LIMIT_TIMES = 2 << 30, 16  # of memory for its data; what an artifact of usual size may take of its own

_log = logging.getLogger("onefold")


def mark_as_trusted(artifact: Artifact) -> None:
    """Remember that this artifact may be opened in this process."""
    try:
        marker = _marker(artifact)
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        _log.warning("%s is tried in a process of its own each time: %s", artifact.folder, error)


def open_in_child_first(artifact: Artifact) -> None:
    """Open an artifact in a child process unless it is known. Raises BadArtifact where that fails, or does not end."""
    with suppress(OSError):
        if _marker(artifact).exists():
            return
    command = [sys.executable, "-c", "from onefold.runtimes.sandbox import main; main()"]
    command += [str(artifact.folder), _digest(artifact), str(_LIMIT_CPU_S)]
    what = f"{artifact.folder} is not opened: {artifact.runtime}, in a process of its own,"
    hint = "it is damaged or forged; export the model again"
    try:
        child = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise BadArtifact(f"{what} did not answer within {_LIMIT_S} s; {hint}") from error
    if child.returncode == 0:
        mark_as_trusted(artifact)
    elif child.returncode == BadArtifact.exit_status:
        raise BadArtifact(child.stdout.decode(errors="replace").strip().splitlines()[-1])
    elif child.returncode != _OTHER_ERROR:  # that one is raised here again, where its cause can be seen
        raise BadArtifact(f"{what} {_end_of(child.returncode)}; {hint}")


def main() -> None:
    """What the child process runs: an artifact's folder and digest, and the seconds it has, are on its command line."""
    from onefold.runtimes.exporter import open_session

    _limit_resources(Path(sys.argv[1]), int(sys.argv[3]))
    try:
        artifact = read_manifest(Path(sys.argv[1]))
        if _digest(artifact) != sys.argv[2]:
            raise BadArtifact(f"{artifact.folder} changed while it was opened; open it again")
        open_session(artifact, threads=1).close()
    except BadArtifact as error:
        print(" ".join(str(error).split()))  # noqa: T201  # to the parent
        raise SystemExit(BadArtifact.exit_status) from error
    except OnefoldError as error:
        raise SystemExit(_OTHER_ERROR) from error
    sys.stdout.flush()
    raise SystemExit(0)


_OTHER_ERROR = 3


def _limit_resources(folder: Path, cpu_s: int) -> None:
    """Bound the memory for data and the time of processors of this process, where the system can do that."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    num_bytes = _LIMIT_BYTES + _LIMIT_TIMES * sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    for name, limit in (("RLIMIT_DATA", num_bytes), ("RLIMIT_CPU", cpu_s), ("RLIMIT_CORE", 0)):
        with suppress(AttributeError, OSError, ValueError):
            which = getattr(resource, name)
            _, hard = resource.getrlimit(which)
            resource.setrlimit(which, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _end_of(status: int) -> str:
    if -status == getattr(signal, "SIGXCPU", None):
        return f"used more than {_LIMIT_CPU_S} s of a processor's time"
    return describe_exit_status(status)


def _marker(artifact: Artifact) -> Path:
    return cache_folder() / "opened" / _digest(artifact)


def _digest(artifact: Artifact) -> str:
    """The SHA-256 of what an artifact makes its runtime do: its files, how they are opened, and by which versions."""
    versions = installed_versions(("onefold", *import_runtime(artifact.runtime).PACKAGES))
    files = {name: stored.sha256 for name, stored in sorted(artifact.files.items())}
    what = [artifact.runtime, artifact.precision, artifact.input_shape, files, versions]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()
