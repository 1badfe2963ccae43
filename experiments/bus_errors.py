"""Words on a death by SIGBUS, which no Python code survives: a mapped file that was cut short ends a process at once.

Python's ``faulthandler`` writes a traceback on such a death, to a file number alone. Here it writes to a pipe. A shell
at the other end says what the signal means, and ends with the process in any case.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import subprocess
from collections.abc import Iterator

_SAYS = """trap '' INT TERM HUP
if IFS= read -r line; then
    printf '%s\\n' "$line"
    cat
    case "$line" in *"Bus error"*) printf '%s\\n' "$0";; esac
fi >&2"""


@contextlib.contextmanager
def told(remedy: str) -> Iterator[None]:
    """Have a death by SIGBUS inside told on stderr, with a traceback; other deadly signals with a traceback alone.

    Does nothing where somebody else has turned ``faulthandler`` on.

    Args:
        remedy: What the user can do.
    """
    if faulthandler.is_enabled():
        yield
        return
    words = f"error: a mapped file of a model was cut short, or its disk failed: the process ended at once. {remedy}"
    try:
        reading, writing = os.pipe()
        with os.fdopen(reading) as end:
            shell = subprocess.Popen(["/bin/sh", "-c", _SAYS, words], stdin=end)
    except OSError:
        yield
        return
    with os.fdopen(writing, "wb") as file:
        faulthandler.enable(file)
        try:
            yield
        finally:
            faulthandler.disable()
    shell.wait()
