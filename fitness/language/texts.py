"""Text data of language objectives: files, their seeded parts, and tokens, read and made once a worker.

Data are files in UTF-8. A ``.jsonl`` file has one record a line (a JSON object); any other file is one document. A part
is drawn by the seed alone: objectives on the same data with the same seed and share have ``search`` and ``held_out``
parts without a record in common, and a smaller limit takes a subset of what a larger one takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator

from ecotone.extras import how_to_install
from ecotone.fitness.kinds import ObjectiveSettings
from ecotone.populations.errors import InputError, first_line, nearest
from ecotone.populations.parsing import MalformedError, foreign_or_none, json_value

Record: TypeAlias = dict[str, Any]

TOKENS = {"cpu": 2048, "cuda": 32768}
"""By kind of device, tokens in one forward pass where the recipe names no batch."""


class TextSettings(ObjectiveSettings):
    """Base of the objectives on files: the records that models are scored on.

    Attributes:
        data: A text file (UTF-8), or several files whose records follow one another. Paths are relative to the recipe's
            folder, or begin with ``prepared:``. A ``.jsonl`` file has one record in each line.
        part: The records to score on: ``all``, or the ``search`` or ``held_out`` part. The seed divides the records
            into these two parts. Each part gets at least one record.
        seed: The seed that divides the records into ``search`` and ``held_out``.
        share: The share of the records that the ``search`` part gets.
        limit: The most records of the part to score on; None takes the whole part.
        batch: Rows in one forward pass; None lets Ecotone choose.
        bos: Put the start token first. None puts it where the tokenizer has a start token.
    """

    data: str | tuple[str, ...]
    part: Literal["search", "held_out", "all"] = "all"
    seed: int = Field(default=0, ge=0)
    share: float = Field(default=0.5, gt=0, lt=1)
    limit: int | None = Field(default=None, ge=1)
    batch: int | None = Field(default=None, ge=1)
    bos: bool | None = None

    by_example: ClassVar[bool | None] = True
    needs_tokenizer: ClassVar[bool] = True
    paths: ClassVar[tuple[str, ...]] = ("data",)

    @field_validator("data")
    @classmethod
    def _some(cls, data: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not data:
            raise ValueError("expected a file, found none")
        return data

    @property
    def files(self) -> list[Path]:
        """The files of ``data``."""
        return [Path(name) for name in ([self.data] if isinstance(self.data, str) else self.data)]

    def chosen(self, count: int) -> NDArray[np.int64]:
        """(n,) ascending numbers, of 0 to count - 1, of the records that are in the part.

        Raises:
            InputError: There are too few records to divide.
        """
        if count < (1 if self.part == "all" else 2):
            raise InputError(
                f"{self.where}: data: expected at least {1 if self.part == 'all' else 2} items for part "
                f"{self.part!r}, found {count}."
            )
        order = np.random.default_rng(self.seed).permutation(count)
        first = min(max(round(self.share * count), 1), count - 1)
        taken = {"all": order, "search": order[:first], "held_out": order[first:]}[self.part]
        return np.sort(taken[: self.limit])


# -- files ---------------------------------------------------------------------------------------------------


def documents(files: Sequence[Path], field: str, where: str) -> list[str]:
    """The documents of the files that are not empty: lines' ``field`` of a ``.jsonl``, any other file whole.

    Raises:
        InputError: A file cannot be read, is not UTF-8, or a line lacks the field; or no document has text.
    """
    texts: list[str] = []
    for file in files:
        if file.suffix == ".jsonl":
            texts += [_text(record, field, f"{where}: {place}") for place, record in _lines(file, where)]
        else:
            texts.append(_read(file, where))
    texts = [text for text in texts if text]
    if not texts:
        raise InputError(f"{where}: data: expected text, found none in {_named(files)}.")
    return texts


def records(files: Sequence[Path], where: str) -> list[tuple[str, Record]]:
    """The records of ``.jsonl`` files, each with the place it stands at (``file:line``).

    Raises:
        InputError: A file is no ``.jsonl``, cannot be read, or a line is no JSON object; or there are no records.
    """
    listed: list[tuple[str, Record]] = []
    for file in files:
        if file.suffix != ".jsonl":
            raise InputError(f"{where}: data: expected a .jsonl file, found {file}.", "Write one JSON object a line.")
        listed += _lines(file, where)
    if not listed:
        raise InputError(f"{where}: data: expected records, found none in {_named(files)}.")
    return listed


def filled(template: str, record: Record, where: str) -> str:
    """``template`` with ``{field}`` replaced by the record's; ``{choices[0]}`` is the first of a list.

    Raises:
        InputError: The record lacks a field, or the template is not well formed.
    """
    try:
        return template.format_map(record)
    except KeyError as error:
        name = str(error.args[0])
        raise InputError(
            f"{where}: expected a field {name!r}, as the template names, found none.", nearest(name, list(record))
        ) from error
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise InputError(
            f"{where}: template: cannot be filled ({error}).", "A brace that is text is written twice: {{ or }}."
        ) from error


def _lines(file: Path, where: str) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(_read(file, where).removeprefix("\ufeff").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json_value(line, once=False, finite=False)
        except MalformedError as error:
            raise InputError(f"{where}: {file}:{number}: expected a JSON object ({error}).") from error
        if not isinstance(record, dict):
            raise InputError(f"{where}: {file}:{number}: expected a JSON object, found {type(record).__name__}.")
        yield f"{file}:{number}", record


def _text(record: Record, field: str, where: str) -> str:
    if field not in record:
        raise InputError(f"{where}: expected a field {field!r}, found none.", nearest(field, list(record)))
    if not isinstance(record[field], str):
        raise InputError(f"{where}: {field}: expected text, found {type(record[field]).__name__}.")
    return str(record[field])


def _read(file: Path, where: str) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"{where}: data: cannot read {file} ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: data: {file}: expected UTF-8 ({error.reason} at byte {error.start}).") from error


def _named(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files))


# -- tokens --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def tokenizer_of(folder: str) -> Any:
    """The Hugging Face tokenizer of a checkpoint's folder.

    Raises:
        InputError: transformers is not installed, or the folder has no tokenizer.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise InputError("language objectives need transformers.", f"`{how_to_install('hf')}`.") from error
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(
            f"tokenizer: cannot be loaded from {folder} ({first_line(error)}).",
            "Copy the base model's tokenizer files there.",
        ) from error


