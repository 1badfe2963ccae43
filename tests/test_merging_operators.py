"""The conformance suite of merge operators: one in the registry gets every test here."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from merging import operators
from merging.sources import Sources
from populations.errors import InputError
from populations.genome import Genome

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


@pytest.fixture(params=sorted(operators.operators))
def operator(request):
    return operators.get(request.param)


@pytest.fixture(params=[1, 2, 3, 8])
def opened(request, operator, tmp_path):
    def build(dtype):
        for seed in range(request.param + 1):
            save_file(model(seed, dtype), tmp_path / f"{seed}.safetensors")
        experts = [tmp_path / f"{seed}.safetensors" for seed in range(1, request.param + 1)]
        return Sources.open(experts, tmp_path / "0.safetensors" if operator.needs_base else None, operator.name)

    return build


def materialised(sources, genome, dtype):
    out = {name: torch.full(info.shape, torch.nan, dtype=dtype) for name, info in sources.layout.parameters.items()}
    sources.materialise([genome], [out])
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_seeds_reproduce_the_experts_bit_for_bit(opened, dtype):
    sources = opened(dtype)
    space = sources.space()
    assert space.seeds.shape == (len(space.seed_names), space.dimension)
    for row, name, expert in zip(space.seeds, space.seed_names, sources.experts, strict=True):
        assert name == expert.name
        for merged in (materialised(sources, Genome.uniform(space.size, row), dtype), stacked(sources, row)):
            for tensor, values in merged.items():
                assert torch.equal(bits(values), bits(expert.tensor(tensor)))


def stacked(sources, row):
    return {name: value[0] for name, value in sources.stack([Genome.uniform(sources.layout.size, row)]).items()}


def test_weights_are_affine_in_the_coefficients(operator):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 3))
    zero = operator.weights(np.zeros((5, 3)))
    assert zero.shape == (5, 3 + operator.needs_base)
    np.testing.assert_allclose(
        operator.weights(a + b) - zero, operator.weights(a) - zero + operator.weights(b) - zero, atol=1e-12
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mean_of_the_experts(opened, dtype):
    sources = opened(dtype)
    count = len(sources.experts)
    merged = materialised(sources, Genome.uniform(sources.layout.size, np.full(count, 1 / count)), torch.float64)
    for name, values in merged.items():
        expected = torch.stack([expert.tensor(name).double() for expert in sources.experts]).mean(0)
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)


def test_space_holds_the_geometry_of_the_sources_in_the_genomes_sense(opened, operator):
    sources = opened(torch.float32)
    space = sources.space(dense=True)
    assert space.vectors.shape == (space.dimension, space.size)
    base = materialised(sources, Genome.uniform(space.size, np.zeros(space.dimension)), torch.float64)
    anchor = torch.cat([value.flatten() for value in base.values()]).numpy()
    for row, expert in zip(space.seeds, sources.experts, strict=True):
        whole = torch.cat([expert.tensor(name).flatten() for name in space.tensors]).numpy()
        np.testing.assert_allclose(anchor + row @ space.vectors, whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        space.gram.between(np.array([0, space.size]))[0],
        space.vectors.astype(np.float64) @ space.vectors.astype(np.float64).T,
        rtol=1e-5,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_task_arithmetic_without_task_vectors_is_the_base_bit_for_bit(tmp_path, dtype):
    for seed in range(3):
        save_file(model(seed, dtype), tmp_path / f"{seed}.safetensors")
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(3)]
    sources = Sources.open(paths[1:], paths[0], "task_arithmetic")
    merged = materialised(sources, Genome.uniform(sources.layout.size, [0.0, 0.0]), dtype)
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


def test_an_unknown_operator_names_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'task_arithmetic'"):
        operators.get("task-arithmetic")
