"""TIES task vectors against a naive whole-vector version, known answers, and exactness where rounding could tell."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import ecotone.merging.kernel.compiled
import ecotone.merging.kernel.materialise as kernel
import ecotone.merging.memory
import ecotone.merging.sources
from ecotone.fitness.specs import WorkerSpec
from ecotone.fitness.worker import Worker
from ecotone.merging import operators
from ecotone.merging.gradient import Slopes
from ecotone.merging.operators import task_vectors, ties_vectors
from ecotone.merging.operators.task_vectors import Pieces, largest
from ecotone.merging.operators.ties_vectors import _Election, sign_of_sum
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = {"a": (40, 31), "b.0": (7,), "b.1": (130, 90)}
SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values())


def bits(tensor):
    return tensor.flatten().contiguous().view(torch.uint8)


def saved(directory, *models):
    """Sources of these models, the base first: each a list (one tensor) or a mapping."""
    paths = []
    for number, model in enumerate(models):
        tensors = model if isinstance(model, dict) else {"w": torch.as_tensor(model)}
        paths.append(directory / f"model-{number}.safetensors")
        save_file(tensors, paths[-1])
    return paths


def opened(directory, *models, density=0.2, operator="ties_vectors"):
    paths = saved(directory, *models)
    given = {"density": density} if operator == "ties_vectors" else {}
    return Sources.open(paths[1:], paths[0], operator, settings=given)


def fine_tuned(count, dtype, seed=0):
    """A base and experts some tensors of which have moved more than others."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    experts = [
        {
            name: value + 0.02 * torch.randn(value.shape, generator=generator) * torch.rand(1, generator=generator)
            for name, value in base.items()
        }
        for _ in range(count)
    ]
    return [{name: value.to(dtype) for name, value in model.items()} for model in (base, *experts)]


def changed(sources):
    """(J, n) the base and the experts as they are mixed."""
    return torch.cat([torch.stack(sources.read(name)) for name in sources.layout.tensors], dim=1)


def merged(sources, *coefficients):
    return sources.stack([Genome.uniform(sources.layout.size, coefficients)])


def naive(base, experts, density):
    """tau' of whole vectors as in the paper: the largest by sorting, exact sums, zero sums to the majority."""
    vectors = np.stack([expert - base for expert in experts])
    size = vectors.shape[1]
    rank = max(1, round(density * size))
    trimmed = np.stack([np.where(np.abs(v) < np.sort(np.abs(v))[size - rank], 0, v) for v in vectors])
    sums = [sum(map(Fraction, column)) for column in trimmed.T.tolist()]
    signs = np.array([(total > 0) - (total < 0) for total in sums])
    signs[signs == 0] = 1 if signs.sum() >= 0 else -1
    return np.where(trimmed * signs > 0, trimmed, 0)


# -- the method ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("count", "density"), [(1, 0.2), (2, 0.2), (3, 1.0), (3, 0.03), (5, 0.5), (8, 0.2)])
def test_agrees_with_the_paper_on_whole_vectors(tmp_path, count, density, dtype):
    models = fine_tuned(count, dtype)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    base, *experts = (np.concatenate([t.to(kind).numpy().ravel() for t in model.values()]) for model in models)
    found = changed(opened(tmp_path, *models, density=density)).to(kind).numpy()
    expected = naive(base, experts, density)
    np.testing.assert_array_equal(found[1:] - found[0], expected)
    kept = (expected != 0).mean(axis=1)
    assert (kept > 0.3 * density).all()
    if dtype in (torch.float32, torch.float64):  # in 16 bits many differences are equal
        assert (kept <= density + 1 / SIZE).all()


