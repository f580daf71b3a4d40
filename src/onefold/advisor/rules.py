"""The rules of the advisor by name, in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Sequence

from onefold.advisor.activation_rules import ACTIVATION_RULES
from onefold.advisor.channel_rules import CHANNELS
from onefold.advisor.layout_rules import ISLANDS, PADS, QDQ_PAIRS, TRANSPOSES
from onefold.advisor.rule import Rule
from onefold.advisor.session_rules import BATCH, LOW_PRECISION, RESOLUTION, RUNTIME, STATIC, THREADS
from onefold.advisor.structure_rules import FOLD, FUSE, INT8
from onefold.errors import BadArgument

RULES: tuple[Rule, ...] = (
    *(FUSE, FOLD, THREADS, RUNTIME, INT8, LOW_PRECISION, STATIC),
    *ACTIVATION_RULES,
    *(CHANNELS, TRANSPOSES, QDQ_PAIRS, ISLANDS, BATCH, RESOLUTION, PADS),
)


def select_rules(names: Sequence[str]) -> list[Rule]:
    """The rules of these names; all for none. Raises BadArgument for a name that there is not."""
    known = {rule.name: rule for rule in RULES}
    if unknown := [name for name in names if name not in known]:
        raise BadArgument(f"there is no rule {unknown[0]!r}: the advisor has {', '.join(known)}")
    return [known[name] for name in names] if names else list(RULES)
