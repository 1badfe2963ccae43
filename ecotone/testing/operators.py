"""A conformance suite for merge operators.

The author of an operator gives its tests a subclass with the operators::

    from ecotone.testing.operators import OperatorConformance
    from my_package import Mine

    class TestMine(OperatorConformance):
        operators = (Mine(),)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ecotone.merging import operators
from ecotone.merging.export import export_file
from ecotone.merging.kernel.materialise import accumulator
from ecotone.merging.operators.base import Operator
from ecotone.merging.operators.one_of import OneOf
from ecotone.merging.operators.stack import preparing
from ecotone.merging.operators.whole import WholeMatrices
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome
from ecotone.testing.prepared import prepared

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COUNTS = (1, 2, 3, 8)

Opened: TypeAlias = Callable[..., Sources]
"""Gives the sources of some small models under the operator: takes their type, ``alike`` and settings."""


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return tensor.flatten().contiguous().view(torch.uint8)


def model(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A small model with large and small weights, signed zeros and subnormals."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "a.weight": torch.randn(7, 5, generator=generator) * 10 ** (4 * torch.rand(7, 5, generator=generator) - 3),
        "a.bias": torch.tensor([0.0, -0.0, 1e-7, -1e-6, 6e-5]),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def streamed() -> list[str]:
    """The names of the operators that can be used and prepare nothing: they work on pieces as these are mixed."""
    usable = sorted(operators.OPERATORS.usable())
    return [name for name in usable if not isinstance(operators.get(name), WholeMatrices)]


def opened_under(operator: Operator, experts: Sequence[Path], base: Path | None, folder: Path) -> Sources:
    """The sources of some models; of an operator that prepares its vectors, with vectors of invented statistics."""
    settings = {field.name: getattr(operator, field.name) for field in _fields(operator)}
    parts = preparing(operator).values()
    if not parts:
        return Sources.open(experts, base, operator.name, settings=settings)
    plain = Sources.open(experts, base, "task_arithmetic")
    vectors = [vector for one in parts for vector in prepared(plain, one, folder / "bases")]
    return Sources.open(experts, base, operator.name, settings=settings, basis=vectors)


def width(sources: Sources) -> int:
    """K, how many coefficients a segment has."""
    return len(sources.operator.columns(sources.names))


def summed(sources: Sources, genome: Genome, tensor: str, dtype: torch.dtype) -> Tensor:
    """One tensor of a merge of one segment, rounded as the kernel promises."""
    models = sources.read(tensor)
    kind = accumulator(models)
    weights = torch.tensor(sources.mixture(genome).weights[0], dtype=kind)
    terms = [weight * values.to(kind) for weight, values in zip(weights, models, strict=True) if weight]
    total: Tensor = sum(terms[1:], start=terms[0])
    return total.to(dtype)


def materialised(sources: Sources, genome: Genome, dtype: torch.dtype) -> dict[str, Tensor]:
    """A merge, tensor by tensor."""
    out = {name: torch.full(info.shape, torch.nan, dtype=dtype) for name, info in sources.layout.parameters.items()}
    sources.materialise([genome], [out])
    return out


def stacked(sources: Sources, row: Any) -> dict[str, Tensor]:
    """A merge of one segment, as one of a stack."""
    return {name: value[0] for name, value in sources.stack([Genome.uniform(sources.layout.size, row)]).items()}


def _fields(operator: Operator) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(operator)  # type: ignore[arg-type]


def _merges(operator: Operator, count: int) -> bool:
    """Whether the operator merges so many models."""
    try:
        operator.columns([str(i) for i in range(count)])
    except InputError:
        return False
    return True


class OperatorConformance:
    """Inherit it, and give ``operators``, which must be registered.

    Attributes:
        operators: The operators, with settings at their defaults.
        partial: Names of operators that drop entries whatever their settings, also of an expert that is alone.
    """

    operators: ClassVar[Sequence[Operator]] = ()
    partial: ClassVar[Collection[str]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run every test over every operator, type and number of models."""
        if "operator" in metafunc.fixturenames:
            metafunc.parametrize("operator", self.operators, ids=[one.name for one in self.operators])
        if "count" in metafunc.fixturenames:
            metafunc.parametrize("count", COUNTS)
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", DTYPES, ids=str)

    @pytest.fixture
    def opened(self, operator: Operator, count: int, tmp_path: Path) -> Opened:
        """The sources of so many models; skips a number of them that the operator does not merge."""
        if not _merges(operator, count):
            pytest.skip("it does not merge so many models")

        def build(dtype: torch.dtype, alike: bool = False, **settings: Any) -> Sources:
            for seed in range(count + 1):
                save_file(model(0 if alike else seed, dtype), tmp_path / f"{seed}.safetensors")
            experts = [tmp_path / f"{seed}.safetensors" for seed in range(1, count + 1)]
            base = tmp_path / "0.safetensors" if operator.needs_base else None
            return opened_under(operators.get(operator.name, settings), experts, base, tmp_path)

        return build

    def test_seeds_reproduce_the_experts_as_they_are_mixed_bit_for_bit(
        self, opened: Opened, dtype: torch.dtype
    ) -> None:
        """The rows of ``seeds`` are the experts, as they are mixed."""
        sources = opened(dtype)
        space = sources.space()
        assert space.seeds.shape == (len(space.seed_names), space.dimension)
        for row, name, expert in zip(space.seeds, space.seed_names, sources.experts, strict=True):
            assert name == expert.name
            genome = Genome.uniform(space.size, row)
            for merged in (materialised(sources, genome, dtype), stacked(sources, row)):
                for tensor, values in merged.items():
                    assert torch.equal(bits(values), bits(summed(sources, genome, tensor, dtype)))
                    if not sources.operator.changes:
                        assert torch.equal(bits(values), bits(expert.tensor(tensor)))

    def test_what_is_mixed_does_not_depend_on_where_it_is_cut(self, opened: Opened, dtype: torch.dtype) -> None:
        """A transform gives the same bits in pieces and whole."""
        sources = opened(dtype)
        for name in sources.layout.tensors:
            whole, stretch = sources.read(name), sources.stretch(name)
            assert [t.numel() for t in whole] == [stretch.size] * len(sources.checkpoints)
            assert [t.dtype for t in whole] == [t.dtype for t in stretch.sample()]
            pieces = [stretch[low : low + 3].tensors() for low in range(0, stretch.size, 3)]
            for j, values in enumerate(whole):
                assert torch.equal(bits(torch.cat([piece[j] for piece in pieces])), bits(values))

    def test_the_order_of_the_models_does_not_matter(
        self, opened: Opened, operator: Operator, dtype: torch.dtype, tmp_path: Path
    ) -> None:
        """Models in another order give the same sources in that order."""
        if "mask_seed" in operator.searchable:
            pytest.skip("each place has a mask of its own")
        if isinstance(operator, WholeMatrices):
            pytest.skip("sums in another order differ in their last bits; the tests of layers compare them")
        sources = opened(dtype)
        paths = [expert.path for expert in sources.experts]
        order = np.random.default_rng(len(paths)).permutation(len(paths))
        base = None if sources.base is None else sources.base.path
        turned = opened_under(operator, [paths[i] for i in order], base, tmp_path)
        base_first, count = int(operator.needs_base), len(sources.experts)
        for name in sources.layout.tensors:
            found, expected = turned.read(name), sources.read(name)
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found[:base_first], expected, strict=False))
            for first in range(base_first, len(expected), count):  # of a stack, for each of its methods
                for place, i in enumerate(order, first):
                    assert torch.equal(bits(found[place]), bits(expected[first + i]))

    def test_an_export_holds_what_is_materialised(self, opened: Opened, tmp_path: Path, dtype: torch.dtype) -> None:
        """An exported file has the bits that were materialised."""
        sources = opened(dtype)
        borders = [0, 3, 17, sources.layout.size]
        genome = Genome(np.array(borders), np.random.default_rng(0).normal(size=(3, width(sources))))
        written = load_file(export_file(sources, genome, tmp_path / "merged.safetensors", {}))
        for name, values in materialised(sources, genome, dtype).items():
            assert torch.equal(bits(written[name]), bits(values))

    def test_weights_are_affine_in_the_coefficients(self, operator: Operator) -> None:
        """Only for operators that declare it."""
        if not operator.affine:
            pytest.skip("they depend on the coefficients in another way")
        rng = np.random.default_rng(0)
        count = next(count for count in (3, *COUNTS) if _merges(operator, count))
        columns = len(operator.columns([str(i) for i in range(count)]))
        a, b = rng.normal(size=(2, 5, columns))
        zero = operator.weights(np.zeros((5, columns)))
        mixed = columns * len(operator.members) if isinstance(operator, OneOf) else columns
        assert zero.shape == (5, mixed + operator.needs_base)
        np.testing.assert_allclose(
            operator.weights(a + b) - zero, operator.weights(a) - zero + operator.weights(b) - zero, atol=1e-12
        )

    def test_between_the_experts(self, opened: Opened, dtype: torch.dtype) -> None:
        """The mean of the seeds is a merge like any other."""
        sources = opened(dtype)
        genome = Genome.uniform(sources.layout.size, sources.operator.seeds(len(sources.experts)).mean(axis=0))
        for name, values in materialised(sources, genome, torch.float64).items():
            assert torch.equal(values.flatten(), summed(sources, genome, name, torch.float64))

    def test_models_all_alike_give_themselves(self, opened: Opened, operator: Operator, dtype: torch.dtype) -> None:
        """Models that are all the same give that model."""
        sources = opened(dtype, alike=True)
        coefficients = operator.seeds(len(sources.experts)).mean(axis=0)
        if isinstance(operator, WholeMatrices):
            if not operator.unites:
                pytest.skip("it amplifies what experts have in common")
            coefficients = np.full(width(sources), operator.around)
        for name, values in materialised(sources, Genome.uniform(sources.layout.size, coefficients), dtype).items():
            torch.testing.assert_close(values, sources.experts[0].tensor(name))

    def test_alone_and_whole_an_expert_is_itself(self, opened: Opened, operator: Operator, dtype: torch.dtype) -> None:
        """One expert, of which everything is kept, is itself. Not for operators that are ``partial``."""
        if operator.name in self.partial:
            pytest.skip("it drops entries of every expert")
        sources = opened(dtype, **({"density": 1.0} if "density" in operator.searchable else {}))
        if len(sources.experts) > 1:
            pytest.skip("several experts interfere")
        if isinstance(operator, WholeMatrices) and not operator.unites:
            pytest.skip("it changes an expert that is alone, too")
        merged = materialised(sources, Genome.uniform(sources.layout.size, operator.seeds(1)[0]), dtype)
        for name, values in merged.items():
            expert = sources.experts[0].tensor(name)
            if isinstance(operator, WholeMatrices):  # differences from the base are stored in the models' type
                assert sources.base is not None
                size = expert.double().abs() + sources.base.tensor(name).double().abs()
                rounding = 2 * torch.finfo(dtype).eps * size + 1e-6
                assert bool(((values.double() - expert.double()).abs() <= rounding).all())
            else:
                torch.testing.assert_close(values, expert)

    def test_space_holds_the_geometry_of_the_sources_in_the_genomes_sense(
        self, opened: Opened, operator: Operator
    ) -> None:
        """The Gram table is that of the directions that coefficients move along."""
        sources = opened(torch.float32)
        space = sources.space(dense=True)
        assert space.vectors is not None
        assert space.vectors.shape == (space.dimension, space.size)
        base = materialised(sources, Genome.uniform(space.size, np.zeros(space.dimension)), torch.float64)
        anchor = torch.cat([value.flatten() for value in base.values()]).numpy()
        for row in space.seeds:
            merged = materialised(sources, Genome.uniform(space.size, row), torch.float64)
            whole = torch.cat([value.flatten() for value in merged.values()]).numpy()
            np.testing.assert_allclose(anchor + row @ space.vectors, whole, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            space.gram.between(np.array([0, space.size]))[0],
            space.vectors.astype(np.float64) @ space.vectors.astype(np.float64).T,
            rtol=1e-5,
        )

    def test_without_task_vectors_a_merge_is_the_base_bit_for_bit(
        self, opened: Opened, operator: Operator, dtype: torch.dtype
    ) -> None:
        """Zero coefficients give the base."""
        if not operator.needs_base:
            pytest.skip("no task vectors")
        sources = opened(dtype)
        merged = materialised(sources, Genome.uniform(sources.layout.size, np.zeros(width(sources))), dtype)
        assert sources.base is not None
        for name, values in merged.items():
            assert torch.equal(bits(values), bits(sources.base.tensor(name)))

    def test_operators_are_values_with_settings_by_name(self, operator: Operator) -> None:
        """Equal settings make equal operators; an unknown one is refused."""
        settings = {field.name: getattr(operator, field.name) for field in _fields(operator)}
        assert operators.get(operator.name, settings) == operator
        assert hash(operators.get(operator.name, settings)) == hash(operator)
        remedy = f"Known: {', '.join(sorted(settings))}" if settings else "It takes none"
        with pytest.raises(InputError, match=f"zzz: the operator '{operator.name}' has no such setting. {remedy}"):
            operators.get(operator.name, {**settings, "zzz": 1})

    def test_a_genome_may_set_what_is_searchable_within_its_bounds(self, operator: Operator) -> None:
        """Settings that a search may choose are checked in genomes."""
        known = {field.name for field in _fields(operator)}
        for name, (low, high) in operator.searchable.items():
            assert name in known
            value = type(getattr(operator, name))(0.25 * low + 0.75 * high)
            assert getattr(operators.tuned(operator, {name: value}), name) == value
            assert operators.tuned(operator, {name: value}) == operators.get(operator.name, {name: value})
            with pytest.raises(InputError, match=f"{name}: expected .* found"):
                operators.tuned(operator, {name: type(value)(2 * high + 1)})
        assert operators.tuned(operator, {}) is operator
        with pytest.raises(
            InputError, match=r"genome: the operator '.*' (takes no parameters, found|has no parameter) 'zzz'"
        ):
            operators.tuned(operator, {"zzz": 1.0})
