"""Puts the compiled C++ code into wheels (see `onefold.cpp_extension`): a build hook of hatchling, which pip calls.

Without a C++ compiler, or with ONEFOLD_KERNELS=plain in the environment, the wheel is pure Python and py3-none-any, and
the build says so (`pip -v` shows it). An editable install has no wheel's libraries: they are compiled when needed.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompiledLibraries(BuildHookInterface):  # type: ignore[misc, type-arg]
    """The build hook of the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the wheel is written, and have it carry what came of that, for any Python 3."""
        if version == "editable":
            return
        sys.path.insert(0, str(Path(self.root) / "src"))
        from onefold import cpp_extension
        from onefold.checksums import write_sealed_folder

        try:
            if cpp_extension.is_native_disabled("ONEFOLD_KERNELS"):
                raise OSError("ONEFOLD_KERNELS=plain")
            libraries = cpp_extension.compile_for_wheel()
        except (OSError, subprocess.SubprocessError) as error:
            self.app.display_warning(
                f"this wheel is pure Python, without compiled C++ code: {cpp_extension.compiler_message(error)}"
            )
            return
        self._folder = tempfile.TemporaryDirectory()
        lib = Path(self._folder.name) / "lib"
        write_sealed_folder(lib, libraries)
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data |= {"pure_python": False, "tag": f"py3-none-{platform}"}
        build_data["force_include"][str(lib)] = "onefold/lib"
        self.app.display_info(f"this wheel carries compiled C++ code: {', '.join(sorted(libraries))}")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Forget what was compiled, which is in the wheel by now."""
        if not build_data["pure_python"]:
            self._folder.cleanup()
