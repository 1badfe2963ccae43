"""Opening the models of a worker from its spec."""

from __future__ import annotations

import weakref

import torch

from ecotone.fitness.specs import WorkerSpec
from ecotone.merging.basis import Basis, SideBySide
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError


def open_sources(spec: WorkerSpec, basis: Basis | SideBySide | None = None) -> Sources:
    """The models of a worker, opened; only headers are read.

    Args:
        spec: The spec from which the worker is made.
        basis: The vectors that its operator has prepared. An operator that prepares merges nothing without.

    Raises:
        EcotoneError: As for ``Sources.open``.
    """
    models = (spec.experts, spec.base, spec.operator, spec.names, spec.settings, spec.vocabulary)
    if basis is None:
        return Sources.open(*models, spec.sources, spec.treatment, spec.config, spec.rank)
    held = basis.hold()
    sources = Sources.open(*models, spec.sources, spec.treatment, spec.config, spec.rank, basis.models())
    weakref.finalize(sources, held.close)
    return sources


def device_of(name: str) -> torch.device:
    """The device of that name; ``auto`` is a GPU where there is one.

    Raises:
        InputError: There is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device: expected a CUDA device, found none.", "Use device auto or cpu.")
    if name not in ("cpu", "cuda"):
        raise InputError(f"device: expected auto, cpu or cuda, found {name!r}.")
    return torch.device(name)


def kind_of(spec: WorkerSpec, sources: Sources) -> torch.dtype | None:
    """The floating-point type of the resident model; None for the types of the tensors of a dict.

    Raises:
        InputError: The spec's type is none.
    """
    stored = None if spec.architecture is None else sources.layout.dtype
    return _dtype(spec.dtype) or stored


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    kind = getattr(torch, name, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise InputError(f"dtype: expected float32, bfloat16 or float16, found {name!r}.")
    return kind
