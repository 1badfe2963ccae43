"""Text of strangers on terminals and in Markdown: names and messages that cannot act on the page they stand on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from ecotone.populations.errors import LONGEST, shown

_MARKS = re.compile(r"[\\`*\[\]<>|&]")


class PlainConsole(Console):
    """A console that prints control characters in texts as their escapes; its own colours and lines stay."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of something to print, each as it may be shown."""
        for segment in super().render(renderable, options):
            text = segment.text
            if segment.control or text.isprintable() or text == "\n":
                yield segment
            else:
                yield Segment(shown(text, LONGEST, lines=True), segment.style)


def echo(text: Any = "", **options: Any) -> None:
    """``typer.echo`` of a text as it may be shown."""
    typer.echo(shown(str(text), LONGEST, lines=True), **options)


def markdown(text: str) -> str:
    """A text in Markdown that stands for itself, in one line: no table, link, code or HTML begins in it."""
    return _MARKS.sub(lambda mark: f"&#{ord(mark[0])};", shown(text))
