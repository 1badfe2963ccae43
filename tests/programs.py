"""Other programs, each in an environment of its own, that tests run a driver in."""

from __future__ import annotations

import subprocess
from pathlib import Path


def drive(program: str, driver: str, *arguments: str | Path, folder: Path) -> None:
    """Run the text of a driver in a program's Python, in ``folder``.

    Args:
        program: The path of that Python, or of a script beside it.
        driver: The text.
        *arguments: Of the driver.
        folder: The working directory.
    """
    path = Path(program).absolute()
    python = path if path.name.startswith("python") else path.with_name("python")
    command = [python, "-c", driver, *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=800, cwd=folder)
    assert answer.returncode == 0, answer.stderr[-3000:]
