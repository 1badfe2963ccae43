"""Texts as inputs of a model, without labels: what operators that read data prepare their vectors from.

``texts`` is a data function, as calibration tasks name them::

    calibration:
      - name: poems
        data:
          call: ecotone.fitness.language.inputs:texts
          arguments: {files: [poems.jsonl], tokenizer: base}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecotone.fitness.data import MASK, Inputs
from ecotone.fitness.language.texts import context_of, documents, padded, tokenizer_of
from ecotone.merging.models.checkpoint import located
from ecotone.populations.errors import InputError

TOKENS = 512
"""The most tokens of a text that are read."""


def texts(
    files: Sequence[str], tokenizer: str, field: str = "text", tokens: int = TOKENS, limit: int | None = None
) -> dict[str, Tensor]:
    """The texts of files as ``input_ids`` and ``attention_mask``, both (N, L), with the tokenizer's special tokens.

    Args:
        files: Files in UTF-8. A ``.jsonl`` file has one record a line; any other file has one text a line.
        tokenizer: A folder, or a repository of the hub, with the tokenizer.
        field: The field of a record that holds the text.
        tokens: The most tokens of a text; the model's own limit if that is less. What follows is left out.
        limit: The most texts, from the first on; None takes all.

    Raises:
        InputError: A file cannot be read, holds no text, or a line lacks the field; or there is no tokenizer.
    """
    folder = str(located(tokenizer))
    loaded = tokenizer_of(folder)
    most = min(tokens, context_of(folder, loaded) or tokens)
    found = [text for name in files for text in _texts(Path(name).expanduser(), field)][:limit]
    if not found:
        raise InputError(f"texts: expected text, found none in {', '.join(map(str, files))}.")
    given: list[list[int]] = loaded(found, truncation=True, max_length=most, verbose=False)["input_ids"]
    rows = [row for row in given if row]
    if not rows:
        raise InputError(f"texts: expected text, found none in {', '.join(map(str, files))}.")
    ids = padded(rows, torch.device("cpu"))
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, MASK: (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def _texts(file: Path, field: str) -> list[str]:
    found = documents([file], field, "texts")
    return found if file.suffix == ".jsonl" else [line for line in found[0].splitlines() if line.strip()]


def answers(outputs: Any, _inputs: Inputs) -> Tensor:
    """What a model says of each text or token: its logits, or its last hidden states where it has no logits.

    Raises:
        InputError: It has neither.
    """
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(outputs, name, None), Tensor):
            return found
    if isinstance(outputs, Tensor):
        return outputs
    raise InputError(f"expected outputs with logits or last_hidden_state, found {type(outputs).__name__}.")


def answering() -> Any:
    """A head that computes nothing (``answers``): for data whose labels and losses nobody reads."""
    return answers
