"""Headers of safetensors files, by the format's own rules (https://github.com/huggingface/safetensors#format).

A file is eight bytes (the header's length, little-endian), a header of JSON with the type, shape and place of every
tensor, then the tensors' bytes without a gap. What the library ``safetensors`` refuses is refused here, too: places
that overlap, leave holes, do not begin at 0 or do not reach the end of the file; numbers that are no whole ones; a
shape whose size overflows; a header above 100 MB; text that is not UTF-8; metadata other than text by text. Entries may
lie in any order, and JSON's white space may follow the header, as writers pad it.

Six rules are stricter than the library's:

- The header begins with ``{``, as the format asks.
- No key stands twice. The library takes the last, and other readers the first.
- An entry is an object, never a list of its values.
- A tensor's name is not empty, has at most ``LONGEST_NAME`` characters, and all of them can be printed.
- The extents that are not 0 have a product below 2**63, or torch could not hold the shape.
- The type is one that torch has.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ecotone.merging.models.model import TensorInfo
from ecotone.populations.errors import CheckpointError, shown
from ecotone.populations.parsing import MalformedError, check_depth, json_object, kind_of, uncollected

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_OF_NEWER_TORCH = {
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
DTYPES |= {name: getattr(torch, kind) for name, kind in _OF_NEWER_TORCH.items() if hasattr(torch, kind)}
HEADER_LIMIT = 100_000_000
"""The format's own limit, in bytes."""
LONGEST_NAME = 1000
"""The most characters of a tensor's name."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_KINDS = {name: (dtype, dtype.itemsize) for name, dtype in DTYPES.items()}
_MINUS_ZERO = re.compile(rb"[\[,:\s]-0[\s,\]}]")
_LARGEST_SIZE = 2**63 - 1
_DEEPEST = 126  # the library's parser goes 128 deep; two levels are the header and its entry


@dataclass(frozen=True)
class Header:
    """What the header of a safetensors file says.

    Args:
        tensors: By name, what each tensor is, in the header's order.
        places: By name, the first byte of the tensor in the file.
        metadata: Free text.
    """

    tensors: Mapping[str, TensorInfo]
    places: Mapping[str, int]
    metadata: Mapping[str, str]


def read(path: Path) -> Header:
    """The header of a safetensors file, checked against the size of the file.

    Raises:
        CheckpointError: The file is not safetensors, is corrupt or truncated, or has a type that torch lacks.
        OSError: It cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        found = "a folder" if path.is_dir() else "a pipe, a socket or a device"
        raise CheckpointError(f"{path}: expected a safetensors file, found {found}.", "Give the path of a file.")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > HEADER_LIMIT < size:
            raise corrupt(path, f"the header should take {length} bytes and the format allows {HEADER_LIMIT}")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise corrupt(path, f"the header should take {length} bytes and the file has {size}")
        text = file.read(length)
    if len(text) < length:
        raise corrupt(path, f"the header should take {length} bytes and only {len(text)} can be read")
    try:
        with uncollected():
            return parsed(text, size - 8 - length)
    except _UnknownTypeError as error:
        raise CheckpointError(
            f"{path}: {error}, which torch {torch.__version__} cannot read; expected one of {', '.join(DTYPES)}.",
            "Give the checkpoint in bfloat16 or float32; types of fewer than 8 bits are those of quantised weights.",
        ) from error
    except MalformedError as error:
        raise corrupt(path, f"its header cannot be read ({error})") from error
    except _MisfitError as error:
        raise corrupt(path, str(error)) from error


def corrupt(path: Path, reason: str) -> CheckpointError:
    """The error of a file that is no whole safetensors file."""
    return CheckpointError(
        f"{path}: expected a complete safetensors file, but {reason}.", "Download or export the file again."
    )


class _UnknownTypeError(ValueError):
    """A type that torch lacks."""


class _MisfitError(ValueError):
    """Places that do not fit the shapes, each other or the file."""


