"""Tokenizers and chat templates of the models of a merge, compared from their files without loading any."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ecotone.populations.errors import CheckpointError
from ecotone.populations.parsing import LARGEST_TOKENIZER, explained, file_bytes, foreign_or_none

FAST = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
OLD_TEMPLATE = "chat_template.json"
MORE_TEMPLATES = "additional_chat_templates"
"""The folder of chat templates that are chosen by name."""
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
_FREE = re.compile(r"unused|reserved|placeholder|dummy|extra_id", re.IGNORECASE)
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds a tokenizer's files."""
    beside = (SETTINGS, SPECIAL, TEMPLATE, OLD_TEMPLATE)
    return any((directory / name).is_file() for name in FILES if name not in beside)


def is_file(name: str) -> bool:
    """Whether a file of this name (with its folder, where it is in one) belongs to a tokenizer."""
    return name in FILES or name in _MORE or name.endswith(SUFFIXES) or name.startswith(f"{MORE_TEMPLATES}/")


def files(directory: Path) -> list[str]:
    """The names of a tokenizer's files in a directory, those of more chat templates with their folder; sorted."""
    own = [file for file in directory.iterdir() if is_file(file.name)] if directory.is_dir() else []
    more = directory.glob(f"{MORE_TEMPLATES}/*.jinja")
    return sorted(file.relative_to(directory).as_posix() for file in (*own, *more) if file.is_file())


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


def clashes(models: Sequence[tuple[str, Path]], rows: int | None) -> list[str]:
    """The numbers that do not mean one token in all tokenizers.

    Args:
        models: Names and folders of tokenizers. Those without one are passed over.
        rows: Rows of the embeddings that are mixed: only numbers below it count; None where they are not known.

    Returns:
        Plain sentences on each tokenizer and the first before it that gives numbers to other tokens.
    """
    known = [
        (name, {number: token for number, token in tokens.items() if rows is None or number < rows})
        for name, tokens in ((name, vocabulary(place)) for name, place in models)
        if tokens is not None
    ]
    sentences: list[str] = []
    for index, (name, tokens) in enumerate(known):
        pairs = ((f"the tokenizers of {first!r} and {name!r}", ours) for first, ours in known[:index])
        each = (list(_clashes(both, ours, tokens)) for both, ours in pairs)
        sentences += next(filter(None, each), [])
    return sentences


def check(scoring: tuple[str, Path], models: Sequence[tuple[str, Path]], rows: int | None) -> list[str]:
    """Refuse a tokenizer that does not fit the embeddings of a merge; tell what only may not fit.

    Tokens beyond the embeddings cannot be computed. They are told, not refused, where they are special tokens that no
    setting and no chat template names, so that only a text that spells them out would hold them.

    Embeddings are mixed row by row, so a number must mean one token in all models. Added tokens are often given to
    numbers that were free or reserved, and few texts hold them: a clash of them is told by ``compare``. A clash of
    others is refused, as all texts would be read wrongly. Placeholders (``[unused1]``) count as free.

    Args:
        scoring: The name and folder of the tokenizer that merges are scored with.
        models: The models' names and the folders of their tokenizers. Those without a tokenizer are passed over.
        rows: Rows of the merges' input embedding; None where they are not known.

    Returns:
        One plain sentence for each tokenizer with tokens beyond the rows.

    Raises:
        CheckpointError: Texts may become numbers beyond the rows, or another tokenizer's vocabulary is another one.
    """
    listed = [(name, _Files(place)) for name, place in (scoring, *(one for one in models if one[1] != scoring[1]))]
    name, ours = listed[0]
    sentences: list[str] = []
    for other, files in listed:
        tokens = files.tokens or {}
        beyond = [] if rows is None else sorted(number for number in tokens if number >= rows)
        if not beyond:
            continue
        sentence = (
            f"the tokenizer of {other!r} has {_counted(len(beyond), 'token')} beyond the {rows:,} rows of the "
            f"embeddings, from number {beyond[0]} on: {_few([tokens[number] for number in beyond])}"
        )
        if files is ours and not all(files.is_idle(number) for number in beyond):
            raise CheckpointError(
                f"tokenizer: {sentence}.",
                "Name another tokenizer (models.tokenizer), or give the models as many rows "
                "(resize_token_embeddings, or the option vocabulary: union where another model has them).",
            )
        note = "; no text that is scored may hold them" if files is ours else ""
        sentences.append(f"{sentence[0].upper()}{sentence[1:]}{note}.")
    for other, theirs in listed[1:]:
        _check_meaning(name, ours, other, theirs)
    return sentences


