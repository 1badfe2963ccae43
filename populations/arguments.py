"""The arguments of this process, as `ps` and everybody on the machine see them: URLs in them lose their secrets.

A secret that is typed on a command line is there for all to read until the process hides it. On Linux a process may
write over its own arguments in memory; elsewhere nothing is done.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from ecotone.populations.secrets import URL_BEGIN, place, stripped

_ARGUMENTS = 47, 48  # of /proc/self/stat: where the arguments begin and end in memory, counted from 0


def hide() -> bool:
    """Write over the secrets in what others see of this process's arguments. Returns whether there were any.

    ``sys.argv`` stays as it is.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        seen = Path("/proc/self/cmdline").read_bytes()
        hidden = b"\0".join(map(_hidden, seen.split(b"\0")))
        if hidden == seen:
            return False
        # The name of the program, in parentheses, may hold spaces; two fields come before and with it.
        fields = ["", "", *Path("/proc/self/stat").read_text().rpartition(")")[2].split()]
        begin, end = (int(fields[number]) for number in _ARGUMENTS)
        with Path("/proc/self/mem").open("r+b", buffering=0) as memory:
            memory.seek(begin)
            memory.write(hidden.ljust(end - begin, b"\0")[: end - begin])
        return True
    return False


def _hidden(argument: bytes) -> bytes:
    """An argument without secrets, as long as before, so that the others stay where they are."""
    text = argument.decode(errors="surrogateescape")
    begin = URL_BEGIN.search(text)
    before = len(text) if begin is None else begin.start()
    shown = stripped(text[:before] + place(text[before:]))
    return shown.encode(errors="surrogateescape").ljust(len(argument))[: len(argument)]
