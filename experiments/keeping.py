"""Credentials that a run needs: kept for the next process when it begins, looked for when it goes on."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ecotone.populations import credentials, secrets

_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]+")


def kept(notify: Callable[[str], None], *values: Any) -> tuple[str, ...]:
    """Keep the credentials of all URLs in ``values``, and say where.

    Args:
        notify: Called with the sentence, if there are any.
        values: What is recorded of a run: nested plain values, without secrets.

    Returns:
        The URLs that have credentials, as they are recorded.
    """
    known = secrets.remembered()
    urls = tuple(dict.fromkeys(text for text in texts_in(values) if text in known))
    if not urls:
        return ()
    where = ", ".join(urls)
    try:
        file = credentials.keep(urls)
    except (OSError, RuntimeError) as error:
        notify(
            f"Warning: the credentials of {where} are not recorded, and cannot be kept for the next time ({error}). "
            f"Set {credentials.variables(urls[0])} then."
        )
    else:
        notify(f"The credentials of {where} are kept in {file}, which only you can read, and nowhere else.")
    return urls


def missing(urls: Sequence[str], tracking: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each URL whose credentials a run had when it began, and that are not known here.

    Args:
        urls: As ``kept`` returned them.
        tracking: The settings of the run's trackers, as the journal has them.
    """
    trackers = set(texts_in([tracking]))
    for url in urls:
        if credentials.whole(url) != url:
            continue
        names = credentials.variables(url)
        if url not in trackers:
            yield (
                f"Warning: the run began with credentials for {url}, and {credentials.file()} does not have them. Give "
                f"the whole URL in ${credentials.VARIABLE}, as JSON: {{{url!r}: 'WHOLE URL'}}."
            )
        elif not any(name in os.environ for name in _VARIABLE.findall(names)):
            yield (
                f"Warning: the run began with credentials for {url}, and {credentials.file()} does not have them. Set "
                f"{names}, or give --set tracking.uri with them."
            )


def texts_in(value: Any) -> Iterator[str]:
    """The texts in a nested value."""
    if isinstance(value, Mapping):
        value = value.values()
    if isinstance(value, str):
        yield value
    elif not isinstance(value, bytes) and hasattr(value, "__iter__"):
        for one in value:
            yield from texts_in(one)
