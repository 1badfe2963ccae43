"""Reading arrays of numbers from bytes: bounded, of numbers alone, and every failure told in words.

It is the part of ``ecotone.populations.parsing`` that needs NumPy, which commands such as ``--help`` do without.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ecotone.populations.errors import first_line, shown
from ecotone.populations.parsing import LARGEST_ARRAY, MalformedError, unpacked


def numbers(data: bytes | memoryview, kind: str, size: int | None = None) -> NDArray[Any]:
    """The array of numbers that ``data`` holds, read-only.

    Args:
        data: The bytes.
        kind: The type as NumPy writes it, ``<f8`` for instance: a number or a truth, never an object.
        size: How many there should be; None takes as many as there are.

    Raises:
        MalformedError: The type is none of numbers, or the bytes are too many or too few.
    """
    try:
        dtype = np.dtype(kind)
    except (TypeError, ValueError, SyntaxError, AttributeError) as error:
        raise MalformedError("a type of numbers", shown(str(kind), 40)) from error
    if dtype.kind not in "biufc" or dtype.itemsize == 0:
        raise MalformedError("a type of numbers", shown(str(kind), 40))
    try:
        found = np.frombuffer(data, dtype) if len(data) else np.empty(0, dtype)
    except (ValueError, TypeError, BufferError) as error:
        raise MalformedError(f"whole numbers of {dtype.itemsize} bytes", first_line(error)) from error
    if size is not None and found.size != size:
        raise MalformedError(f"{size} numbers", f"{found.size}")
    return found


def packed_numbers(blob: bytes, kind: str, size: int | None = None) -> NDArray[Any]:
    """The array that zlib packed into ``blob``, as for ``numbers``. A size bounds what is unpacked.

    Raises:
        MalformedError: It is damaged, or the type or the size is another.
    """
    item = np.dtype(kind).itemsize if size is not None and re.fullmatch(r"[<>|=]?[biufc]\d{1,2}", kind) else 1
    return numbers(unpacked(blob, LARGEST_ARRAY if size is None else size * item), kind, size)
