"""Tokenizers and chat templates of the models of a merge, compared from their files without loading any."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FAST = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
OLD_TEMPLATE = "chat_template.json"
FILES = (
    FAST,
    SETTINGS,
    SPECIAL,
    TEMPLATE,
    OLD_TEMPLATE,
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
SUFFIXES = (".model", ".tiktoken", ".vocab", ".spm", ".bpe", ".codes")
"""Of vocabularies that a family has files of its own for."""
_MORE = ("normalizer.json", "entity_vocab.json", "emoji.json", "target_vocab.json", "dict.txt")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds a tokenizer's files."""
    beside = (SETTINGS, SPECIAL, TEMPLATE, OLD_TEMPLATE)
    return any((directory / name).is_file() for name in FILES if name not in beside)


def is_file(name: str) -> bool:
    """Whether a file of this name belongs to a tokenizer."""
    return name in FILES or name in _MORE or name.endswith(SUFFIXES)


def chat_template(directory: Path) -> str | None:
    """The chat template in a directory; several of them as JSON."""
    return _template(directory, _json(directory / SETTINGS))


def vocabulary(directory: Path) -> Mapping[int, str] | None:
    """Tokens by number, added ones included, from ``tokenizer.json`` or ``vocab.json``; None without either.

    A file that cannot be read as one counts as none: it is the model's loader that refuses it.
    """
    return _Files(directory).tokens


def compare(models: Sequence[tuple[str, Path]]) -> list[str]:
    """The differences between the tokenizers and chat templates of models.

    Args:
        models: Names and directories. The first model is compared with all others: the base, whose files an export
            gets. Models in plain weights files have no tokenizer and are passed over.

    Returns:
        One plain sentence for each difference; none if all agree.
    """
    compared = [(name, _Files(Path(path))) for name, path in models if Path(path).is_dir()]
    owners = [(name, files) for name, files in compared if files.tokens is not None]
    sentences: list[str] = []
    if owners:
        without = [name for name, files in compared if files.tokens is None]
        sentences += [
            f"{name!r} has no tokenizer that can be compared with that of {owners[0][0]!r}." for name in without
        ]
    for name, files in owners[1:]:
        sentences += _differences(owners[0][0], owners[0][1], name, files)
    templated = [(name, files.template) for name, files in compared if files.tokens is not None or files.template]
    for name, template in templated[1:]:
        sentences += _templates(templated[0][0], templated[0][1], name, template)
    return sentences


class _Files:
    """The files of one directory that are compared.

    Args:
        directory: The directory of a model.
    """

    def __init__(self, directory: Path) -> None:
        fast, settings, special = (_json(directory / name) for name in (FAST, SETTINGS, SPECIAL))
        model = fast.get("model")
        model = model if isinstance(model, dict) else {}
        self.tokens = _tokens(directory, fast, model)
        self.merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model.get("merges") or []]
        self.parts = {part: fast.get(part) for part in _PARTS} if fast else None
        self.kind = model.get("type")
        merged = {**special, **{key: value for key, value in settings.items() if value is not None}}
        self.special = {key: _content(merged.get(key)) for key in _SPECIAL}
        self.template = _template(directory, settings)


def _differences(first: str, ours: _Files, other: str, theirs: _Files) -> Iterator[str]:
    left, right = ours.tokens or {}, theirs.tokens or {}
    both = f"the tokenizers of {first!r} and {other!r}"
    clashes = [number for number in sorted(left.keys() & right.keys()) if left[number] != right[number]]
    if clashes:
        number = clashes[0]
        more = f" (the first of {len(clashes)} such)" if len(clashes) > 1 else ""
        yield f"In {both} token {number} differs: {left[number]!r} and {right[number]!r}{more}."
    for name, has, rest, lacks in ((first, left, right, other), (other, right, left, first)):
        added = sorted(has.keys() - rest.keys())
        if added:
            shown = ", ".join(repr(has[number]) for number in added[:4]) + (", ..." if len(added) > 4 else "")
            yield f"The tokenizer of {name!r} has {len(added)} tokens that {lacks!r} has not: {shown}."
    if ours.kind != theirs.kind:
        yield f"In {both} the kinds differ: {ours.kind} and {theirs.kind}."
    elif ours.merges != theirs.merges:
        yield f"In {both} the merge rules differ: the same text may become other tokens."
    if ours.parts and theirs.parts:
        parts = [part for part in _PARTS if ours.parts[part] != theirs.parts[part]]
        if parts:
            yield f"In {both} {' and '.join(part.replace('_', '-') for part in parts)} differ."
    for key in _SPECIAL:
        if ours.special[key] != theirs.special[key]:
            yield f"In {both} {key} differs: {ours.special[key]!r} and {theirs.special[key]!r}."


def _templates(first: str, ours: str | None, other: str, theirs: str | None) -> Iterator[str]:
    if ours == theirs:
        return
    for name, template in ((first, ours), (other, theirs)):
        if template is None:
            yield f"{name!r} has no chat template and {other if name == first else first!r} has one."
            return
    yield f"The chat templates of {first!r} and {other!r} differ: prompts are to be written as each was trained on."


def _tokens(directory: Path, fast: Mapping[str, Any], model: Mapping[str, Any]) -> Mapping[int, str] | None:
    listed = model.get("vocab") if fast else _json(directory / "vocab.json")
    if isinstance(listed, dict):
        tokens = {number: token for token, number in listed.items() if isinstance(number, int)}
    elif isinstance(listed, list):  # Unigram: tokens with their scores, in order
        tokens = {number: str(entry[0]) for number, entry in enumerate(listed) if isinstance(entry, list) and entry}
    else:
        tokens = {}
    for entry in fast.get("added_tokens") or []:
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            tokens[entry["id"]] = str(entry.get("content"))
    if not fast:
        tokens |= {n: token for token, n in _json(directory / "added_tokens.json").items() if isinstance(n, int)}
    return tokens or None


def _template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template, or all of several, as one text."""
    if (directory / TEMPLATE).is_file():
        return (directory / TEMPLATE).read_text("utf-8", errors="replace").rstrip("\n")
    template = settings.get("chat_template") or _json(directory / OLD_TEMPLATE).get("chat_template")
    if template is None or isinstance(template, str):
        return template.rstrip("\n") if template else None
    return json.dumps(template, sort_keys=True)


def _content(token: object) -> str | None:
    """A special token's text; it is stored as text or with its options."""
    if isinstance(token, dict):
        token = token.get("content")
    return None if token is None else str(token)


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, empty if there is none."""
    try:
        record = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
