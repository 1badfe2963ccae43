"""A console for tables, on which names and messages of strangers cannot act."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from ecotone.populations.errors import LONGEST, shown


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