@pytest.mark.parametrize("small", [0, 2**24])
@pytest.mark.parametrize(("one", "two"), [(torch.float64, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_models_that_mix_types(tmp_path, monkeypatch, one, two, small):
    monkeypatch.setattr(ties_vectors, "SMALL", small)
    models = [{n: t.to(one if n == "a" else two) for n, t in model.items()} for model in fine_tuned(4, torch.float64)]
    sources = opened(tmp_path, *models)
    kind = torch.promote_types(one, torch.float32)
    base, *experts = (np.concatenate([t.to(kind).numpy().ravel() for t in model.values()]) for model in models)
    read = [[t.to(kind) for t in sources.read(name)] for name in sources.layout.tensors]
    found = np.concatenate([np.stack([t - tensors[0] for t in tensors[1:]]) for tensors in read], axis=1)
    np.testing.assert_array_equal(found, naive(base, experts, 0.2))


def test_known_answers(tmp_path):
    one, two, base = [3.0, -1.0, 0.5, 2.0], [-1.0, -2.0, 0.5, 0.1], [0.0] * 4
    sources = opened(tmp_path, base, one, two, density=1)
    assert changed(sources)[1:].tolist() == [[3.0, -1.0, 0.5, 2.0], [0.0, -2.0, 0.5, torch.tensor(0.1).item()]]
    assert merged(sources, 1, 1)["w"].flatten().tolist() == pytest.approx([3.0, -3.0, 1.0, 2.1])
    assert merged(sources, 0.5, 2)["w"].flatten().tolist() == pytest.approx([1.5, -4.5, 1.25, 1.2])
    half = opened(tmp_path, base, one, two, density=0.5)  # of each the two largest
    assert changed(half)[1:].tolist() == [[3.0, 0.0, 0.0, 2.0], [0.0, -2.0, 0.0, 0.0]]


def test_equal_task_vectors_add_up(tmp_path):
    tau, base = torch.tensor([3.0, -1.0, 0.5, 2.0]), torch.tensor([8.0, 4.0, 2.0, 1.0])
    sources = opened(tmp_path, base, *[base + tau] * 3, density=1)
    assert torch.equal(merged(sources, 1, 1, 1)["w"][0], base + 3 * tau)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_task_vectors_that_share_no_position_are_task_arithmetic_bit_for_bit(tmp_path, dtype):
    base, *experts = fine_tuned(3, dtype)
    owner = {name: torch.randint(0, 3, shape, generator=torch.manual_seed(1)) for name, shape in SHAPES.items()}
    apart = [{n: torch.where(owner[n] == k, t, base[n]) for n, t in expert.items()} for k, expert in enumerate(experts)]
    one = merged(opened(tmp_path, base, *apart, density=1), 0.7, -0.2, 1.3)
    two = merged(opened(tmp_path, base, *apart, operator="task_arithmetic"), 0.7, -0.2, 1.3)
    assert all(torch.equal(bits(one[name]), bits(two[name])) for name in SHAPES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_whole_task_vector_is_the_expert_bit_for_bit(tmp_path, dtype):
    base, expert = fine_tuned(1, dtype)
    base["b.0"] = torch.tensor([0.0, -0.0, 0.0, -0.0, 1.0, 65504.0, 1e-7]).to(dtype)
    expert["b.0"] = torch.tensor([0.0, -0.0, -0.0, 0.0, -1.0, -65504.0, -1e-7]).to(dtype)
    found = merged(opened(tmp_path, base, expert, density=1), 1)
    assert all(torch.equal(bits(found[name]), bits(expert[name])) for name in SHAPES)


def test_trimming_is_over_the_whole_vector(tmp_path):
    base = {"large": torch.zeros(6), "small": torch.zeros(6)}
    expert = {"large": torch.linspace(-2, -1, 6), "small": torch.linspace(0.1, 0.2, 6)}
    sources = opened(tmp_path, base, expert, density=0.5)
    assert torch.equal(sources.read("large")[1], expert["large"])
    assert torch.equal(sources.read("small")[1], base["small"])


def test_entries_equal_to_the_smallest_kept_stay(tmp_path):
    tau = [1.0, 2.0, -1.0, 1.0, 0.5]
    assert changed(opened(tmp_path, [0.0] * 5, tau, density=0.4))[1].tolist() == [1.0, 2.0, -1.0, 1.0, 0.0]
    few = [0.0, 2.0, 0.0, 0.0, -0.5]  # fewer moved than are to be kept
    assert changed(opened(tmp_path, [0.0] * 5, few, density=0.8))[1].tolist() == few
    assert changed(opened(tmp_path, [0.0] * 5, tau, density=1e-9))[1].tolist() == [0.0, 2.0, 0.0, 0.0, 0.0]


def test_positions_that_sum_to_zero_take_the_sign_of_most_others(tmp_path):
    one, two = [1.0, 5.0, -5.0, -5.0], [-1.0, 0.0, 0.0, 0.0]
    assert changed(opened(tmp_path, [0.0] * 4, one, two, density=1))[1:, 0].tolist() == [0.0, -1.0]
    one[2] = 5.0
    assert changed(opened(tmp_path, [0.0] * 4, one, two, density=1))[1:, 0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("factor", [2.0**-30, -(2.0**20)])
def test_scaling_all_task_vectors_scales_the_result(tmp_path, factor):
    _, *experts = fine_tuned(4, torch.float32)
    base = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    plain = changed(opened(tmp_path, base, *experts))
    scaled = [{name: factor * value for name, value in expert.items()} for expert in experts]
    assert torch.equal(changed(opened(tmp_path, base, *scaled)), factor * plain)


def test_permuting_the_positions_permutes_the_result(tmp_path):
    models = [torch.cat([t.flatten() for t in model.values()]) for model in fine_tuned(3, torch.bfloat16)]
    order = torch.randperm(SIZE, generator=torch.manual_seed(0))
    plain = changed(opened(tmp_path, *models))
    assert torch.equal(changed(opened(tmp_path, *[model[order] for model in models])), plain[:, order])


def test_not_a_number_is_not_trimmed_away(tmp_path):
    one, two = [1.0, torch.nan, 3.0, 4.0], [1.0, 2.0, torch.inf, -4.5]
    found = merged(opened(tmp_path, [0.0] * 4, one, two, density=0.5), 1, 1)["w"][0]
    assert torch.isfinite(found).tolist() == [True, False, False, True]


@pytest.mark.parametrize("density", [0, -0.1, 1.5, "0.2", True, None, float("nan")])
def test_other_densities_are_refused(density):
    with pytest.raises(InputError, match="density: expected a number above 0 and at most 1, found"):
        operators.get("ties_vectors", {"density": density})


# -- exactness -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("span", [1000, 2**18])
def test_thresholds_are_those_of_sorting(tmp_path, monkeypatch, dtype, span):
    monkeypatch.setattr(task_vectors, "SPAN", span)
    base, *experts = fine_tuned(3, dtype)
    experts[0]["a"][:] = base["a"]  # many equal magnitudes: zero ...
    experts[1]["a"][:] = base["a"] + base["a"].sign()  # ... and one
    experts[2] = {name: (1e-39 * value.double()).to(dtype) for name, value in experts[2].items()}  # subnormal
    base["b.1"].zero_()
    sources = opened(tmp_path, base, *experts)
    pieces = Pieces(sources.layout, lambda name: [c.tensor(name).flatten() for c in sources.checkpoints])
    flat = [torch.cat([t.to(pieces.kind).flatten() for t in model.values()]) for model in (base, *experts)]
    ordered = [(expert - flat[0]).abs().sort(descending=True).values for expert in flat[1:]]
    for rank in (1, 2, 700, SIZE // 5, SIZE - 1240, SIZE - 3, SIZE):
        assert largest(pieces, rank) == tuple(values[rank - 1].item() for values in ordered)


def awkward(rng, terms, count, kind):
    """(K, n) numbers whose sums cancel all but a little, or all."""
    table = rng.normal(size=(terms, count)) * 2.0 ** rng.integers(-40, 41, (terms, count))
    table[terms // 2 :] = -table[: terms - terms // 2]
    table[-1] = np.where(rng.random(count) < 0.5, table[-1], -table[:-1].astype(kind).sum(axis=0))
    table[rng.integers(terms, size=count), np.arange(count)] *= rng.choice([1, 1 + 2.0**-23, 0], count)
    return rng.permuted(table.astype(kind), axis=0)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 8, 17])
def test_the_sign_of_a_sum_is_exact(terms, kind):
    table = awkward(np.random.default_rng(terms), terms, 2000, kind)
    exact = [sum(map(Fraction, column)) for column in table.T.tolist()]
    found = sign_of_sum([torch.from_numpy(row) for row in table])
    assert found.tolist() == [(total > 0) - (total < 0) for total in exact]
    naive_signs = np.sign(sum(table))
    assert terms < 3 or (naive_signs != found.numpy()).any()  # the numbers are such that rounding tells


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=7), st.randoms())
def test_the_sign_of_any_sum_is_exact(numbers, random):
    total = sum(map(Fraction, numbers))
    random.shuffle(numbers)
    assert sign_of_sum([torch.tensor([number]) for number in numbers]).item() == (total > 0) - (total < 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_models_get_the_bits_of_small_ones(tmp_path, monkeypatch, dtype):
    sources = opened(tmp_path, *fine_tuned(5, dtype))
    genomes = [Genome.uniform(SIZE, row) for row in np.random.default_rng(0).normal(size=(3, 5))]
    expected = sources.stack(genomes)
    monkeypatch.setattr(ecotone.merging.memory, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(ecotone.merging.sources, "SMALL", 0)
    monkeypatch.setattr(ties_vectors, "SMALL", 0)
    threads = torch.get_num_threads()
    try:
        for count, span, compiled in ((1, 2**18, True), (2, 997, True), (2, 997, False), (3, 5003, False)):
            torch.set_num_threads(count)
            monkeypatch.setattr(kernel, "COMPILED_SPAN", span)
            monkeypatch.setattr(kernel, "TORCH_SPAN", span)
            if not compiled:
                monkeypatch.setattr(ecotone.merging.kernel.compiled, "supports", lambda *_: False)
            again = Sources.open([e.path for e in sources.experts], sources.base.path, "ties_vectors").stack(genomes)
            assert all(torch.equal(bits(again[name]), bits(expected[name])) for name in SHAPES)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("threshold", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("terms", [1, 2, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_loops_choose_as_torch_does(dtype, terms, threshold):
    pytest.importorskip("numba")
    table = torch.from_numpy(awkward(np.random.default_rng(terms), terms, 9000, np.float32)).to(dtype)
    odd = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-40, -1e-40]).to(dtype)
    table[:, :2000] = odd[torch.randint(0, len(odd), (terms, 2000), generator=torch.manual_seed(0))]
    pieces = [torch.randint(-1, 2, (9000,), generator=torch.manual_seed(1)).to(dtype), *table]
    for majority in (1.0, -1.0):
        plain = _Election(torch.float32, (threshold,) * terms, majority)(pieces)
        loops = [torch.empty_like(row) for row in table]
        assert ecotone.merging.kernel.compiled.choose(pieces, loops, (threshold,) * terms, majority)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(plain[1:], loops, strict=True))


# -- what else reads the sources -----------------------------------------------------------------------------


def test_slopes_are_inner_products_with_the_changed_task_vectors(tmp_path):
    models = fine_tuned(3, torch.float64)
    sources = opened(tmp_path, *models)
    genome = Genome(np.array([0, 100, SIZE]), np.random.default_rng(0).normal(size=(2, 3)))
    gradient = {name: torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    slopes = Slopes(sources, genome)
    for name, values in gradient.items():
        slopes.add(name, values)
    flat = torch.cat([values.flatten() for values in gradient.values()]).numpy()
    base, *experts = (np.concatenate([t.numpy().ravel() for t in model.values()]) for model in models)
    vectors = naive(base, experts, 0.2)
    expected = [[vector[part] @ flat[part] for vector in vectors] for part in (slice(0, 100), slice(100, SIZE))]
    np.testing.assert_allclose(slopes.values, expected, rtol=1e-10)


def test_nothing_is_read_before_it_is_needed(tmp_path):
    sources = opened(tmp_path, *fine_tuned(2, torch.float32))
    assert sources.held.loads == 0
    sources.read("a")
    first = sources.held.loads
    sources.read("a")
    assert sources.held.loads - first == 3  # thresholds and signs are found once


def test_a_worker_passes_the_settings_on(tmp_path):
    paths = saved(tmp_path, *fine_tuned(2, torch.float32))
    experts = tuple(map(str, paths[1:]))
    for density in (0.1, 0.9):
        spec = WorkerSpec(experts, str(paths[0]), "ties_vectors", {"density": density}, device="cpu")
        gram = Worker(spec).space().gram.prefix[-1]
        direct = Sources.open(paths[1:], paths[0], "ties_vectors", settings={"density": density}).space()
        assert (gram == direct.gram.prefix[-1]).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_the_sign_of_a_sum_is_exact_on_a_gpu(kind):
    table = torch.from_numpy(awkward(np.random.default_rng(0), 6, 20_000, kind))
    assert torch.equal(sign_of_sum(list(table.cuda())).cpu(), sign_of_sum(list(table)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("placement", ["device", "host", "mapped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_changes_the_experts_as_a_cpu_does(tmp_path, dtype, placement):
    found = opened(tmp_path, *fine_tuned(5, dtype))
    sources = Sources(found.layout, found.operator, found.experts, found.base, placement)
    for name in sources.layout.tensors:
        there = sources.near(name, torch.device("cuda"))
        found = there.tensors(torch.device("cuda"))
        assert all(tensor.is_cuda for tensor in found)
        assert all(torch.equal(bits(a.cpu()), bits(b)) for a, b in zip(found, sources.read(name), strict=True))
