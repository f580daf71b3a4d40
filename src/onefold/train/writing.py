"""Writing in the background: steps go on while a checkpoint is made into bytes, hashed, and brought to the disk."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType


class Writer:
    """A block in which jobs are done one after another by a thread; it ends when the last one has.

    At most one job is under way: `submit` waits for the one before. After one that went wrong no other is done; `check`
    raises what it was, and so does the end of the block where nothing else is being raised.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def has_failed(self) -> bool:
        """Whether `check` would raise."""
        return self._error is not None

    def submit(self, job: Callable[[], None]) -> None:
        """Have a job done, once the one before it is."""
        self.wait()
        if not self.has_failed:
            self._thread = threading.Thread(target=self._do, args=(job,), name="onefold-writer")
            self._thread.start()

    def wait(self) -> None:
        """Wait until the last job has ended, well or not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def check(self) -> None:
        """Raise what went wrong, if something did."""
        if self._error is not None:
            raise self._error

    def _do(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.wait()
        if error is None:
            self.check()