def parsed(text: bytes, data: int) -> Header:
    """What a header says of ``data`` bytes of tensors behind it.

    Raises:
        ValueError: It breaks a rule of the format's, or one of ours.
    """
    record = _record(text)
    metadata = _metadata(record.pop("__metadata__", None))
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, int] = {}
    spans: list[tuple[int, int, str]] = []
    before = 8 + len(text)
    for name, entry in record.items():
        info, start, stop = _entry(name, entry)
        if stop > data:
            reason = f"tensor {shown(name)!r} ends at byte {before + stop} and the file has {before + data} bytes"
            raise _MisfitError(reason)
        tensors[name], places[name] = info, before + start
        spans.append((start, stop, name))
    _check_cover(spans, data)
    return Header(tensors, places, metadata)


def _record(text: bytes) -> dict[str, Any]:
    """The JSON of a header."""
    if text[:1] != b"{":
        raise MalformedError("a header that begins with {", repr(text[:8])[1:] if text else "an empty one")
    record = json_object(text, depth=None)
    if b"-0" in text and _MINUS_ZERO.search(text):
        json.JSONDecoder(parse_int=_not_minus_zero).decode(text.decode())  # Python alone takes -0 for 0
    return record


def _not_minus_zero(number: str) -> int:
    if number == "-0":
        raise MalformedError("whole numbers from 0", number)
    return int(number)


def _metadata(found: Any) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise MalformedError("an object of text as __metadata__", kind_of(found))
    for key, value in found.items():
        if not isinstance(value, str):
            raise MalformedError(f"text as {shown(key, 80)!r} of __metadata__", kind_of(value))
    return found


def _entry(name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """What a tensor is, and its first byte and the one after its last."""
    if (not name.isprintable() and shown(name) != name) or not 0 < len(name) <= LONGEST_NAME:
        raise MalformedError(f"names of 1 to {LONGEST_NAME} characters that can be printed", repr(shown(name, 80)))
    if type(entry) is not dict:
        raise MalformedError(f"an object for tensor {name!r}", kind_of(entry))
    kind, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if type(kind) is not str or type(shape) is not list or type(offsets) is not list or len(offsets) != 2:
        raise MalformedError(f"dtype, shape and two data_offsets for tensor {name!r}", shown(repr(entry), 200))
    if len(entry) > 3:
        check_depth(entry, _DEEPEST)
    if kind not in _KINDS:
        raise _UnknownTypeError(f"tensor {name!r} has the type {shown(kind, 40)}")
    size = _size(name, shape)
    start, stop = offsets
    if type(start) is not int or type(stop) is not int or not 0 <= start <= stop:
        raise MalformedError(f"whole data_offsets that rise from 0 for tensor {name!r}", shown(repr(offsets), 100))
    dtype, item = _KINDS[kind]
    if stop - start != size * item:
        raise _MisfitError(f"tensor {name!r} should take {size * item} bytes, its header gives {stop - start}")
    return TensorInfo(tuple(shape), dtype), start, stop


def _size(name: str, shape: list[Any]) -> int:
    """The number of elements of a shape."""
    size = largest = 1
    for extent in shape:
        if type(extent) is not int or extent < 0:
            raise MalformedError(f"whole numbers from 0 as the shape of tensor {name!r}", shown(repr(shape), 100))
        size *= extent
        largest *= extent or 1
        if largest > _LARGEST_SIZE:
            raise MalformedError(f"a shape of fewer than 2**63 elements for tensor {name!r}", shown(repr(shape), 100))
    return size


def _check_cover(spans: list[tuple[int, int, str]], data: int) -> None:
    """Refuse tensors that overlap, and bytes of the file that are no tensor's."""
    spans.sort()
    end, before = 0, ""
    for start, stop, name in spans:
        if start < end:
            raise _MisfitError(f"tensors {before!r} and {name!r} overlap (byte {start} of the data is in both)")
        if start > end:
            raise _MisfitError(f"bytes {end} to {start} of the data, before tensor {name!r}, are no tensor's")
        end, before = stop, name
    if end < data:
        raise _MisfitError(f"{data - end} bytes follow the last tensor")


# -- writing ---------------------------------------------------------------------------------------------------


def written(entries: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file, up to the tensors' own, and the position in the file where each tensor begins.

    Args:
        entries: The tensors in the order of the file. With wide types first all are aligned.
        metadata: Free text.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    starts, end = {}, 0
    for name, info in entries.items():
        starts[name], end = end, end + info.nbytes
        header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = len(text).to_bytes(8, "little") + text
    return first, {name: len(first) + start for name, start in starts.items()}
