"""Whether an adapter is merged into the base that it was trained on.

Factors fit any base of their shapes, and on another base they give wrong numbers. An adapter's configuration names its
base. Where files of that name are found, on this machine or in the hub's cache, the weights are compared; nothing is
downloaded. Otherwise the names are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ecotone.merging.kernel.lazy import formed
from ecotone.merging.models import hub
from ecotone.merging.models.checkpoint import ADAPTER_CONFIG, Checkpoint
from ecotone.merging.models.lora import Adapter
from ecotone.merging.models.model import Model
from ecotone.populations.errors import CheckpointError

ALL_BYTES = 2_000_000_000  # models up to this size are compared whole
SAMPLE = 16_384  # elements of each tensor that are compared in larger ones


@dataclass(frozen=True)
class BaseCheck:
    """The result of comparing an adapter's base with the one that it is merged into.

    Args:
        verdict: ``same`` and ``different`` are of weights, ``named`` and ``renamed`` of names.
        text: The result in words.
    """

    verdict: Literal["same", "different", "named", "renamed", "unknown"]
    text: str


def check(adapter: Adapter) -> BaseCheck:
    """Compare the base that an adapter names with the model it is merged into. May read both models' weights.

    Raises:
        CheckpointError: Their weights differ.
    """
    found = compared(adapter)
    if found.verdict == "different":
        raise CheckpointError(
            f"{adapter.path}: {found.text}. An adapter fits the weights it was trained on; on others it gives wrong "
            "numbers.",
            f"Give the base it names. If this is meant, name {str(adapter.base.path)!r} as base_model_name_or_path in "
            f"{adapter.path / ADAPTER_CONFIG}.",
        )
    return found


def compared(adapter: Adapter) -> BaseCheck:
    """Compare the base that an adapter names with the model it is merged into. May read both models' weights."""
    named, base = str(adapter.settings.get("base_model_name_or_path") or ""), adapter.base
    revision = str(adapter.settings.get("revision") or "")
    if not named:
        return BaseCheck("unknown", "it names no base: whether it was trained on this one is not known")
    place = _found(named, revision, adapter.path)
    if place is not None:
        try:
            difference, sampled = _difference(Checkpoint.open(place), base)
        except CheckpointError:  # of another format, or none of a whole model
            return _by_name(named, revision, base)
        if difference is not None:
            return BaseCheck("different", f"it was trained on {named!r} ({place}), whose {difference}")
        how = "the same weights, as far as a sample of each tensor tells" if sampled else "the same weights"
        return BaseCheck("same", f"its base {named!r} has {how}")
    return _by_name(named, revision, base)


def _by_name(named: str, revision: str, base: Model) -> BaseCheck:
    at = f"{named}@{revision}" if revision else named
    repository = hub.repository_of(base.path)
    known = {str(base.path), base.path.name, base.name, *([repository] if repository else [])}
    if named in known or Path(named).name in known:
        other = revision and repository and revision not in (base.path.name, "main")
        if not other:
            return BaseCheck("named", f"its base is called {at!r}, as this one is; the weights were not compared")
    return BaseCheck(
        "renamed",
        f"Warning: it names the base {at!r}, which is not on this machine; whether {base.name!r} ({base.path}) has the "
        "same weights is not known",
    )


def _found(named: str, revision: str, adapter: Path) -> Path | None:
    """The folder of a base by the name that an adapter has for it, if it is on this machine."""
    here = Path(named).expanduser()
    places = [here] if here.is_absolute() else [here.absolute(), adapter.absolute().parent / here]
    local = next((place for place in places if place.exists()), None)
    if local is not None or not hub.is_repository(named):
        return local
    try:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(named, revision=revision or None, local_files_only=True, allow_patterns=list(hub.FILES))
        )
    except Exception:  # not in the cache, or no huggingface_hub
        return None


def _difference(named: Checkpoint, base: Model) -> tuple[str | None, bool]:
    """The first difference of weights in words, or None; and whether a sample alone was compared.

    Rows that one of them lacks are passed over: a base may have been given tokens.
    """
    if named.path.resolve() == base.path.resolve():
        return None, False
    ours, theirs = base.tensors, named.tensors
    quantised = bool((named.config or {}).get("quantization_config"))
    if quantised or not set(ours) & set(theirs):
        raise CheckpointError(f"{named.path}: expected tensors like those of {base.path}, found none.")
    sampled = sum(info.nbytes for info in ours.values()) > ALL_BYTES
    for name in sorted(set(ours) & set(theirs)):
        one, other = ours[name], theirs[name]
        if one.shape[1:] != other.shape[1:]:
            return f"tensor {name!r} has shape {other.shape}, and that of {base.name!r} {one.shape}", sampled
        count = min(one.size, other.size)
        for low in range(0, count, 1_048_576):
            high = min(count, low + (SAMPLE if sampled else 1_048_576))
            left, right = base.flat(name)[low:high], named.flat(name)[low:high]
            if not _alike(formed(left), formed(right)):
                return f"weights differ from those of {base.name!r} ({base.path}), first in {name!r}", sampled
            if sampled:
                break
    return None, sampled


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether numbers are equal in the narrower of two types."""
    if one.dtype != other.dtype and one.is_floating_point() and other.is_floating_point():
        narrow = min(one.dtype, other.dtype, key=lambda kind: (kind.itemsize, -torch.finfo(kind).eps))
        one, other = one.to(narrow), other.to(narrow)
    return one.dtype == other.dtype and bool(torch.equal(one, other))
