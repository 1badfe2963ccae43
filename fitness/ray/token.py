"""Ray's token: the password of a cluster, in a file that only the user may read.

Ray makes ``~/.ray/auth_token`` for a cluster on this machine where there is none, with the modes that the umask leaves.
Ecotone makes it first, from its birth for the user alone.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

from ecotone.populations.folders import OWN_FILE, private_folder, tighten

_BYTES = 32  # as Ray's own tokens have


def own_token() -> None:
    """Have the token of this user's clusters there, before Ray would make it, and closed off from others.

    Nothing is made where tokens are switched off, or named by $RAY_AUTH_TOKEN or $RAY_AUTH_TOKEN_PATH. A folder that
    cannot be written is left to Ray, which says so.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    with contextlib.suppress(OSError, RuntimeError):  # no home folder, or a full disk
        file = Path.home() / ".ray" / "auth_token"
        if not file.exists():
            _make(file)
        tighten([file])


def _make(file: Path) -> None:
    """Make the file whole, unless another process was first."""
    private_folder(file.parent)
    descriptor, draft = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.")
    try:
        os.fchmod(descriptor, OWN_FILE)  # whatever the umask
        with os.fdopen(descriptor, "w") as handle:
            handle.write(secrets.token_hex(_BYTES))
        try:
            os.link(draft, file)
        except FileExistsError:
            return
        except OSError:  # a file system without links
            Path(draft).replace(file)
    finally:
        Path(draft).unlink(missing_ok=True)
