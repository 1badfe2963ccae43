"""Parts of Ecotone that need packages of their own (extras), and how they are installed here."""

from __future__ import annotations

import shlex
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]  # a checkout, or the folder of installed packages


def how_to_install(extra: str, *others: str) -> str:
    """The command that installs an extra beside this Ecotone.

    A checkout is installed again, as no index may have the package. An installed Ecotone is not: pip takes it as it is
    and adds what the extra needs.

    Args:
        extra: The extra's name, as in ``pyproject.toml``.
        others: More packages that are needed.
    """
    wanted = [f"ecotone[{extra}]"]
    if (_ROOT / "pyproject.toml").is_file():
        wanted = ["-e", f"{'.' if Path.cwd() == _ROOT else _ROOT}[{extra}]"]
    return shlex.join(["pip", "install", *wanted, *others])