def encoded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, without special tokens."""
    if not texts:
        return []
    tokens: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return tokens


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts its BOS token before a text."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def context_of(folder: str, tokenizer: Any) -> int | None:
    """Tokens the model of a folder can take at once, by its ``config.json``, or else its tokenizer; None: unknown."""
    config = foreign_or_none(Path(folder) / "config.json")
    text = config.get("text_config")
    config = {**config, **(text if isinstance(text, dict) else {})}
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        if isinstance(config.get(name), int) and config[name] > 0:
            return int(config[name])
    length = getattr(tokenizer, "model_max_length", None)
    return int(length) if length is not None and 0 < length < 10**9 else None


def batches(lengths: Sequence[int], batch: int | None, device: torch.device) -> list[NDArray[np.int64]]:
    """Numbers of the sequences in each forward pass: like length together, the longest first.

    Args:
        lengths: Tokens of each sequence.
        batch: The most in one pass; None keeps padded passes within ``TOKENS``, one sequence at least.
        device: The device of the model.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    parts, start = [], 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        size = batch or max(1, TOKENS.get(device.type, TOKENS["cuda"]) // longest)
        parts.append(order[start : start + size])
        start += size
    return parts


def padded(sequences: Sequence[Sequence[int]], device: torch.device, *, left: bool = False) -> torch.Tensor:
    """(n, L) tokens, each sequence repeating its last token (on the left: its first) where it is shorter than L.

    A repeated token, because some models treat their padding token apart.
    """
    longest = max(map(len, sequences))
    rows = [_fill(list(tokens), longest - len(tokens), left) for tokens in sequences]
    return torch.tensor(rows, dtype=torch.long, device=device)


def _fill(tokens: list[int], missing: int, left: bool) -> list[int]:
    return tokens[:1] * missing + tokens if left else tokens + tokens[-1:] * missing


def mean(values: NDArray[Any]) -> float:
    """The mean in float64, the same bits in any process."""
    return math.fsum(values.tolist()) / len(values)
