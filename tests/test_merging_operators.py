"""The conformance suite of merge operators: one in the registry gets every test here."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ecotone.merging import operators
from ecotone.merging.export import export_file
from ecotone.merging.kernel.materialise import accumulator
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().contiguous().view(torch.uint8)


def model(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "a.weight": torch.randn(7, 5, generator=generator) * 10 ** (4 * torch.rand(7, 5, generator=generator) - 3),
        "a.bias": torch.tensor([0.0, -0.0, 1e-7, -1e-6, 6e-5]),  # signed zeros and float16 subnormals
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@pytest.fixture(params=sorted(operators.OPERATORS))
def operator(request):
    return operators.get(request.param)


@pytest.fixture(params=[1, 2, 3, 8])
def opened(request, operator, tmp_path):
    if operator.name == "slerp" and request.param != 2:
        pytest.skip("of two models only")

    def build(dtype, alike=False, **settings):
        for seed in range(request.param + 1):
            save_file(model(0 if alike else seed, dtype), tmp_path / f"{seed}.safetensors")
        experts = [tmp_path / f"{seed}.safetensors" for seed in range(1, request.param + 1)]
        base = tmp_path / "0.safetensors" if operator.needs_base else None
        return Sources.open(experts, base, operator.name, settings=settings)

    return build


def width(sources):
    return len(sources.operator.columns(sources.names))


def summed(sources, genome, tensor, dtype):
    """One tensor of a merge of one segment, rounded as the kernel promises."""
    models = sources.read(tensor)
    kind = accumulator(models)
    weights = torch.tensor(sources.mixture(genome).weights[0], dtype=kind)
    first, *rest = [weight * values.to(kind) for weight, values in zip(weights, models, strict=True) if weight]
    return sum(rest, start=first).to(dtype)


def materialised(sources, genome, dtype):
    out = {name: torch.full(info.shape, torch.nan, dtype=dtype) for name, info in sources.layout.parameters.items()}
    sources.materialise([genome], [out])
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_seeds_reproduce_the_experts_as_they_are_mixed_bit_for_bit(opened, dtype):
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


@pytest.mark.parametrize("name", ["linear", "task_arithmetic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_these_operators_mix_the_checkpoints_as_they_are(tmp_path, name, dtype):
    for seed in range(3):
        save_file(model(seed, dtype), tmp_path / f"{seed}.safetensors")
    sources = Sources.open([tmp_path / "1.safetensors", tmp_path / "2.safetensors"], tmp_path / "0.safetensors", name)
    for tensor in sources.layout.tensors:
        for found, checkpoint in zip(sources.read(tensor), sources.checkpoints, strict=True):
            assert torch.equal(bits(found), bits(checkpoint.tensor(tensor)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_mixed_does_not_depend_on_where_it_is_cut(opened, dtype):
    sources = opened(dtype)
    for name in sources.layout.tensors:
        whole, stretch = sources.read(name), sources.stretch(name)
        assert [t.numel() for t in whole] == [stretch.size] * len(sources.checkpoints)
        assert [t.dtype for t in whole] == [t.dtype for t in stretch.sample()]
        pieces = [stretch[low : low + 3].tensors() for low in range(0, stretch.size, 3)]
        for j, values in enumerate(whole):
            assert torch.equal(bits(torch.cat([piece[j] for piece in pieces])), bits(values))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_the_models_does_not_matter(opened, operator, dtype):
    if "mask_seed" in operator.searchable:
        pytest.skip("each place has a mask of its own")
    sources = opened(dtype)
    paths = [expert.path for expert in sources.experts]
    order = np.random.default_rng(len(paths)).permutation(len(paths))
    base = None if sources.base is None else sources.base.path
    turned = Sources.open([paths[i] for i in order], base, operator.name)
    first = len(sources.checkpoints) - len(sources.experts)
    for name in sources.layout.tensors:
        found, expected = turned.read(name), sources.read(name)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found[:first], expected[:first], strict=True))
        for place, i in enumerate(order, first):
            assert torch.equal(bits(found[place]), bits(expected[first + i]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_export_holds_what_is_materialised(opened, tmp_path, dtype):
    sources = opened(dtype)
    borders = [0, 3, 17, sources.layout.size]
    genome = Genome(np.array(borders), np.random.default_rng(0).normal(size=(3, width(sources))))
    written = load_file(export_file(sources, genome, tmp_path / "merged.safetensors", {}))
    for name, values in materialised(sources, genome, dtype).items():
        assert torch.equal(bits(written[name]), bits(values))


def stacked(sources, row):
    return {name: value[0] for name, value in sources.stack([Genome.uniform(sources.layout.size, row)]).items()}


def test_weights_are_affine_in_the_coefficients(operator):
    if not operator.affine:
        pytest.skip("they depend on the coefficients in another way")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 3))
    zero = operator.weights(np.zeros((5, 3)))
    assert zero.shape == (5, 3 + operator.needs_base)
    np.testing.assert_allclose(
        operator.weights(a + b) - zero, operator.weights(a) - zero + operator.weights(b) - zero, atol=1e-12
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_between_the_experts(opened, dtype):
    sources = opened(dtype)
    genome = Genome.uniform(sources.layout.size, sources.operator.seeds(len(sources.experts)).mean(axis=0))
    for name, values in materialised(sources, genome, torch.float64).items():
        assert torch.equal(values.flatten(), summed(sources, genome, name, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_models_all_alike_give_themselves(opened, operator, dtype):
    sources = opened(dtype, alike=True)
    coefficients = operator.seeds(len(sources.experts)).mean(axis=0)
    for name, values in materialised(sources, Genome.uniform(sources.layout.size, coefficients), dtype).items():
        torch.testing.assert_close(values, sources.experts[0].tensor(name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alone_and_whole_an_expert_is_itself(opened, operator, dtype):
    sources = opened(dtype, **({"density": 1.0} if "density" in operator.searchable else {}))
    if len(sources.experts) > 1:
        pytest.skip("several experts interfere")
    for name, values in materialised(sources, Genome.uniform(sources.layout.size, [1.0]), dtype).items():
        torch.testing.assert_close(values, sources.experts[0].tensor(name))


def test_space_holds_the_geometry_of_the_sources_in_the_genomes_sense(opened, operator):
    sources = opened(torch.float32)
    space = sources.space(dense=True)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_task_vectors_a_merge_is_the_base_bit_for_bit(opened, operator, dtype):
    if not operator.needs_base:
        pytest.skip("no task vectors")
    sources = opened(dtype)
    merged = materialised(sources, Genome.uniform(sources.layout.size, np.zeros(width(sources))), dtype)
    for name, values in merged.items():
        assert torch.equal(bits(values), bits(sources.base.tensor(name)))


def test_task_arithmetic_is_the_base_plus_scaled_task_vectors(tmp_path):
    for seed in range(3):
        save_file(model(seed, torch.float64), tmp_path / f"{seed}.safetensors")
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(3)]
    sources = Sources.open(paths[1:], paths[0], "task_arithmetic")
    merged = materialised(sources, Genome.uniform(sources.layout.size, [0.3, -1.2]), torch.float64)
    base, one, two = (model(seed, torch.float64) for seed in range(3))
    for name, values in merged.items():
        expected = base[name] + 0.3 * (one[name] - base[name]) - 1.2 * (two[name] - base[name])
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


def test_operators_are_values_with_settings_by_name(operator):
    settings = {field.name: getattr(operator, field.name) for field in dataclasses.fields(operator)}
    assert operators.get(operator.name, settings) == operator
    assert hash(operators.get(operator.name, settings)) == hash(operator)
    remedy = f"Known: {', '.join(sorted(settings))}" if settings else "It takes none"
    with pytest.raises(InputError, match=f"zzz: the operator '{operator.name}' has no such setting. {remedy}"):
        operators.get(operator.name, {**settings, "zzz": 1})


def test_a_genome_may_set_what_is_searchable_within_its_bounds(operator):
    known = {field.name for field in dataclasses.fields(operator)}
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


def test_an_unknown_operator_names_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'task_arithmetic'"):
        operators.get("task-arithmetic")
