"""One reader of YAML: nothing that somebody wrote is lost or changed without a word, and nothing hangs.

A text is read in three steps, each bounded before the next begins. libyaml (or PyYAML's own scanner) makes events of
it, lazily; ``_Bounds`` counts how deep they are and how large the value would be with every alias written out. PyYAML's
composer makes nodes of the events; ``_check_keys`` refuses a key that a mapping has twice. A safe constructor makes the
value. YAML is version 1.1, as PyYAML reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import yaml
from yaml.composer import Composer
from yaml.constructor import ConstructorError, SafeConstructor
from yaml.resolver import Resolver

from ecotone.populations.errors import shown
from ecotone.populations.parsing import DEEPEST, text_of

LARGEST_TEXT = 1 << 24
"""The most characters of a text, and of its value with all aliases written out: 16 Mi."""
MOST_NODES = 200_000
"""The most values, lists and mappings, with all aliases written out."""
LONGEST_NUMBER = 400
"""The most characters of a number; the largest double has 309 digits."""

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_PLAIN = {f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_POWER = re.compile(r"[-+]?(\d[\d_]*\.?|\d*\.\d+)[eE][-+]?\d+")
_OCTAL = re.compile(r"[-+]?0o[0-7_]+")

Steps: TypeAlias = tuple[int | str, ...]


class YamlError(yaml.YAMLError):
    """A text that is not read as YAML.

    Args:
        reason: Why, as the end of a sentence.
        line: The line, from 1; 0 where no place is known.
        column: The column, from 1.
    """

    def __init__(self, reason: str, line: int = 0, column: int = 0) -> None:
        self.reason: str = shown(reason)
        self.line = line
        self.column = column
        super().__init__(f"line {line}, column {column}: {self.reason}" if line else self.reason)

    def __reduce__(self) -> tuple[type[YamlError], tuple[str, int, int]]:
        return type(self), (self.reason, self.line, self.column)


@dataclass(frozen=True)
class Written:
    """How a value without quotes was written, and where.

    Args:
        text: Its characters.
        line: The line, from 1.
        column: The column, from 1.
    """

    text: str
    line: int
    column: int


@dataclass(frozen=True)
class Document:
    """What a YAML text says.

    Args:
        value: Its value.
        scalars: By the steps that lead to them, the values without quotes that are no text, as they were written.
        empty: Whether there is nothing in it but comments.
    """

    value: Any
    scalars: Mapping[Steps, Written] = field(default_factory=dict)
    empty: bool = False


def load(text: str | bytes) -> Any:
    """The value of a YAML text, as ``yaml.safe_load`` gives it.

    Raises:
        YamlError: As for ``document``.
    """
    return document(text).value


def document(text: str | bytes) -> Document:
    """The one document of a YAML text.

    Args:
        text: The text, or its bytes in UTF-8.

    Raises:
        YamlError: It is not YAML, is no text, is too large, or is nested too deep; it holds several documents, a
            mapping with a key twice, a tag, a date, a number in base 8 or 60 that looks like another, an anchor that
            contains itself, or aliases that would make it too large.
    """
    node = compose(text)
    if node is None:
        return Document(None, empty=True)
    scalars: dict[Steps, Written] = {}
    for steps, one in _nodes(node):
        if isinstance(one, yaml.ScalarNode):
            _check_scalar(one)
            if steps is not None and not one.style and one.tag != f"{_TAG}str":
                scalars[steps] = Written(one.value, *_place(one.start_mark))
        if isinstance(one, yaml.MappingNode):
            _check_texts_as_keys(one)
        if one.tag == _MERGE and steps is not None:
            raise _at(one, "<< merges mappings only as a key; put it in quotes if it is text")
        if one.tag not in _PLAIN:
            raise _at(one, f"expected no tag, found {_written_tag(one.tag)}; put the value in quotes if it is text")
    return Document(construct(node), scalars)


def compose(text: str | bytes, *, once: bool = True) -> yaml.Node | None:
    """The nodes of the one document of a YAML text; None where there is none.

    Tags, dates and keys of other types than text are left to the caller.

    Args:
        text: The text, or its bytes in UTF-8.
        once: Refuse a key that a mapping has twice. Otherwise its last value counts.

    Raises:
        YamlError: As for ``document``, but for tags and dates.
    """
    events = _Events(_bounded(_text(text)))
    try:
        node = events.get_single_node()
    except yaml.YAMLError as error:
        raise _in_words(error) from error
    for _, one in _nodes(node) if node is not None and once else ():
        if isinstance(one, yaml.MappingNode):
            _check_keys(one)
    return node


def construct(node: yaml.Node, constructor: type[SafeConstructor] = SafeConstructor) -> Any:
    """The value of a node.

    Args:
        node: A node that ``compose`` gave.
        constructor: The class that knows more tags.

    Raises:
        YamlError: A value does not fit its tag, or a key cannot be one.
    """
    try:
        return constructor().construct_document(node)
    except yaml.YAMLError as error:
        raise _in_words(error) from error
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, AttributeError) as error:
        found = (
            f"found {shown(str(node.value), 40)}" if isinstance(node, yaml.ScalarNode) else f"found another ({error})"
        )
        raise _at(node, f"expected a value that fits its tag, {found}") from error


def hint(value: Any, wanted: type, written: Written | None = None) -> str:
    """How to write in YAML what was meant, where a value became another one; empty where nothing is known.

    Args:
        value: The value that was found.
        wanted: ``str`` or ``float``: text or a number was expected.
        written: How it was written, where that is known.
    """
    if isinstance(value, bool):
        quoted = "no, off, yes and on" if written is None else shown(written.text, 40)
        remedy = "in quotes to mean text" if wanted is str else "as a number"
        return f"YAML reads {quoted} without quotes as true or false: write it {remedy}."
    if wanted is str and isinstance(value, int | float) and written is not None:
        text = shown(written.text, 40)
        return f"YAML reads {text} without quotes as the number {value!r}: write '{text}' to mean text."
    if wanted is str and value is None and written is not None and written.text:
        return f"YAML reads {shown(written.text, 40)} without quotes as nothing: write it in quotes to mean text."
    if wanted is float and isinstance(value, str) and (_POWER.fullmatch(value) or _OCTAL.fullmatch(value)):
        return f"YAML 1.1 reads {shown(value, 40)} as text: write {_decimal(value)}."
    return ""


def _decimal(text: str) -> str:
    """A number that YAML 1.1 reads as text, as it reads it as a number."""
    plain = text.replace("_", "")
    if _OCTAL.fullmatch(text):
        return str(int(plain.replace("0o", ""), 8))
    value = float(plain)
    if abs(value) < 1e15 and value.is_integer():
        return f"{value:.1f}, or {value:.0f} for a whole number"
    mantissa, _, exponent = f"{value:e}".partition("e")
    return f"{float(mantissa)}e{exponent}"


# -- bounds ----------------------------------------------------------------------------------------------------------


class _Events(Composer, Resolver):
    """PyYAML's composer and resolver over events that were read before."""

    def __init__(self, events: Iterator[yaml.Event]) -> None:
        Composer.__init__(self)
        Resolver.__init__(self)
        self._events = events
        self._next: yaml.Event | None = None

    def peek_event(self) -> yaml.Event | None:
        """The next event, which stays the next; None after the last."""
        if self._next is None:
            self._next = next(self._events, None)
        return self._next

    def get_event(self) -> yaml.Event | None:
        """The next event."""
        event, self._next = self.peek_event(), None
        return event

    def check_event(self, *kinds: type[yaml.Event]) -> bool:
        """Whether the next event is of one of the classes, or whether there is one."""
        event = self.peek_event()
        return event is not None and (not kinds or isinstance(event, kinds))


