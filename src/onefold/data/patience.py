"""Trying again: what failed once over a network is asked for again, after a pause that doubles and is drawn at random.

The draw keeps many readers of one server from coming back together. What fails for good is BadData and names the place.
"""

from __future__ import annotations

import http.client
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from onefold.data.decode import printable
from onefold.errors import BadData

_Got = TypeVar("_Got")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How reading from afar is tried: so often, each try so long at most, with pauses that begin like this."""

    tries: int = 5
    timeout_s: float = 20.0
    pause_s: float = 0.2


def insisted(attempt: Callable[[], _Got], name: str, patience: Patience) -> _Got:
    """What `attempt` gives, tried again after errors of the network; BadData, which is final, passes through."""
    for number in range(patience.tries):
        try:
            return attempt()
        except BadData:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = error
        except Exception as error:  # obstore's errors have no common root but Exception
            reason = OSError(str(error).splitlines()[0] if str(error) else type(error).__name__)
        if number + 1 < patience.tries:
            time.sleep(patience.pause_s * 2**number * random.uniform(0.5, 1.5))
    shown = printable(str(reason) or type(reason).__name__)
    raise BadData(f"cannot read {name}: {shown} ({patience.tries} tries)") from reason