def _check_meaning(name: str, ours: _Files, other: str, theirs: _Files) -> None:
    """Refuse tokenizers that give a number to different tokens which neither of them has added."""
    left, right = ours.tokens or {}, theirs.tokens or {}
    clashes = [
        number
        for number in sorted(left.keys() & right.keys() - ours.added - theirs.added)
        if left[number] != right[number] and not any(_FREE.search(one[number]) for one in (left, right))
    ]
    if clashes:
        number = clashes[0]
        raise CheckpointError(
            f"tokenizer: {_counted(len(clashes), 'number')} of those of {name!r} and {other!r} mean different tokens: "
            f"token {number} is {left[number]!r} and {right[number]!r}. Their embeddings are mixed row by row.",
            "Only models of one vocabulary can be merged. If a folder has another's tokenizer, replace its files.",
        )


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _few(texts: Sequence[str]) -> str:
    return ", ".join(map(repr, texts[:4])) + (", ..." if len(texts) > 4 else "")


class _Files:
    """The files of one directory that are compared.

    Args:
        directory: The directory of a model.
    """

    def __init__(self, directory: Path) -> None:
        subject = f"{directory}: the tokenizer's files"
        with explained(subject, "Download or save the tokenizer again.", CheckpointError, "those of a tokenizer"):
            self._read(directory)

    def _read(self, directory: Path) -> None:
        fast, settings, special = (_json(directory / name) for name in (FAST, SETTINGS, SPECIAL))
        model = fast.get("model")
        model = model if isinstance(model, dict) else {}
        self.tokens = _tokens(directory, fast, model)
        self.added = _added(directory, fast)
        self.merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model.get("merges") or []]
        self.parts = {part: fast.get(part) for part in _PARTS} if fast else None
        self.kind = model.get("type")
        merged = {**special, **{key: value for key, value in settings.items() if value is not None}}
        self.special = {key: _content(merged.get(key)) for key in _SPECIAL}
        self.template = _template(directory, settings)
        listed = [one for one in fast.get("added_tokens") or [] if isinstance(one, dict)]
        self._marked = {one.get("id") for one in listed if one.get("special")}

    def is_idle(self, number: int) -> bool:
        """Whether a token is a special one that no setting and no chat template names."""
        text = (self.tokens or {})[number]
        return number in self._marked and text not in self.special.values() and text not in (self.template or "")


def _differences(first: str, ours: _Files, other: str, theirs: _Files) -> Iterator[str]:
    left, right = ours.tokens or {}, theirs.tokens or {}
    both = f"the tokenizers of {first!r} and {other!r}"
    yield from _clashes(both, left, right)
    for name, has, rest, lacks in ((first, left, right, other), (other, right, left, first)):
        known = set(rest.values())
        added = [number for number in sorted(has.keys() - rest.keys()) if has[number] not in known]
        if added:
            shown = _few([has[number] for number in added])
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


def _clashes(both: str, left: Mapping[int, str], right: Mapping[int, str]) -> Iterator[str]:
    """Numbers that mean different tokens, and tokens of two numbers; the first of each, in words."""
    clashes = [number for number in sorted(left.keys() & right.keys()) if left[number] != right[number]]
    if clashes:
        number = clashes[0]
        more = f" (the first of {len(clashes)} such)" if len(clashes) > 1 else ""
        yield f"In {both} token {number} differs: {left[number]!r} and {right[number]!r}{more}."
    numbers = {token: number for number, token in right.items()}
    told = set(clashes)
    moved = [
        (token, number, numbers[token])
        for number, token in sorted(left.items())
        if numbers.get(token, number) != number and numbers[token] not in told and number not in told
    ]
    if moved:
        token, here, there = moved[0]
        more = f" (the first of {len(moved)} such)" if len(moved) > 1 else ""
        yield f"In {both} the token {token!r} has the numbers {here} and {there}{more}."


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


def _added(directory: Path, fast: Mapping[str, Any]) -> set[int]:
    """Numbers of tokens that were added to a vocabulary: special ones, and those of ``added_tokens.json``."""
    listed = [one.get("id") for one in fast.get("added_tokens") or [] if isinstance(one, dict)]
    decoder = _json(directory / SETTINGS).get("added_tokens_decoder")
    listed += [int(key) for key in decoder if key.isdecimal()] if isinstance(decoder, dict) else []
    listed += [*_json(directory / "added_tokens.json").values()]
    return {number for number in listed if isinstance(number, int)}


def _template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template, or all of several, as one text."""
    if (directory / TEMPLATE).is_file():
        return file_bytes(directory / TEMPLATE).decode("utf-8", "replace").rstrip("\n")
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
    return foreign_or_none(path, LARGEST_TOKENIZER)
