"""Credentials of places (trackers, run directories, clusters), in a file of the user's: ``credentials.json``.

A URL with user info or a query is recorded without them. The whole URL is kept in the user's configuration folder, in
a file that nobody else may read, by what is recorded of it. So `resume`, `sync` and the process that mirrors a run find
it again, and no file of a run, which may be copied or published, has it. Git's ``credential-store`` does the same.

A job on a cluster is given the whole URLs that its command needs in ``$ECOTONE_CREDENTIALS``.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ecotone.populations import secrets
from ecotone.populations.folders import opened, private_folder, settings_folder, write_private
from ecotone.populations.parsing import json_object

VARIABLE = "ECOTONE_CREDENTIALS"
"""A variable of the environment with whole URLs as JSON, by what is shown of them."""

_VARIABLES = {
    **dict.fromkeys(
        ("http", "https"), "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    ),
    **dict.fromkeys(("s3", "s3a"), "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    **dict.fromkeys(("gs", "gcs"), "GOOGLE_APPLICATION_CREDENTIALS"),
    **dict.fromkeys(("az", "abfs", "abfss"), "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"),
    **dict.fromkeys(("postgresql", "postgres"), "PGUSER and PGPASSWORD"),
}


def file() -> Path:
    """The file of this user."""
    return settings_folder() / "credentials.json"


def whole(url: str) -> str:
    """The URL with the credentials that this process, its environment or the user's file has for it."""
    if "://" not in url:
        return url
    load()
    return secrets.whole(url)


def restored(value: Any) -> Any:
    """A nested value with every text made whole whose credentials are known here."""
    load()
    return secrets.restored(value)


def load() -> None:
    """Have this process know what its environment and the user's file hold; what it knows already stays."""
    known = secrets.remembered()
    for source in (_parsed(os.environ.get(VARIABLE)), _stored()):
        for shown, url in source.items():
            if shown not in known:
                known[shown] = url
                secrets.remember(shown, url)


def keep(shown: Iterable[str]) -> Path | None:
    """Store the credentials of these URLs for the next process; those that are stored already are left.

    Args:
        shown: URLs as ``secrets.take`` returned them; those without credentials are passed over.

    Returns:
        The file that has them, or None where none of the URLs has credentials.

    Raises:
        OSError: The file cannot be written.
        RuntimeError: The user has no home folder.
    """
    known = secrets.remembered()
    wanted = {one: known[one] for one in shown if one in known}
    if not wanted:
        return None
    path = file()
    if not wanted.items() <= _stored().items():
        private_folder(path.parent)
        with opened(path.with_suffix(".lock"), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            write_private(path, json.dumps(_stored() | wanted, indent=1).encode())
    return path


def passed(shown: Iterable[str]) -> dict[str, str]:
    """Variables of the environment that give another process the credentials of these URLs; empty without any."""
    known = secrets.remembered()
    wanted = {one: known[one] for one in shown if one in known}
    return {VARIABLE: json.dumps(wanted)} if wanted else {}


def unkept() -> dict[str, str]:
    """``passed``, for what this process knows and the user's file does not have: it cannot be written."""
    stored = _stored()
    return passed(shown for shown, url in secrets.remembered().items() if stored.get(shown) != url)


def variables(url: str) -> str:
    """The variables of the environment in which the client of such a URL looks for credentials, in words."""
    scheme = url.partition("://")[0].partition("+")[0].lower()
    return _VARIABLES.get(scheme, f"FSSPEC_{scheme.upper()}_USERNAME and FSSPEC_{scheme.upper()}_PASSWORD")


def _stored() -> dict[str, str]:
    """The entries of the user's file. A file of another user counts as none; one that others may read is closed off."""
    try:
        with file().open("rb") as handle:
            about = os.fstat(handle.fileno())
            if about.st_uid != os.geteuid():
                return {}
            if stat.S_IMODE(about.st_mode) & 0o077:
                with contextlib.suppress(OSError):
                    os.fchmod(handle.fileno(), 0o600)
            return _parsed(handle.read())
    except (OSError, RuntimeError):
        return {}


def _parsed(text: str | bytes | None) -> dict[str, str]:
    try:
        found = json_object(text or "{}")
    except ValueError:
        return {}
    return {shown: url for shown, url in found.items() if isinstance(url, str)}
