import itertools
import sys

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
from ecotone.merging.inner_products import gram_table, region_borders
from ecotone.merging.models.layout import Layout
from ecotone.merging.operators.base import directions
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome
from ecotone.populations.gram import GramTable
from ecotone.testing.operators import streamed

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = {"head.bias": (11,), "layers.0.weight": (300, 257), "layers.1.weight": (13, 17), "scale": ()}
SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values())


def bits(tensor):
    return tensor.flatten().contiguous().view(torch.uint8)


def models(directory, count, dtype=torch.float32):
    paths = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
        paths.append(directory / f"{seed}-{str(dtype)[6:]}.safetensors")
        save_file(tensors | {"steps": torch.tensor(seed)}, paths[-1])
    return paths


def empty(sources, dtype):
    return {name: torch.full(info.shape, torch.nan, dtype=dtype) for name, info in sources.layout.parameters.items()}


def columns(sources):
    return len(sources.operator.columns(sources.names))


def random_genome(sources, segments, seed, residual=False):
    rng = np.random.default_rng(seed)
    borders = np.unique(np.concatenate([[0], rng.integers(1, SIZE, segments - 1), [SIZE]]))
    coefficients = rng.normal(size=(len(borders) - 1, columns(sources)))
    coefficients[rng.random(coefficients.shape) < 0.3] = 0.0
    return Genome(borders, coefficients, {}, rng.normal(size=SIZE).astype(np.float32) if residual else None)


