"""DARE, TIES and SLERP against naive whole-vector versions, known answers and their papers' properties."""

import itertools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ecotone.merging.kernel.compiled
import ecotone.merging.kernel.materialise as kernel
import ecotone.merging.memory
import ecotone.merging.sources
from ecotone.merging import operators
from ecotone.merging.operators import task_vectors, ties_vectors
from ecotone.merging.operators.dare import Masks, uniform_bits
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = {"a": (40, 31), "b.0": (7,), "b.1": (130, 90)}
SIZE = sum(math.prod(shape) for shape in SHAPES.values())
CPU = torch.device("cpu")


def bits(tensor):
    return tensor.flatten().contiguous().view(torch.uint8)


def opened(directory, *models, operator, **settings):
    """Sources of these models, the base first: each a list (one tensor) or a mapping."""
    paths = []
    for number, model in enumerate(models):
        paths.append(directory / f"model-{number}.safetensors")
        save_file(model if isinstance(model, dict) else {"w": torch.as_tensor(model)}, paths[-1])
    return Sources.open(paths[1:], paths[0], operator, settings=settings)


def fine_tuned(count, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    experts = [
        {name: value + 0.02 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
        for _ in range(count)
    ]
    return [{name: value.to(dtype) for name, value in model.items()} for model in (base, *experts)]


def vectors(sources):
    """(K, n) what is mixed with the base."""
    return torch.cat([torch.stack(sources.read(name)[1:]) for name in sources.layout.tensors], dim=1)


def flat(model, kind=torch.float32):
    return torch.cat([model[name].to(kind).flatten() for name in SHAPES])


def merged(sources, *coefficients, dtype=torch.float32):
    return sources.stack([Genome.uniform(sources.layout.size, coefficients)], dtype)


# -- masks ---------------------------------------------------------------------------------------------------


def test_masks_are_those_of_splitmix64():
    key = Masks(7, 0.5)._key(2)
    state, words = key % 2**64, []
    for _ in range(50):  # Steele, Lea and Flood 2014, as in Java's SplittableRandom
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        word = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
        words.append(word ^ word >> 31)
    expected = np.array(words, "<u8").view("<i4")
    assert uniform_bits(key, 0, 100, CPU).tolist() == expected.tolist()


def test_masks_do_not_depend_on_where_they_are_cut():
    whole = uniform_bits(5, 0, 1000, CPU)
    for start, size in ((0, 1), (1, 1), (1, 2), (2, 7), (333, 300), (999, 1)):
        assert torch.equal(uniform_bits(5, start, size, CPU), whole[start : start + size])
    far = 2**40 + 1
    assert torch.equal(uniform_bits(5, far, 9, CPU), uniform_bits(5, far - 1, 10, CPU)[1:])


@pytest.mark.parametrize("density", [1e-12, 0.01, 0.3, 0.5, 0.999, 1.0])
def test_masks_keep_a_share_of_their_own_for_every_expert_and_seed(density):
    ones = [torch.ones(200_000) for _ in range(3)]
    kept = torch.stack(list(Masks(0, density).apply(ones, 0)))
    other = Masks(1, density).apply([torch.ones(200_000)], 0)[0]
    room = 5 * math.sqrt(density * (1 - density) / 200_000)
    for mask in (*kept, other):
        assert mask.mean().item() == pytest.approx(density, abs=room)
    for one, two in ((kept[0], kept[1]), (kept[1], kept[2]), (kept[0], other)):
        assert (one * two).mean().item() == pytest.approx(density**2, abs=2 * room)
        assert density in (1e-12, 1.0) or not torch.equal(one, two)
    odd = kept[:, ::2] * kept[:, 1::2]  # the halves of one output
    assert odd.mean().item() == pytest.approx(density**2, abs=2 * room)


def test_as_the_density_grows_entries_only_join():
    masks = [Masks(3, density).apply([torch.ones(5000)], 11)[0] for density in (0.1, 0.2, 0.7, 1.0)]
    assert all((one <= two).all() for one, two in itertools.pairwise(masks))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("operator", ["dare", "dare_ties", "ties"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_prepares_the_same_bytes(tmp_path, operator, dtype):
    sources = opened(tmp_path, *fine_tuned(3, dtype), operator=operator, density=0.3)
    for name in sources.layout.tensors:
        there = sources.near(name, torch.device("cuda")).tensors(torch.device("cuda"))
        assert all(torch.equal(bits(a.cpu()), bits(b)) for a, b in zip(there, sources.read(name), strict=True))


# -- DARE ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kept_entries_are_divided_by_the_density_exactly(tmp_path, dtype):
    models = fine_tuned(3, dtype)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    base, *experts = (flat(model, kind) for model in models)
    found = vectors(opened(tmp_path, *models, operator="dare", density=0.3, mask_seed=5))
    assert found.dtype == kind
    for k, expert in enumerate(experts):
        tau = expert - base
        kept = uniform_bits(Masks(5, 0.3)._key(k), 0, SIZE, CPU).lt(round(0.3 * 2**32) - 2**31)
        assert torch.equal(found[k], torch.where(kept, tau / torch.tensor(0.3, dtype=kind), 0.0))


def test_kept_whole_it_is_task_arithmetic_and_dropped_entries_are_the_base(tmp_path):
    models = fine_tuned(2, torch.float64)
    row = 0.4, -1.3
    whole = merged(opened(tmp_path, *models, operator="dare", density=1.0), *row, dtype=torch.float64)
    plain = merged(opened(tmp_path, *models, operator="task_arithmetic"), *row, dtype=torch.float64)
    for name in SHAPES:
        torch.testing.assert_close(whole[name], plain[name], rtol=1e-13, atol=1e-13)
    sources = opened(tmp_path, *models, operator="dare", density=0.2)
    few = flat({name: value[0] for name, value in merged(sources, *row, dtype=torch.float64).items()}, torch.float64)
    dropped = (vectors(sources) == 0).all(dim=0)
    assert dropped.double().mean().item() == pytest.approx(0.64, abs=0.02)
    assert torch.equal(few[dropped], flat(models[0], torch.float64)[dropped])


def test_the_mean_over_mask_seeds_is_the_task_vector(tmp_path):
    tau = torch.linspace(-1, 1, 50, dtype=torch.float64)
    sources = opened(tmp_path, torch.zeros(50, dtype=torch.float64), tau, operator="dare", density=0.4)
    rows = [Genome.uniform(50, [1.0], mask_seed=seed) for seed in range(600)]
    mean = sum(sources.stack([genome])["w"][0] for genome in rows) / len(rows)
    torch.testing.assert_close(mean, tau, rtol=0, atol=5 * math.sqrt(1.5 / 600))


def test_a_dropped_nan_is_the_base(tmp_path):
    sources = opened(tmp_path, torch.ones(400), torch.full((400,), torch.nan), operator="dare", density=0.5)
    share = torch.isfinite(merged(sources, 1.0)["w"]).float().mean().item()
    assert 0.4 < share < 0.6


# -- TIES ----------------------------------------------------------------------------------------------------

ONE, TWO = [3.0, -1.0, 0.5, 2.0], [-1.0, -2.0, 0.5, 0.1]


@pytest.mark.parametrize(("combine", "expected"), [("mean", [3.0, -1.5, 0.5, 1.05]), ("sum", [3.0, -3.0, 1.0, 2.1])])
@pytest.mark.parametrize("operator", ["ties", "dare_ties"])
def test_known_answers(tmp_path, operator, combine, expected):
    sources = opened(tmp_path, [0.0] * 4, ONE, TWO, operator=operator, density=1.0, combine=combine)
    assert merged(sources, 1, 1)["w"].flatten().tolist() == pytest.approx(expected)
    assert merged(sources, 0.5, 0.5)["w"].flatten().tolist() == pytest.approx([value / 2 for value in expected])


@pytest.mark.parametrize("operator", ["ties", "dare_ties"])
def test_equal_task_vectors_have_themselves_as_mean(tmp_path, operator):
    tau, base = torch.tensor(ONE), torch.tensor([8.0, 4.0, 2.0, 1.0])
    for combine, factor in (("mean", 1), ("sum", 4)):
        sources = opened(tmp_path, base, *[base + tau] * 4, operator=operator, density=1.0, combine=combine)
        assert torch.equal(merged(sources, 1, 1, 1, 1)["w"][0], base + factor * tau)


def test_task_vectors_that_share_no_position_add_up(tmp_path):
    base, *experts = fine_tuned(3, torch.float64)
    owner = {name: torch.randint(0, 3, shape, generator=torch.manual_seed(1)) for name, shape in SHAPES.items()}
    apart = [{n: torch.where(owner[n] == k, t, base[n]) for n, t in expert.items()} for k, expert in enumerate(experts)]
    for operator in ("ties", "dare_ties"):
        found = merged(opened(tmp_path, base, *apart, operator=operator, density=1.0), 0.7, -0.2, 1.3)
        plain = merged(opened(tmp_path, base, *apart, operator="task_arithmetic"), 0.7, -0.2, 1.3)
        for name in SHAPES:
            torch.testing.assert_close(found[name], plain[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.1, 0.6])
def test_a_sum_is_that_of_ties_vectors_and_a_mean_is_that_by_how_many_agree(tmp_path, density, dtype):
    models = fine_tuned(4, dtype)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    apart = opened(tmp_path, *models, operator="ties_vectors", density=density)
    tables = [torch.stack([t.to(kind) for t in apart.read(name)]) for name in apart.layout.tensors]
    kept = torch.cat([table[1:] - table[:1] for table in tables], dim=1)
    assert torch.equal(vectors(opened(tmp_path, *models, operator="ties", density=density, combine="sum")), kept)
    counts = (kept != 0).sum(dim=0).clamp(min=1)
    assert {1, 2, 3} <= set(counts.tolist())
    assert torch.equal(vectors(opened(tmp_path, *models, operator="ties", density=density)), kept / counts)


def test_dare_ties_elects_among_what_dare_keeps(tmp_path):
    models = fine_tuned(3, torch.float32)
    kept = vectors(opened(tmp_path, *models, operator="dare", density=0.5)).double()
    signs = kept.sum(dim=0).sign()
    signs[signs == 0] = 1.0 if signs.sum() >= 0 else -1.0
    agreeing = torch.where(kept * signs > 0, kept, 0.0)
    for combine, counts in (("sum", 1), ("mean", (agreeing != 0).sum(dim=0).clamp(min=1))):
        found = vectors(opened(tmp_path, *models, operator="dare_ties", density=0.5, combine=combine))
        torch.testing.assert_close(found.double(), agreeing / counts, rtol=1e-6, atol=0)


@pytest.mark.parametrize("operator", ["dare", "dare_ties", "ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_models_get_the_bits_of_small_ones(tmp_path, monkeypatch, operator, dtype):
    sources = opened(tmp_path, *fine_tuned(3, dtype), operator=operator, density=0.4)
    genomes = [Genome.uniform(SIZE, row) for row in np.random.default_rng(0).normal(size=(2, 3))]
    expected = sources.stack(genomes)
    monkeypatch.setattr(ecotone.merging.memory, "RESIDENT_BYTES", 0)
    for module in (ecotone.merging.sources, ties_vectors):
        monkeypatch.setattr(module, "SMALL", 0)
    monkeypatch.setattr(task_vectors, "SPAN", 1001)
    threads = torch.get_num_threads()
    try:
        for count, span in ((1, 2**18), (2, 997), (3, 5003)):
            torch.set_num_threads(count)
            monkeypatch.setattr(kernel, "COMPILED_SPAN", span)
            monkeypatch.setattr(kernel, "TORCH_SPAN", span)
            places = [expert.path for expert in sources.experts]
            again = Sources.open(places, sources.base.path, operator, settings={"density": 0.4}).stack(genomes)
            assert all(torch.equal(bits(again[name]), bits(expected[name])) for name in SHAPES)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("operator", "settings", "match"),
    [
        ("ties", {"density": 0}, "density: expected a number above 0 and at most 1, found 0"),
        ("dare", {"density": True}, "density: expected a number above 0 and at most 1, found True"),
        ("dare_ties", {"density": 1.2}, "density: expected a number above 0"),
        ("ties", {"combine": "median"}, "combine: expected mean or sum, found 'median'"),
        ("dare_ties", {"combine": 1}, "combine: expected mean or sum, found 1"),
        ("dare", {"mask_seed": -1}, "mask_seed: expected an integer from 0 to 4294967295, found -1"),
        ("dare_ties", {"mask_seed": 1.0}, "mask_seed: expected an integer"),
        ("slerp", {"per": "layer"}, "per: expected model or tensor, found 'layer'"),
    ],
)
def test_settings_out_of_range_are_refused(operator, settings, match):
    with pytest.raises(InputError, match=match):
        operators.get(operator, settings)


# -- SLERP ---------------------------------------------------------------------------------------------------


def slerp(a, b, t):
    angle = math.acos(float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)))
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def two_models(directory, **settings):
    generator = torch.Generator().manual_seed(3)
    models = [{n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()} for _ in "ab"]
    sources = opened(directory, models[0], *models, operator="slerp", **settings)
    return sources, *models


@pytest.mark.parametrize("t", [-0.3, 0.0, 0.25, 0.5, 1.0, 1.2])
def test_slerp_is_along_the_arc_of_the_whole_models(tmp_path, t):
    sources, a, b = two_models(tmp_path)
    assert sources.space().sources == ("model-2",)
    found = merged(sources, t, dtype=torch.float64)
    expected = slerp(flat(a, torch.float64), flat(b, torch.float64), t)
    torch.testing.assert_close(
        flat({n: v[0] for n, v in found.items()}, torch.float64), expected, rtol=1e-12, atol=1e-12
    )


def test_slerp_by_tensor_takes_each_tensors_angle(tmp_path):
    sources, a, b = two_models(tmp_path, per="tensor")
    genome = Genome(np.array([0, 500, SIZE]), np.array([[0.2], [0.7]]))
    assert sources.mixture(genome).borders.tolist() == [0, 500, 1240, 1247, SIZE]
    found = sources.stack([genome], torch.float64)
    for name in ("b.0", "b.1"):
        expected = slerp(a[name].flatten(), b[name].flatten(), 0.7)
        torch.testing.assert_close(found[name].flatten(), expected, rtol=1e-12, atol=1e-12)
    expected = [slerp(a["a"].flatten(), b["a"].flatten(), t) for t in (0.2, 0.7)]
    torch.testing.assert_close(found["a"].flatten(), torch.cat([expected[0][:500], expected[1][500:]]))


def test_slerp_keeps_the_norm_of_models_of_equal_norm(tmp_path):
    a, b = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.0, 0.0, 5.0])
    sources = opened(tmp_path, a, a, b, operator="slerp")
    for t in (0.1, 0.5, 0.8):
        assert merged(sources, t)["w"].norm().item() == pytest.approx(5.0, rel=1e-6)


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0, 0.0])
def test_slerp_of_parallel_opposite_and_zero_vectors_is_linear(tmp_path, factor):
    a = torch.tensor([3.0, 4.0, 0.0])
    sources = opened(tmp_path, a, a, factor * a, operator="slerp")
    torch.testing.assert_close(merged(sources, 0.25)["w"][0], 0.75 * a + 0.25 * factor * a)


@pytest.mark.parametrize("count", [1, 3])
def test_slerp_is_of_two_models(tmp_path, count):
    with pytest.raises(InputError, match=f"slerp interpolates between two models, found {count}"):
        opened(tmp_path, *fine_tuned(count, torch.float32), operator="slerp")


def test_slerp_has_no_fixed_directions_for_gradients(tmp_path):
    from ecotone.merging.gradient import Slopes

    sources, _, _ = two_models(tmp_path)
    with pytest.raises(InputError, match="expected one that is linear in its coefficients, found 'slerp'"):
        Slopes(sources, Genome.uniform(SIZE, [0.5]))