class _Bounds:
    """Counts the values and characters of a text, with its aliases written out, and refuses what would be too large."""

    def __init__(self) -> None:
        self.nodes = 0
        self.size = 0
        self.documents = 0
        self._anchors: dict[str, tuple[int, int]] = {}  # nodes and size of what they name
        self._opened: list[tuple[str | None, int, int]] = []  # lists and mappings: anchor, counts before them

    def check(self, event: yaml.Event) -> None:
        """Count an event.

        Raises:
            YamlError: A bound is passed.
        """
        if isinstance(event, yaml.ScalarEvent):
            self._named(event.anchor, 1, 1 + len(event.value))
            self._grow(event, 1, 1 + len(event.value))
        elif isinstance(event, yaml.CollectionStartEvent):
            self._opened.append((event.anchor, self.nodes, self.size))
            self._grow(event, 1, 1)
            if len(self._opened) > DEEPEST:
                reason = f"expected at most {DEEPEST} mappings and lists in each other, found more"
                raise YamlError(reason, *_place(event.start_mark))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, nodes, size = self._opened.pop()
            self._named(anchor, self.nodes - nodes, self.size - size)
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _, _ in self._opened):
                raise YamlError(f"the anchor {event.anchor!r} contains itself", *_place(event.start_mark))
            self._grow(event, *self._anchors.get(event.anchor or "", (1, 1)))
        elif isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                raise YamlError("expected one document, found a second one", *_place(event.start_mark))

    def _named(self, anchor: str | None, nodes: int, size: int) -> None:
        if anchor is not None:
            self._anchors[anchor] = nodes, size

    def _grow(self, event: yaml.Event, nodes: int, size: int) -> None:
        self.nodes += nodes
        self.size += size
        if self.nodes > MOST_NODES or self.size > LARGEST_TEXT:
            most = f"{MOST_NODES} values" if self.nodes > MOST_NODES else f"{LARGEST_TEXT >> 20} Mi characters"
            what = "with its aliases written out" if isinstance(event, yaml.AliasEvent) else "in all"
            raise YamlError(f"expected at most {most}, found more {what}", *_place(event.start_mark))


