"""The changes of files that a user has accepted since a run began, as its journal has them. `status` imports it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ecotone.populations import facts
from ecotone.populations.contents import Change
from ecotone.populations.journal import Journal


def accepted_changes(journal: Journal) -> list[dict[str, Any]]:
    """The changes that were accepted so far, oldest first."""
    return list(journal.fact(facts.ACCEPTED) or ())


def in_words(accepted: Mapping[str, Any]) -> str:
    """An accepted change: what, and since when."""
    change = Change(accepted["where"], accepted["file"], accepted["was"], accepted["now"])
    return f"{change}; accepted by `{accepted['command']}` after {accepted['evaluations']} evaluations"


def accepted_texts(journal: Journal) -> list[str]:
    """The accepted changes in words."""
    return [in_words(one) for one in accepted_changes(journal)]