def flat(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def mixed(sources):
    """(J, n) what is mixed, in float64."""
    tensors = ([tensor.double() for tensor in sources.read(name)] for name in sources.layout.tensors)
    return torch.cat([torch.stack(each) for each in tensors], dim=1)


def vectors_of(sources):
    """(K, n) what coefficients of one add, in float64."""
    models = mixed(sources)
    moves = directions(sources.operator, columns(sources))
    return torch.stack([sum(weight * models[j] for j, weight in terms) for terms in moves])


def reference(sources, genome):
    """The merge, naively, in float64, and the sum of the magnitudes of its terms."""
    vectors, mixture = mixed(sources).numpy(), sources.mixture(genome)
    parts = list(zip(mixture.weights, itertools.pairwise(mixture.borders), strict=True))
    merged = np.concatenate([row @ vectors[:, a:b] for row, (a, b) in parts])
    terms = np.concatenate([abs(row) @ abs(vectors[:, a:b]) for row, (a, b) in parts])
    if genome.residual is not None:
        merged, terms = merged + genome.residual, terms + abs(genome.residual)
    return torch.from_numpy(merged), torch.from_numpy(terms)


@pytest.fixture(params=streamed())
def operator(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def sources(request, operator, tmp_path):
    paths = models(tmp_path, 4, request.param)
    return Sources.open(paths[1:3] if operator == "slerp" else paths[1:], paths[0], operator)


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("segments", "residual"), [(1, False), (400, False), (5, True)])
def test_agrees_with_a_naive_float64_reference(sources, segments, residual, out):
    genome = random_genome(sources, segments, 3, residual)
    merged = empty(sources, out)
    sources.materialise([genome], [merged])
    expected, terms = reference(sources, genome)
    scale = terms.clamp(min=1)
    accumulator = 2**-52 if sources.layout.dtype == torch.float64 else 2**-23
    error = (flat(merged).double() - expected).abs() / scale
    assert error.max() <= 8 * accumulator + torch.finfo(out).eps / 2


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_do_not_depend_on_company_threads_chunks_or_stacking(sources, out, monkeypatch):
    genomes = [random_genome(sources, s, s, residual=s == 7) for s in (1, 2, 7, 300)] + [
        Genome.uniform(SIZE, np.eye(columns(sources))[-1]),
        Genome.dense(np.random.default_rng(0).normal(size=SIZE), columns(sources)),
    ]
    together = [empty(sources, out) for _ in genomes]
    sources.materialise(genomes, together)
    stacked = sources.stack(genomes, out)
    threads = torch.get_num_threads()
    try:
        for index, genome in enumerate(genomes):
            torch.set_num_threads(1 + index % 3)
            monkeypatch.setattr(kernel, "CHUNK", 100 + 9973 * index)
            alone = empty(sources, out)
            sources.materialise([genome], [alone])
            for name, values in alone.items():
                assert torch.equal(bits(values), bits(together[index][name]))
                assert torch.equal(bits(values), bits(stacked[name][index]))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_backends_for_large_models_give_the_bits_of_numpy(tmp_path, dtype, count, monkeypatch):
    pytest.importorskip("numba")
    sources = Sources.open(models(tmp_path, count, dtype))
    genomes = [random_genome(sources, s, s, residual=s % 2 == 0) for s in (1, 2, 9, 300)]
    genomes += [Genome.uniform(SIZE, np.zeros(count)), Genome.dense(np.full(SIZE, -0.0), count)]
    genomes += [Genome.uniform(SIZE, np.full(count, 0.3))]
    plain = [empty(sources, dtype) for _ in genomes]
    sources.materialise(genomes, plain)
    monkeypatch.setattr(ecotone.merging.sources, "SMALL", 0)
    assert ecotone.merging.kernel.compiled.supports([torch.ones(2, dtype=dtype)], [torch.ones(2, dtype=dtype)])
    fast = [empty(sources, dtype) for _ in genomes]
    sources.materialise(genomes, fast)
    monkeypatch.setattr(kernel, "COMPILED_SPAN", 10_007)  # odd places: no whole cache lines
    odd = [empty(sources, dtype) for _ in genomes]
    sources.materialise(genomes, odd)
    monkeypatch.setattr(ecotone.merging.kernel.compiled, "supports", lambda *_: False)
    monkeypatch.setattr(kernel, "TORCH_SPAN", 5_003)
    slow = [empty(sources, dtype) for _ in genomes]
    sources.materialise(genomes, slow)
    for expected, *others in zip(plain, fast, odd, slow, strict=True):
        assert all(torch.equal(bits(other[name]), bits(expected[name])) for other in others for name in expected)


def test_compiled_loops_round_every_bfloat16_as_torch_does():
    pytest.importorskip("numba")
    numbers = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)
    for weight in (1.0, 0.3, -1e-3, 1e30):
        out = torch.empty_like(numbers)
        ecotone.merging.kernel.compiled.Batch([kernel.Mixture(np.array([0, 2**16]), np.array([[weight]]))]).mix(
            [numbers], 0, [out]
        )
        expected = (numbers.float() * np.float32(weight)).to(torch.bfloat16)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_without_numba_large_models_are_merged_too(two, monkeypatch):
    monkeypatch.setattr(ecotone.merging.sources, "SMALL", 0)
    monkeypatch.setitem(sys.modules, "ecotone.merging.kernel.loops", None)
    monkeypatch.delattr(ecotone.merging.kernel, "loops", raising=False)
    ecotone.merging.kernel.compiled._works.cache_clear()
    try:
        out = empty(two, torch.float32)
        two.materialise([Genome.uniform(SIZE, [1.0, 0.0])], [out])
        assert not ecotone.merging.kernel.compiled.supports([flat(out)], [flat(out)])
    finally:
        ecotone.merging.kernel.compiled._works.cache_clear()
    assert torch.equal(flat(out), torch.cat([two.experts[0].tensor(n).reshape(-1) for n in two.layout.tensors]))


def test_stack_of_a_model_too_large_to_keep_gives_the_same_bits(sources, monkeypatch):
    genomes = [random_genome(sources, 9, 1), random_genome(sources, 1, 2)]
    expected = sources.stack(genomes)
    monkeypatch.setattr(ecotone.merging.memory, "RESIDENT_BYTES", 0)
    sources.__dict__.pop("_matrix")
    for name, values in sources.stack(genomes).items():
        assert torch.equal(bits(values), bits(expected[name]))


