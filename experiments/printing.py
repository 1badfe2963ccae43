"""Text of strangers on terminals and in Markdown: names and messages that cannot act on the page they stand on."""

from __future__ import annotations

import re
from typing import Any

import typer

from ecotone.populations.errors import LONGEST, shown

_MARKS = re.compile(r"[\\`*\[\]<>|&]")


def echo(text: Any = "", **options: Any) -> None:
    """``typer.echo`` of a text as it may be shown."""
    typer.echo(shown(str(text), LONGEST, lines=True), **options)


def markdown(text: str) -> str:
    """A text in Markdown that stands for itself, in one line: no table, link, code or HTML begins in it."""
    return _MARKS.sub(lambda mark: f"&#{ord(mark[0])};", shown(text))
