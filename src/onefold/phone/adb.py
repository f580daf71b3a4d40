"""Every call of adb: a list of arguments, never a line for a shell, with a limit on its time.

`adb shell` joins what it is given and hands it to a shell on the phone, so a remote command is quoted here, once.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onefold.errors import BadArgument, DeviceFailed, MissingExtra, NotWritable

PHONE_FOLDER = "/data/local/tmp/onefold"
"""Where everything of ours lies on the phone: a place where the shell's user may write and execute."""

_QUICK_S = 30.0
_SPARE_KIB = 1024
_SECONDS_A_MIB = 2.0  # of a push over a slow cable or wireless
_GONE = re.compile(
    r"^(?:adb: |error: )*(?:device (?:'.*' )?(?:not found|offline|unauthorized|still authorizing)|no devices|closed"
    r"|protocol fault|failed to get feature set|device disconnected|connect(?:ion)? (?:reset|refused))",
    re.MULTILINE,
)


@dataclass(frozen=True, kw_only=True)
class _CommandResult:
    """What a command left: its exit status, and what it wrote."""

    status: int
    output: str
    errors: str

    @property
    def last_words(self) -> str:
        """The last line that it wrote, for a message."""
        lines = [line.strip() for line in (self.errors + "\n" + self.output).splitlines() if line.strip()]
        errors = [line.strip() for line in self.errors.splitlines() if line.strip()]
        return (errors or lines or ["it wrote nothing"])[-1][-200:]  # what went wrong stands at the end


@dataclass(frozen=True, kw_only=True)
class Adb:
    """One phone, by its serial."""

    serial: str

    def shell(self, command: Sequence[str], *, timeout_s: float = _QUICK_S) -> _CommandResult:
        """Run a command on the phone, whatever its status. Raises DeviceFailed where phone or time runs out."""
        ran = _adb(["-s", self.serial, "shell", shlex.join(command)], timeout_s)
        if ran.status != 0 and (_GONE.search(ran.errors) or (ran.status == 255 and not self._is_there())):
            raise DeviceFailed(
                f"the phone {self.serial} went away ({ran.last_words}): check the cable, and start again"
            )
        return ran

    def shell_output(self, *command: str) -> str:
        """What a command writes; empty where it fails."""
        ran = self.shell(command)
        return ran.output if ran.status == 0 else ""

    def read(self, remote: str) -> bytes | None:
        """The bytes of a file of the phone; None where it has none of this name."""
        if self.shell(["test", "-f", remote]).status != 0:
            return None
        return _bytes(["-s", self.serial, "exec-out", shlex.join(["cat", remote])])

    def push(self, local: Path, remote: str, sha256: str) -> None:
        """Put a file on the phone, unless it is there already; its hash is compared there. Raises NotWritable."""
        if self.remote_sha256(remote) == sha256:
            return
        self._make_room(local, remote)
        size = local.stat().st_size
        timeout_s = _QUICK_S + _SECONDS_A_MIB * size / 2**20
        ran = _adb(["-s", self.serial, "push", str(local.absolute()), remote], timeout_s)
        if ran.status != 0:
            if _GONE.search(ran.errors):
                raise DeviceFailed(f"the phone {self.serial} went away while {local.name} was sent: check the cable")
            raise NotWritable(f"{local.name} cannot be put on the phone at {remote}: {ran.last_words}")
        there = self.remote_sha256(remote)
        if there is not None and there != sha256:
            raise NotWritable(f"{local.name} did not arrive whole on the phone: push it again, and check the cable")

    def _is_there(self) -> bool:
        """Whether it still is: a shell that loses its phone may end without a word."""
        return _devices().get(self.serial) == "device"

    def remote_sha256(self, remote: str) -> str | None:
        """The SHA-256 of a file of the phone; None where there is no such file, or no such program."""
        words = self.shell_output("sha256sum", remote).split()
        return words[0] if words and re.fullmatch("[0-9a-f]{64}", words[0]) else None

    def _make_room(self, local: Path, remote: str) -> None:
        folder = remote.rpartition("/")[0]
        made = self.shell(["mkdir", "-p", folder])
        if made.status != 0:
            raise NotWritable(f"the folder {folder} cannot be made on the phone: {made.last_words}")
        words = self.shell_output("df", "-k", folder).splitlines()[-1:]
        free = words[0].split() if words else []
        needed = local.stat().st_size // 1024 + _SPARE_KIB
        if len(free) >= 4 and free[3].isdigit() and int(free[3]) < needed:
            raise NotWritable(
                f"no space on the phone: {local.name} needs {needed >> 10} MiB, {int(free[3]) >> 10} MiB are free in "
                f"{folder}: make room"
            )