def test_stack_gives_views_of_one_buffer(sources):
    stacked = sources.stack([Genome.uniform(SIZE, np.eye(columns(sources))[0])] * 3)
    assert {name: tuple(value.shape) for name, value in stacked.items()} == {n: (3, *s) for n, s in SHAPES.items()}
    assert len({value.untyped_storage().data_ptr() for value in stacked.values()}) == 1
    assert all(value.dtype == sources.layout.dtype for value in stacked.values())
    assert sources.stack([])["scale"].shape == (0,)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return Sources.open(models(tmp_path_factory.mktemp("two"), 2))


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_every_element_has_its_segments_weights(two, data):
    cuts = data.draw(st.sets(st.integers(1, SIZE - 1), max_size=30))
    borders = np.array([0, *sorted(cuts), SIZE])
    rows = data.draw(
        st.lists(st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]), min_size=len(cuts) + 1, max_size=len(cuts) + 1)
    )
    out = empty(two, torch.float32)
    two.materialise([Genome(borders, np.array(rows))], [out])
    a, b = (torch.cat([c.tensor(n).reshape(-1) for n in two.layout.tensors]) for c in two.checkpoints)
    per_element = torch.from_numpy(np.repeat(np.array(rows), np.diff(borders), axis=0))
    expected = torch.where(per_element[:, 0] == 1, a, torch.where(per_element[:, 1] == 1, b, 0.0))
    assert torch.equal(flat(out), expected)