def _bounded(text: str) -> Iterator[yaml.Event]:
    """The events of a text, as long as they stay within the bounds."""
    bounds = _Bounds()
    for event in _events(text):
        bounds.check(event)
        yield event


def _events(text: str) -> Iterator[yaml.Event]:
    try:
        yield from yaml.parse(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise _in_words(error) from error
    except RecursionError as error:
        raise YamlError(f"expected at most {DEEPEST} mappings and lists in each other, found more") from error
    except (ValueError, OverflowError, IndexError) as error:
        raise YamlError(f"it cannot be read ({error})") from error


def _text(text: str | bytes) -> str:
    if len(text) > LARGEST_TEXT:
        raise YamlError(f"expected at most {LARGEST_TEXT >> 20} MiB, found more")
    try:
        plain = text_of(text) if isinstance(text, bytes) else text
        plain.encode()
    except UnicodeEncodeError as error:
        raise YamlError("expected text, found half a pair of surrogates") from error
    except ValueError as error:
        raise YamlError(str(error)) from error
    control = yaml.reader.Reader.NON_PRINTABLE.search(plain)
    if control is not None:
        start = control.start()
        place = plain.count("\n", 0, start) + 1, start - plain.rfind("\n", 0, start)
        raise YamlError(f"expected text, found the character U+{ord(control[0]):04X}; is it a binary file?", *place)
    return plain


# -- nodes -----------------------------------------------------------------------------------------------------------


def _nodes(root: yaml.Node) -> Iterator[tuple[Steps | None, yaml.Node]]:
    """Every node once, with the steps that first lead to it; None for those of keys."""
    left: list[tuple[Steps | None, yaml.Node]] = [((), root)]
    seen = set[int]()
    while left:
        steps, node = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield steps, node
        if isinstance(node, yaml.SequenceNode):
            left += [(None if steps is None else (*steps, number), one) for number, one in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                known = steps is not None and isinstance(key, yaml.ScalarNode)
                left += [((*(steps or ()), str(key.value)) if known else None, value), (None, key)]


def _check_keys(mapping: yaml.MappingNode) -> None:
    """Refuse a key that a mapping has twice. What ``<<`` merges may be given anew."""
    first: dict[tuple[str, str], yaml.Node] = {}
    for key, _ in mapping.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        if (key.tag, key.value) in first:  # the same node, where the second is an alias of the first
            line, column = _place(first[key.tag, key.value].start_mark)
            keep = "merge both in one list" if key.tag == _MERGE else "keep one of them"
            name = shown(key.value, 80)
            raise _at(key, f"{name!r} is given twice, first in line {line}, column {column}; {keep}")
        first[key.tag, key.value] = key


def _check_texts_as_keys(mapping: yaml.MappingNode) -> None:
    """Refuse keys that JSON would turn into text, and keep one of 1 and true."""
    for key, _ in mapping.value:
        if key.tag not in (f"{_TAG}str", _MERGE):
            found = shown(key.value, 40) if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
            raise _at(key, f"expected text as keys of mappings, found {found}; put it in quotes")


def _check_scalar(node: yaml.ScalarNode) -> None:
    """Refuse a number that is too long, and a value that is no number, truth or text."""
    short, name = shown(node.value, 40), node.tag.removeprefix(_TAG)
    if name in ("int", "float") and len(node.value) > LONGEST_NUMBER:
        raise _at(node, f"expected a number of at most {LONGEST_NUMBER} characters, found {len(node.value)}")
    if name in ("int", "float", "bool"):
        construct(node)  # a tag may have been written before another text
    if name in ("int", "float") and not node.style and _reads_otherwise(node.value, construct(node)):
        read = f"YAML reads {short} as the number {construct(node)}"
        raise _at(node, f"{read}; put it in quotes, or write the number in decimals")
    if name == "timestamp":
        raise _at(node, f"expected text, numbers, lists and mappings only, found the date {short}; put it in quotes")
    if name == "value":
        raise _at(node, f"{short} has a meaning of its own in YAML; put it in quotes")


def _reads_otherwise(text: str, value: Any) -> bool:
    """Whether YAML 1.1 reads a number in base 60 (``1:30``), or in base 8 without saying so (``010``)."""
    plain = text.replace("_", "")
    return ":" in text or (plain.lstrip("+-").isdecimal() and int(plain) != value)


def _written_tag(tag: str) -> str:
    return f"!!{tag.removeprefix(_TAG)}" if tag.startswith(_TAG) else tag


def _place(mark: Any) -> tuple[int, int]:
    """Line and column of a mark, from 1; zeros for none."""
    return (0, 0) if mark is None else (mark.line + 1, mark.column + 1)


def _at(node: yaml.Node, reason: str) -> YamlError:
    return YamlError(reason, *_place(node.start_mark))


def _in_words(error: yaml.YAMLError) -> YamlError:
    """PyYAML's own error in one line, with the place of the problem and that of its context."""
    if isinstance(error, YamlError):
        return error
    if isinstance(error, yaml.MarkedYAMLError):
        problem = error.problem or error.context or "it is not YAML"
        mark, about = error.problem_mark or error.context_mark, error.context
        if isinstance(error, ConstructorError) and "tag:yaml.org,2002:" in problem:
            problem = problem.replace("tag:yaml.org,2002:", "!!")
        if about and about != problem:
            line, column = _place(error.context_mark)
            since = f", which begins in line {line}, column {column}" if line and error.context_mark != mark else ""
            problem = f"{problem} {about}{since}"
        return YamlError(problem, *_place(mark))
    return YamlError(" ".join(str(error).split()))
