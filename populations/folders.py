"""The folder for files of more than one run."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder for files of more than one run: ``$ECOTONE_CACHE``, or ``ecotone`` in the user's cache folder."""
    named = os.environ.get("ECOTONE_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ecotone"