def connect(serial: str | None = None) -> Adb:
    """The phone of this serial, or the only one there is. Raises MissingExtra, BadArgument."""
    wanted = serial or os.environ.get("ANDROID_SERIAL") or None
    found = _devices()
    if wanted is not None:
        if wanted not in found:
            known = f"there are {', '.join(found)}" if found else "no phone is there"
            raise BadArgument(f"no phone {wanted!r} is connected: {known}")
        return _ready(wanted, found[wanted])
    if not found:
        raise BadArgument(
            "no phone is connected: plug one in, with USB debugging on (Settings, Developer options); see `adb devices`"
        )
    ready = [each for each, state in found.items() if state == "device"]
    if len(ready) > 1 or (not ready and len(found) > 1):
        raise BadArgument(f"{len(found)} phones are connected: choose with --serial one of {', '.join(found)}")
    chosen = ready[0] if ready else next(iter(found))
    return _ready(chosen, found[chosen])


def _ready(serial: str, state: str) -> Adb:
    if state == "device":
        return Adb(serial=serial)
    what_to_do = {
        "unauthorized": "unlock it and allow USB debugging from this computer",
        "authorizing": "unlock it and allow USB debugging from this computer",
        "offline": "unplug it and plug it in again, or `adb reconnect`",
        "no permissions": "this user may not use the USB device: see udev rules for Android",
    }
    hint = next((text for start, text in what_to_do.items() if state.startswith(start)), "start Android on it")
    raise BadArgument(f"the phone {serial} is {state}: {hint}")


def _devices() -> dict[str, str]:
    """Serials and their states."""
    ran = _adb(["devices"], _QUICK_S)
    if ran.status != 0:
        raise DeviceFailed(f"adb does not list its devices ({ran.last_words}): try `adb kill-server`, and again")
    pairs = (line.split(None, 1) for line in ran.output.splitlines() if "\t" in line)
    return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}


def _adb(arguments: Sequence[str], timeout_s: float) -> _CommandResult:
    done = _call(arguments, timeout_s)
    output, errors = (raw.decode("utf-8", "replace").replace("\r\n", "\n") for raw in (done.stdout, done.stderr))
    return _CommandResult(status=done.returncode, output=output, errors=errors)


def _bytes(arguments: Sequence[str]) -> bytes:
    done = _call(arguments, _QUICK_S)
    if done.returncode != 0:
        raise DeviceFailed(
            f"a file of the phone cannot be read: {done.stderr.decode('utf-8', 'replace').strip()[:200]}"
        )
    return done.stdout


def _call(arguments: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            ["adb", *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False
        )
    except FileNotFoundError as error:
        raise MissingExtra(
            "adb is not installed: install Android's platform-tools, such as `apt install adb` or "
            "`brew install android-platform-tools`"
        ) from error
    except OSError as error:
        raise DeviceFailed(f"adb cannot be started: {error.strerror or error}") from error
    except subprocess.TimeoutExpired as error:
        raise DeviceFailed(
            f"the phone did not answer within {timeout_s:.0f} s: is it stuck, or is what it measures very slow?"
        ) from error
