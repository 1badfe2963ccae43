"""Bases for conformance suites: operators that prepare whole matrices, given invented statistics of layers."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ecotone.fitness.preparing.layers import Unit
from ecotone.fitness.preparing.prepare import Preparation
from ecotone.merging.basis import Bases
from ecotone.merging.models.model import Model
from ecotone.merging.models.names import Names
from ecotone.merging.operators.whole import Known, WholeMatrices
from ecotone.merging.sources import Sources


def invented(names: Sequence[str], shape: Sequence[int]) -> Known:
    """Statistics of a layer with matrices (out, in), drawn from seeds that the experts' names give.

    Args:
        names: K names.
        shape: out and in.
    """
    out, width = shape
    generators = [torch.Generator().manual_seed(zlib.crc32(name.encode())) for name in names]

    def moment(size: int, generator: torch.Generator) -> Tensor:
        rows = torch.randn(4 * size, size, generator=generator, dtype=torch.float64)
        return rows.mT @ rows / len(rows)

    inputs = [moment(width, generator) for generator in generators]
    slopes = [moment(out, generator) for generator in generators]
    fisher = [torch.rand(out, width, generator=generator, dtype=torch.float64) for generator in generators]
    return Known(inputs, slopes, fisher, (), [8 * width] * len(names))


def own_outputs(known: Known, experts: Sequence[Tensor]) -> Known:
    """The statistics with what the experts make of the same inputs."""
    outputs = [gram @ expert.mT for gram, expert in zip(known.inputs, experts, strict=True)]
    return Known(known.inputs, known.slopes, known.fisher, outputs, known.rows)


def invented_moments(sources: Sources, folder: Path) -> dict[str, str]:
    """Files of second moments of the experts, by their names: tiny, and drawn from seeds that the names give.

    Args:
        sources: The models.
        folder: The folder that they are written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name in sources.names:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        parameters = sources.layout.parameters
        moments = {key: 1e-18 * torch.rand(info.shape, generator=generator) for key, info in parameters.items()}
        paths[name] = str(folder / f"{name}.safetensors")
        save_file(moments, paths[name])
    return paths


class _Invented(Preparation):
    """Prepares with invented statistics."""

    def _in_turn(
        self, found: Sequence[Unit], module: nn.Module | None, names: Names | None
    ) -> Iterator[tuple[Unit, Known | None]]:
        if self._moments is not None:  # read from files
            yield from super()._in_turn(found, module, names)
            return
        for unit in found:
            if self._operator.elementwise:
                draws = torch.Generator().manual_seed(zlib.crc32(unit.at.name.encode()))
                yield unit, Known(votes=[torch.zeros(0), torch.randn(unit.at.shape, generator=draws)])
                continue
            if unit.at.kind not in ("linear", "convolution") or unit.stacked:
                yield unit, Known()
                continue
            matrices = [self._matrix(unit, model) for model in self._sources.experts]
            yield unit, own_outputs(invented(self._sources.names, matrices[0].shape), matrices)

    @staticmethod
    def _matrix(unit: Unit, model: Model) -> Tensor:
        weight, *bias = (model.tensor(name).double() for name in unit.names)
        return unit.matrix(weight, bias[0] if bias else None)


def prepared(sources: Sources, operator: WholeMatrices, folder: Path) -> tuple[Model, ...]:
    """K vectors that ``operator`` prepares of small models, as models.

    Args:
        sources: The models, of task arithmetic.
        operator: The operator.
        folder: The folder that the basis is written to.
    """
    if "second_moments" in operator.wanted:
        paths = invented_moments(sources, folder.with_name(f"{folder.name}-moments"))
        operator = replace(operator, second_moments=paths)  # type: ignore[call-arg]
    preparation = _Invented(sources, operator, {}, None, (), torch.device("cpu"))
    layout, columns = preparation.shape
    basis = Bases(folder).find(preparation.key)
    if basis is None:
        with Bases(folder).writer(preparation.key, layout, columns) as writer:
            preparation.write(writer)
        basis = Bases(folder).find(preparation.key)
    assert basis is not None
    return basis.models()
