"""Where the models of a merge are kept while candidates are made of them, chosen by the memory that is free.

    device   on the device that merges: no candidate moves a source
    host     in main memory, read and formed once; for a CUDA device page-locked, copied there stretch by stretch
    mapped   in their files: a candidate reads them through the system's page cache, forms what no file holds, and
             copies stretches to a CUDA device through a page-locked buffer

A CPU's own memory is main memory: there ``device`` means ``host``. Merged weights have the same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from ecotone.populations.errors import InputError

Placement: TypeAlias = Literal["device", "host", "mapped"]
Wish: TypeAlias = Literal["auto", "device", "host", "mapped"]
"""A placement, or leave to choose it."""

PLANNED = 0.9  # of free memory that ``auto`` plans with
LOCKED = 0.5  # of free main memory that ``auto`` page-locks: the system cannot take it back


@dataclass(frozen=True)
class Bytes:
    """A number of bytes on a CUDA device and a number of bytes in main memory."""

    device: int = 0
    host: int = 0

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.device + other.device, self.host + other.host)


@dataclass(frozen=True)
class Needs:
    """The memory that a worker takes, from the models' headers. Activations, data and Python itself come on top.

    Args:
        model: The resident model.
        buffers: Working memory for merging: a set of chunks for each thread, and for small models a stack.
        sources: The memory of the sources, by placement.
        formed: Whether keeping the sources in main memory saves work on a CPU and takes little memory.
    """

    model: Bytes
    buffers: Bytes
    sources: Mapping[Placement, Bytes]
    formed: bool = False

    def total(self, placement: Placement) -> Bytes:
        """The sum of both."""
        return self.model + self.buffers + self.sources[placement]


@dataclass(frozen=True)
class Free:
    """Free bytes of a CUDA device and of main memory; None where there is no device or the system does not say."""

    device: int | None = None
    host: int | None = None

    @classmethod
    def here(cls, device: torch.device) -> Free:
        """The memory that is free for this process now. The page cache counts as free. Obeys a container's limit."""
        cuda = device.type == "cuda" and torch.cuda.is_available()
        known = [free for free in (_available(), *map(_left, _groups())) if free is not None]
        return cls(torch.cuda.mem_get_info(device)[0] if cuda else None, min(known, default=None))

    def divided(self, device: float, host: int) -> Free:
        """A worker's part of the free memory: a share of the device, and one of ``host`` parts of main memory."""
        return Free(
            None if self.device is None else int(self.device * device), None if self.host is None else self.host // host
        )


def chosen(needs: Needs, free: Free, device: torch.device) -> Placement:
    """The placement that ``auto`` means: the nearest to the device that leaves as much again as the model takes.

    On a CPU mapped files are as near as copies of them; what is small is kept if its forming takes work.
    """
    room = Bytes(needs.model.device, needs.model.host)  # for activations
    if device.type == "cpu":
        return "host" if needs.formed and _takes(free.host, (needs.total("host") + room).host, PLANNED) else "mapped"
    if free.device is not None and _takes(free.device, (needs.total("device") + room).device, PLANNED):
        return "device"
    return "host" if free.host is not None and _takes(free.host, needs.total("host").host, LOCKED) else "mapped"


def settled(wish: Wish, needs: Needs, free: Free, share: Free, device: torch.device) -> Placement:
    """The placement that is wished for, if there is memory for it; ``auto`` is chosen.

    Args:
        wish: The placement that the recipe asks for.
        needs: The memory that a worker takes.
        free: The most memory that it may take.
        share: The memory that ``auto`` plans with, where workers have yet to take their parts.
        device: The device on which it merges.

    Raises:
        InputError: There is no memory for the model, or for the sources where they are to be.
    """
    _check("memory", "the model and buffers of merging", needs, "mapped", free, _LESS)
    if wish == "auto":
        return chosen(needs, share, device)
    placement: Placement = "host" if wish == "device" and device.type == "cpu" else wish
    remedy = f"{_LESS} Or say auto, or mapped, which keeps no source in memory."
    _check(f"runtime.sources: {wish}", "the model, the sources and buffers of merging", needs, placement, free, remedy)
    return placement


_LESS = "Free memory, run fewer workers on the machine, or merge in 16 bits (merge.dtype: bfloat16)."


def _check(field: str, what: str, needs: Needs, placement: Placement, free: Free, remedy: str) -> None:
    total = needs.total(placement)
    for available, taken, place in (
        (free.device, total.device, "on the GPU"),
        (free.host, total.host, "in main memory"),
    ):
        if not _takes(available, taken):
            wanted, found = apart(taken, available or 0)
            raise InputError(
                f"{field}: expected {wanted} {place} for each worker ({what}), found {found} free.",
                remedy,
            )


def _takes(free: int | None, needed: int, share: float = 1.0) -> bool:
    return free is None or needed <= share * free


def readable(count: float, digits: int = 1) -> str:
    """A number of bytes in decimal units, with as many digits after the point."""
    size = float(count)
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.{digits}f} {unit}"
        size /= 1000
    return f"{size:.{digits}f} TB"


def apart(needed: float, found: float) -> tuple[str, str]:
    """Two numbers of bytes that differ, in decimal units, with as many digits as it takes to see that they differ."""
    texts = [(readable(needed, digits), readable(found, digits)) for digits in range(1, 13)]
    return next((pair for pair in texts if pair[0] != pair[1]), texts[0])


# -- free main memory on Linux -------------------------------------------------------------------------------


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None


def _groups() -> Iterator[Path]:
    """Folders of the control groups that limit this process's memory, in both layouts of Linux."""
    try:
        lines = Path("/proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, place = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup", kinds)
        folder = root / place.lstrip("/")
        yield from (parent for parent in (folder, *folder.parents) if parent.is_relative_to(root))


def _left(group: Path) -> int | None:
    """Bytes that a control group's limit leaves, its page cache counted as free; None without a limit."""
    for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            most, used = int((group / limit).read_text()), int((group / usage).read_text())
            fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cached = sum(int(fields.get(name, 0)) for name in ("active_file", "inactive_file"))
        except (OSError, ValueError):  # no such file, or "max"
            continue
        return max(0, most - used + cached)
    return None