def test_terms_of_weight_zero_are_left_out(tmp_path):
    save_file({"w": torch.tensor([1.0, torch.inf, torch.nan])}, tmp_path / "a.safetensors")
    save_file({"w": torch.tensor([2.0, -0.0, 4.0])}, tmp_path / "b.safetensors")
    sources = Sources.open([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    merged = sources.stack([Genome.uniform(3, [0, 1]), Genome.uniform(3, [0, 0])])["w"]
    assert merged.tolist() == [[2.0, -0.0, 4.0], [0.0, 0.0, 0.0]]
    assert torch.signbit(merged).tolist() == [[False, True, False], [False] * 3]


def test_one_pass_over_the_sources_serves_all_candidates(sources, monkeypatch):
    monkeypatch.setattr("ecotone.merging.memory.RESIDENT_BYTES", 0)  # nothing is kept
    sources.stack([random_genome(sources, 1, 0)])  # by now an operator knows what it must of all tensors
    before = sources.held.loads
    genomes = [random_genome(sources, 5, seed) for seed in range(6)]
    sources.materialise(genomes, [empty(sources, torch.float32) for _ in genomes])
    assert sources.held.loads - before == len(sources.checkpoints) * len(SHAPES)


def test_writes_into_the_parameters_of_a_module(tmp_path):
    a, b, resident = (torch.nn.Linear(3, 2) for _ in range(3))
    for name, module in (("a", a), ("b", b)):
        save_file(module.state_dict(), tmp_path / f"{name}.safetensors")
    pointer = resident.weight.data_ptr()
    sources = Sources.open([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    sources.materialise([Genome.uniform(8, [0.5, 0.5])], [dict(resident.named_parameters())])
    assert resident.weight.data_ptr() == pointer
    torch.testing.assert_close(resident.weight, (a.weight + b.weight) / 2)


def test_writes_into_tensors_that_are_not_contiguous(sources):
    genome = random_genome(sources, 20, 0)
    plain = empty(sources, torch.float32)
    sources.materialise([genome], [plain])
    turned = {n: t.T.contiguous().T if t.ndim == 2 else t for n, t in empty(sources, torch.float32).items()}
    assert not turned["layers.0.weight"].is_contiguous()
    sources.materialise([genome], [turned])
    assert all(torch.equal(turned[name], plain[name]) for name in plain)


def test_integer_buffers_come_from_the_base_or_the_first_expert(tmp_path):
    paths = models(tmp_path, 3)
    assert Sources.open(paths[1:], paths[0], "task_arithmetic").buffers()["steps"].item() == 0
    assert Sources.open(paths[1:], paths[0]).buffers()["steps"].item() == 0
    assert Sources.open(paths[1:]).buffers()["steps"].item() == 1


def test_genomes_and_outputs_that_do_not_fit_are_refused(two):
    out = empty(two, torch.float32)
    with pytest.raises(InputError, match=f"expected {SIZE} parameters, found 5"):
        two.materialise([Genome.uniform(5, [1, 0])], [out])
    with pytest.raises(InputError, match="expected 2 coefficients a segment"):
        two.stack([Genome.uniform(SIZE, [1, 0, 0])])
    with pytest.raises(InputError, match="one mapping for each of 1 genomes, found 2"):
        two.materialise([Genome.uniform(SIZE, [1, 0])], [out, out])
    with pytest.raises(InputError, match="expected a tensor 'scale'"):
        two.materialise([Genome.uniform(SIZE, [1, 0])], [{k: v for k, v in out.items() if k != "scale"}])
    with pytest.raises(InputError, match=r"'scale' should have shape \(\), found \(2,\)"):
        two.materialise([Genome.uniform(SIZE, [1, 0])], [out | {"scale": torch.zeros(2)}])
    with pytest.raises(InputError, match="takes no parameters, found 'density'"):
        two.stack([Genome.uniform(SIZE, [1, 0], density=0.2)])


def test_fine_gram_agrees_with_direct_products(tmp_path, operator):
    tensors = [{"a": torch.randn(9, 4), "b": torch.randn(5)} for _ in range(3)]
    for i, tensor in enumerate(tensors):
        save_file(tensor, tmp_path / f"{i}.safetensors")
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    sources = Sources.open(paths[1:], paths[0], operator)
    space = sources.space(dense=True)
    assert space.gram.borders.tolist() == list(range(42))
    exact = vectors_of(sources).numpy()
    direct = GramTable.from_vectors(exact)
    np.testing.assert_allclose(space.gram.prefix, direct.prefix, rtol=1e-12, atol=1e-12)
    rng = np.random.default_rng(0)
    cuts = [np.unique([0, *rng.integers(1, 41, 6), 41]) for _ in range(2)]
    one, two = (Genome(c, rng.normal(size=(len(c) - 1, len(exact)))) for c in cuts)
    product = (one.refined(np.arange(42)) * exact.T).sum(1) @ (two.refined(np.arange(42)) * exact.T).sum(1)
    assert space.gram.inner(one, two) == pytest.approx(product, rel=1e-12)


def coarse(sources, table_bytes, threads=2):
    moves = directions(sources.operator, columns(sources))
    return gram_table(sources.layout, sources.stretch, moves, threads, table_bytes)


@pytest.mark.parametrize("table_bytes", [1, 40 * 72, 5000 * 72])
def test_coarse_gram_agrees_with_direct_products(sources, table_bytes):
    space, gram = sources.space(dense=True), coarse(sources, table_bytes)
    borders = gram.borders
    assert set(space.tensor_borders) <= set(borders)
    assert (np.diff(borders) > 0).all()
    assert len(borders) - 1 <= max(len(SHAPES), table_bytes // (8 * columns(sources) ** 2))
    vectors = vectors_of(sources)
    np.testing.assert_allclose(gram.prefix, GramTable.from_vectors(vectors, borders).prefix, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(space.vectors, vectors, rtol=1e-6)


def test_gram_does_not_depend_on_threads(sources):
    tables = [coarse(sources, 300 * 72, threads).prefix for threads in (1, 2, 3)]
    assert (tables[0] == tables[1]).all()
    assert (tables[0] == tables[2]).all()


def test_regions_are_as_fine_as_the_table_allows(two):
    assert len(region_borders(two.layout, 2)) == SIZE + 1
    coarse = region_borders(two.layout, 2, table_bytes=1000 * 32)
    assert 990 <= len(coarse) <= 1001
    widths = np.diff(coarse[(coarse >= 11) & (coarse <= 11 + 300 * 257)])
    assert widths.max() - widths.min() <= 1


def test_layout_of_mixed_types_stacks_in_float32(tmp_path):
    save_file({"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(2)}, tmp_path / "a.safetensors")
    sources = Sources.open([tmp_path / "a.safetensors"])
    assert isinstance(sources.layout, Layout)
    assert {v.dtype for v in sources.stack([Genome.uniform(5, [2.0])]).values()} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cuda_gives_the_bits_of_the_cpu(sources, out):
    genomes = [random_genome(sources, s, s, residual=s == 7) for s in (1, 7, 300)]
    here = [empty(sources, out) for _ in genomes]
    there = [{name: tensor.cuda() for name, tensor in tensors.items()} for tensors in here]
    sources.materialise(genomes, here)
    sources.materialise(genomes, there)
    for one, two in zip(here, there, strict=True):
        assert all(torch.equal(bits(one[name]), bits(two[name].cpu())) for name in one)
    stacked = sources.stack(genomes, out, "cuda")
    assert all(torch.equal(bits(stacked[n][i].cpu()), bits(here[i][n])) for n in SHAPES for i in range(len(genomes)))
