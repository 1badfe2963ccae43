"""PCB, Consensus, SCE, Breadcrumbs, DELLA, EMR, Localize-and-Stitch, Arcee Fusion and WIDEN, against their formulas.

The references are loops over elements in float64, written from the papers' formulas.
"""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ecotone.merging.memory
import ecotone.merging.sources
from ecotone.merging import operators
from ecotone.merging.operators import order_statistics as selection
from ecotone.merging.operators import task_vectors
from ecotone.merging.operators.dare import mask_key, uniform_bits
from ecotone.merging.operators.elementary import exp, summed, tanh
from ecotone.merging.operators.task_vectors import Pieces
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome

EMBEDDING = "embed_tokens.weight"
SHAPES = {
    "a.weight": (9, 7),
    "b.bias": (11,),
    "c.row": (1, 12),
    "d.column": (6, 1),
    "e.conv": (4, 3, 2, 2),
    EMBEDDING: (8, 5),
    "experts": (2, 5, 4),
    "scale": (),
}
SIZE = sum(math.prod(shape) for shape in SHAPES.values())
CPU = torch.device("cpu")
NEW = ("arcee_fusion", "breadcrumbs", "consensus", "della", "emr", "localize_and_stitch", "pcb", "sce", "widen")


def bits(tensor):
    return tensor.flatten().contiguous().view(torch.uint8)


def fine_tuned(count, dtype=torch.float64, scale=0.3, seed=0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    base = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    experts = [
        {name: value + scale * rng.normal(size=value.shape) for name, value in base.items()} for _ in range(count)
    ]
    return [{name: torch.tensor(value).to(dtype) for name, value in model.items()} for model in (base, *experts)]


def opened(directory, *models, operator, **settings):
    """Sources of these models, the base first: each a list (one tensor) or a mapping."""
    paths = []
    for number, model in enumerate(models):
        paths.append(directory / f"model-{number}.safetensors")
        save_file(model if isinstance(model, dict) else {"w": torch.as_tensor(model)}, paths[-1])
    return Sources.open(paths[1:], paths[0], operator, settings=settings)


def vectors(sources):
    """By tensor name, (K, ...) what is added to the base."""
    shapes = {name: info.shape for name, info in sources.layout.parameters.items()}
    return {name: torch.stack(sources.read(name)[1:]).reshape(-1, *shape) for name, shape in shapes.items()}


def flat(sources):
    """(K, n) what is added to the base."""
    return torch.cat([torch.stack(sources.read(name)[1:]) for name in sources.layout.tensors], dim=1)


def merged(sources, *coefficients, dtype=torch.float64):
    return {
        name: value[0]
        for name, value in sources.stack([Genome.uniform(sources.layout.size, coefficients)], dtype).items()
    }


# -- references: theta - base at c = 1, for task vectors by tensor name ------------------------------------------


def whole(work):
    """A reference of one flat vector as one of tensors."""

    def reference(base, experts, **settings):
        names = sorted(base, key=list(base).index)
        starts = np.cumsum([0, *(base[name].size for name in names)])
        taus = [np.concatenate([(expert[name] - base[name]).ravel() for name in names]) for expert in experts]
        found = work(taus, **settings)
        return {
            name: found[a:b].reshape(base[name].shape)
            for name, a, b in zip(names, starts[:-1], starts[1:], strict=True)
        }

    return reference


def by_tensor(work):
    """A reference that sees one tensor after the other."""

    def reference(base, experts, **settings):
        return {name: work(name, base[name], [expert[name] for expert in experts], **settings) for name in base}

    return reference


def pcb(taus, density=0.1, outliers=1e-4, clamped_cross=False):
    n, count, result = len(taus[0]), len(taus), np.zeros(len(taus[0]))
    clamped, scores = [], []
    for tau in taus:
        order = sorted(abs(tau))
        low, high = order[int(n * outliers)], order[int(n * (1 - outliers) - 1)]
        clamped.append(np.array([math.copysign(min(max(abs(x), low), high), x) for x in tau]))
    cross = clamped if clamped_cross else taus
    for k, tau in enumerate(clamped):
        least, most = abs(tau).min(), abs(tau).max()
        score = []
        for i in range(n):
            intra = math.exp(count * ((abs(tau[i]) - least) / (most - least)) ** 2)
            score.append(intra * math.tanh(cross[k][i] * sum(other[i] for other in cross)))
        lowest = sorted(score)[int(n * (1 - density))]
        scores.append([(max(one, lowest) - lowest) / (max(score) - lowest) for one in score])
    for i in range(n):
        total = max(sum(score[i] for score in scores), 1e-12)
        result[i] = sum(tau[i] * score[i] for tau, score in zip(clamped, scores, strict=True)) / total
    return result


def consensus(taus, mask_lambda=0.4, agree=2):
    result = np.zeros(len(taus[0]))
    for i, column in enumerate(np.stack(taus).T):
        total = sum(column)
        votes = sum(abs(x) > mask_lambda * abs(total - x) for x in column)
        result[i] = total if votes >= agree else 0
    return result


def emr(taus):
    result = np.zeros(len(taus[0]))
    for i, column in enumerate(np.stack(taus).T):
        sign = 1 if sum(column) > 0 else -1
        result[i] = sign * max([abs(x) for x in column if x * sign > 0], default=0)
    return result


def localize(taus, density=0.1):
    n, result = len(taus[0]), np.zeros(len(taus[0]))
    masks = [abs(tau) >= sorted(abs(tau))[n - max(1, round(density * n))] for tau in taus]
    for i in range(n):
        count = sum(mask[i] for mask in masks)
        result[i] = sum(tau[i] for tau, mask in zip(taus, masks, strict=True) if mask[i]) / max(count, 1)
    return result


def sce(_name, base, experts, density=0.1, merges="selected"):
    taus = np.stack([(expert - base).ravel() for expert in experts])
    count, n = taus.shape
    variance = [sum((x - sum(column) / count) ** 2 for x in column) / count for column in taus.T]
    most = int(density * sum(one > 0 for one in variance))
    order = sorted(range(n), key=lambda i: -variance[i])
    selected = set(order[: max(1, most)]) if density < 1 and count > 1 else set(range(n))
    means = [sum(tau[i] ** 2 for i in selected) / n for tau in taus]
    shares = [mean / sum(means) for mean in means]
    result = np.zeros(n)
    for i in selected if merges == "selected" else range(n):
        sign = 1 if sum(taus[:, i]) >= 0 else -1
        keep = [tau[i] * sign > 0 for tau in taus]
        total = sum(itertools.compress(shares, keep))
        result[i] = sum(s * tau[i] for s, tau, kept in zip(shares, taus, keep, strict=True) if kept) / (total or 1)
    return result.reshape(base.shape)


def breadcrumbs(_name, base, experts, density=0.9, gamma=0.01):
    result = np.zeros(base.size)
    for expert in experts:
        tau = (expert - base).ravel()
        kept = max(1, int(density * tau.size))
        top = min(int(gamma * tau.size), tau.size - kept)
        order = np.argsort(abs(tau))
        for i in order[tau.size - top - kept : tau.size - top]:
            result[i] += tau[i]
    return result.reshape(base.shape)


def rows_of(table):
    """(rows, width) as the operators see rows."""
    if table.ndim < 2:
        return table.reshape(1, -1)
    return table.reshape(-1, table.shape[-1]) if table.ndim < 4 else table.reshape(len(table), -1)


def della(base, experts, density=0.5, epsilon=0.15, mask_seed=0, combine="mean"):
    result, place = {}, 0
    for name, table in base.items():
        sums, agreeing = [], []
        pruned = []
        for k, expert in enumerate(experts):
            drawn = uniform_bits(mask_key(mask_seed, k), place, table.size, CPU).double().numpy() / 2**32 + 0.5
            rows = rows_of(expert[name] - table)
            values = []
            for row in rows:
                for x in row:
                    rank = sum(abs(y) < abs(x) for y in row)
                    share = rank / (len(row) - 1) if len(row) > 1 else 0.5
                    p = density - epsilon + 2 * epsilon * share
                    values.append(x / p if drawn[len(values)] < p else 0.0)
            pruned.append(values)
        for column in zip(*pruned, strict=True):
            sign = 1 if sum(column) >= 0 else -1
            agreeing = [x for x in column if x * sign > 0]
            sums.append(sum(agreeing) / (max(len(agreeing), 1) if combine == "mean" else 1))
            if combine == "all":
                sums[-1] = sum(column)
        result[name] = np.array(sums).reshape(table.shape)
        place += table.size
    return result


def arcee_fusion(_name, base, experts, spread=1.5):
    [expert] = experts
    importance = []
    for row, old in zip(rows_of(expert), rows_of(base), strict=True):
        p, q = (np.exp(each - max(each)) / sum(np.exp(each - max(each))) for each in (row, old))
        divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        importance += [abs(x - y) * divergence for x, y in zip(row, old, strict=True)]
    ordered = sorted(importance)
    low, median, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    mask = np.array([one >= median + spread * (high - low) for one in importance]).reshape(base.shape)
    return np.where(mask, expert - base, 0)


def widen(name, base, experts, ratio=1.0, calibration=1.0):
    if base.ndim < 2:
        taus = [(expert - base).ravel() for expert in experts]
        result = np.zeros(base.size)
        means = [sum(abs(tau)) / len(tau) for tau in taus]
        for i in range(base.size):
            powers = [math.exp(abs(tau[i])) for tau in taus]
            for tau, power, mean in zip(taus, powers, means, strict=True):
                result[i] += tau[i] * (calibration if abs(tau[i]) > ratio * mean else power / sum(powers))
        return result.reshape(base.shape)
    if base.ndim == 3:
        pairs = zip(base, zip(*experts, strict=True), strict=True)
        return np.stack([widen("", old, list(new), ratio, calibration) for old, new in pairs])
    if name == EMBEDDING:
        return widen("", base.T, [expert.T for expert in experts], ratio, calibration).T
    old, news = base.reshape(len(base), -1), [expert.reshape(len(base), -1) for expert in experts]
    n = old.shape[1]
    moves = {"magnitude": [], "direction": []}
    for new in news:
        length, before = np.sqrt((new**2).sum(0)), np.sqrt((old**2).sum(0))
        moves["magnitude"].append(abs(length - before))
        moves["direction"].append([1 - (new[:, j] / length[j]) @ (old[:, j] / before[j]) for j in range(n)])
    result = np.zeros(old.shape)
    for table in moves.values():
        ranks = [[sum(other < one - 1e-14 for other in row) for one in row] for row in table]
        for j in range(n):
            powers = [math.exp(row[j] / n) for row in ranks]
            for row, new, power in zip(ranks, news, powers, strict=True):
                score = calibration if row[j] * n > ratio * sum(row) else power / sum(powers)
                result[:, j] += score / 2 * (new[:, j] - old[:, j])
    return result.reshape(base.shape)


REFERENCES = {
    "arcee_fusion": by_tensor(arcee_fusion),
    "breadcrumbs": by_tensor(breadcrumbs),
    "consensus": whole(consensus),
    "della": della,
    "emr": whole(emr),
    "localize_and_stitch": whole(localize),
    "pcb": whole(pcb),
    "sce": by_tensor(sce),
    "widen": by_tensor(widen),
}
CASES = [
    ("arcee_fusion", 1, {}),
    ("arcee_fusion", 1, {"spread": 0.2}),
    ("breadcrumbs", 3, {}),
    ("breadcrumbs", 3, {"density": 0.35, "gamma": 0.15}),
    ("breadcrumbs", 2, {"density": 0.9, "gamma": 0.3}),
    ("consensus", 4, {}),
    ("consensus", 3, {"mask_lambda": 1.1, "agree": 1}),
    ("consensus", 3, {"mask_lambda": 0.6, "agree": 3}),
    ("della", 3, {}),
    ("della", 3, {"density": 0.7, "epsilon": 0.3, "combine": "sum", "mask_seed": 4}),
    ("della", 2, {"density": 0.2, "epsilon": 0.1, "combine": "all"}),
    ("emr", 4, {}),
    ("emr", 1, {}),
    ("localize_and_stitch", 3, {"density": 0.4}),
    ("localize_and_stitch", 4, {}),
    ("pcb", 4, {}),
    ("pcb", 2, {"density": 0.6, "outliers": 0.05}),
    ("sce", 3, {}),
    ("sce", 4, {"density": 0.4, "merges": "all"}),
    ("sce", 2, {"density": 1.0}),
    ("widen", 3, {}),
    ("widen", 2, {"ratio": 0.6, "calibration": 0.7}),
    ("widen", 4, {"ratio": 10.0}),
]


@pytest.mark.parametrize(("operator", "count", "settings"), CASES)
def test_coefficients_of_one_are_the_published_merge(tmp_path, operator, count, settings):
    models = fine_tuned(count)
    sources = opened(tmp_path, *models, operator=operator, **settings)
    base, *experts = ({name: model[name].numpy() for name in sources.layout.tensors} for model in models)
    expected = REFERENCES[operator](base, experts, **settings)
    changed = 0
    for name, values in merged(sources, *[1.0] * count).items():
        np.testing.assert_allclose(values.numpy(), base[name] + expected[name], rtol=1e-11, atol=1e-12, err_msg=name)
        changed += np.count_nonzero(expected[name])
    assert changed > 0


@pytest.mark.parametrize(("operator", "count", "settings"), CASES[::2])
def test_models_of_16_bits_are_merged_as_in_float64(tmp_path, operator, count, settings):
    models = fine_tuned(count, torch.float16)
    found = flat(opened(tmp_path, *models, operator=operator, **settings)).double()
    wider = [{name: tensor.double() for name, tensor in model.items()} for model in models]
    wide = flat(opened(tmp_path, *wider, operator=operator, **settings))
    torch.testing.assert_close(found, wide, rtol=2e-6, atol=1e-7)


# -- the same bits wherever, however -----------------------------------------------------------------------------


@pytest.mark.parametrize("operator", NEW)
def test_models_are_streamed_to_the_same_bits(tmp_path, monkeypatch, operator):
    models = fine_tuned(3, torch.float32)
    sources = opened(tmp_path, *models, operator=operator)
    expected = flat(sources)
    monkeypatch.setattr(ecotone.merging.memory, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(selection, "FEW", 0)
    monkeypatch.setattr(task_vectors, "SPAN", 13)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = opened(tmp_path, *models, operator=operator)
        assert torch.equal(bits(flat(again)), bits(expected))
        monkeypatch.setattr(task_vectors, "BLOCK", 20)  # by which sums over a tensor may differ in last bits
        blocks = flat(opened(tmp_path, *models, operator=operator))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(blocks, expected, rtol=1e-6, atol=1e-9)
    transform = again.operator.transform(again.held.pieces)
    whole = [torch.cat([again.held.read(name)[j] for name in again.layout.tensors]) for j in range(4)]
    for low, high in ((0, SIZE), (5, 100), (62, 64), (73, 74), (SIZE - 1, SIZE)):  # across borders of tensors
        found = transform([piece[low:high] for piece in whole], low)
        assert torch.equal(bits(torch.stack(found[1:])), bits(expected[:, low:high]))


def test_threads_share_the_rows_of_della(tmp_path, monkeypatch):
    monkeypatch.setattr(task_vectors, "BLOCK", 20)
    sources = opened(tmp_path, *fine_tuned(3), operator="della")
    stored = [torch.cat([sources.held.read(name)[j] for name in sources.layout.tensors]) for j in range(4)]
    transform = sources.operator.transform(sources.held.pieces)
    whole = torch.stack(transform(stored, 0)[1:])
    lows = np.random.default_rng(0).permutation(np.repeat(np.arange(0, SIZE - 30, 9), 2)).tolist()
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda low: transform([piece[low : low + 30] for piece in stored], low), lows)
        for low, pieces in zip(lows, found, strict=True):
            assert torch.equal(torch.stack(pieces[1:]), whole[:, low : low + 30])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("operator", NEW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_gpu_prepares_the_same_bytes(tmp_path, operator, dtype):
    sources = opened(tmp_path, *fine_tuned(3, dtype), operator=operator)
    for name in sources.layout.tensors:
        there = sources.near(name, torch.device("cuda")).tensors(torch.device("cuda"))
        assert all(torch.equal(bits(a.cpu()), bits(b)) for a, b in zip(there, sources.read(name), strict=True))


@pytest.mark.parametrize("few", [0, 10_000])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
def test_order_statistics_are_those_of_sorting(tmp_path, monkeypatch, kind, few):
    monkeypatch.setattr(selection, "FEW", few)
    monkeypatch.setattr(task_vectors, "SPAN", 100)
    numbers = torch.tensor(np.random.default_rng(0).normal(size=700)).to(kind) * 1e3
    numbers[:40] = torch.tensor([0.0, -0.0, 1e-40, -1e-40]).to(kind).repeat(10)
    sources = opened(tmp_path, torch.zeros(700, dtype=kind), numbers, -numbers, operator="emr")
    pieces = Pieces(sources.layout, sources.held.read)
    ranks = [1, 2, 330, 350, 371, 699, 700]
    for models in (pieces, pieces.tensors[0]):
        found = selection.order_statistics(models, lambda cut, _: cut[1:], [ranks, [5]], kind)
        ordered = numbers.sort(descending=True).values.tolist()
        assert found == [tuple(ordered[rank - 1] for rank in ranks), (-ordered[-5],)]


def test_functions_of_sums_and_products_are_those_of_the_library():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=2000) * 10.0 ** rng.integers(-12, 2, 2000), [0.0, 700.0, -700.0, 0.5, -20.0]])
    np.testing.assert_allclose(exp(torch.tensor(x)).numpy(), np.exp(x), rtol=5e-16)
    np.testing.assert_allclose(tanh(torch.tensor(x)).numpy(), np.tanh(x), rtol=1e-15)
    assert exp(torch.zeros(1).double()).item() == 1
    assert tanh(torch.zeros(1).double()).item() == 0


def test_a_sum_is_the_same_in_any_order():
    rng = np.random.default_rng(0)
    rows = list(torch.tensor(rng.normal(size=(5, 300)) * 10.0 ** rng.integers(-20, 20, (5, 300))))
    rows[0][0] = rows[1][0] = rows[2][0] = rows[3][0] = rows[4][0] = -0.0
    expected = summed(rows)
    for order in itertools.islice(itertools.permutations(range(5)), 1, None, 7):
        assert torch.equal(bits(summed([rows[i] for i in order])), bits(expected))
    np.testing.assert_allclose(expected.numpy(), [math.fsum(column) for column in torch.stack(rows).T], rtol=1e-13)


# -- properties ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", NEW)
def test_experts_that_are_the_base_give_the_base(tmp_path, operator):
    base, other, _ = fine_tuned(2, torch.float32)
    base["zero"] = torch.zeros(4, 6)
    base["zeros"] = torch.zeros(5)
    other |= {name: base[name].clone() for name in ("zero", "zeros", "a.weight")}
    for dtype in (torch.float32, torch.bfloat16):
        same = [{name: value.to(dtype) for name, value in base.items()} for _ in range(4)]
        for name, values in merged(opened(tmp_path, *same, operator=operator), 1, 1, 1, dtype=dtype).items():
            assert torch.equal(bits(values), bits(same[0][name]))
    found = merged(opened(tmp_path, base, base, other, operator=operator), 1, 1, dtype=torch.float32)
    for name, values in found.items():  # tensors that no expert changed
        assert torch.isfinite(values).all()
        assert not torch.equal(other[name], base[name]) or torch.equal(values, base[name])


ALONE = {
    "breadcrumbs": {"density": 1.0},
    "consensus": {"agree": 1},
    "della": {"density": 1.0},
    "emr": {},
    "localize_and_stitch": {"density": 1.0},
    "sce": {"density": 0.1},
    "widen": {},
}


@pytest.mark.parametrize("operator", ALONE)
def test_an_expert_alone_is_itself(tmp_path, operator):
    base, expert = fine_tuned(1)
    for name, values in merged(opened(tmp_path, base, expert, operator=operator, **ALONE[operator]), 1).items():
        torch.testing.assert_close(values, expert[name])


@pytest.mark.parametrize("operator", ["della", "emr", "localize_and_stitch", "sce"])
def test_equal_experts_give_the_expert(tmp_path, operator):
    base, expert = fine_tuned(1)
    settings = {"density": 1.0} if operator in ("della", "localize_and_stitch") else {}
    for name, values in merged(opened(tmp_path, base, *[expert] * 5, operator=operator, **settings), *[1] * 5).items():
        torch.testing.assert_close(values, expert[name])


@pytest.mark.parametrize("operator", ["breadcrumbs", "consensus", "della", "emr", "localize_and_stitch", "sce"])
def test_scaling_all_task_vectors_scales_the_result(tmp_path, operator):
    _, *experts = fine_tuned(3, torch.float32)
    base = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    plain = flat(opened(tmp_path, base, *experts, operator=operator))
    for factor in (2.0**-30, 2.0**20):
        scaled = [{name: factor * value for name, value in expert.items()} for expert in experts]
        assert torch.equal(flat(opened(tmp_path, base, *scaled, operator=operator)), factor * plain)
    assert plain.count_nonzero() > 0


def test_pcb_scales_where_task_vectors_are_small(tmp_path):
    plain, small, large = (
        flat(opened(tmp_path, *fine_tuned(3, scale=scale), operator="pcb")) for scale in (1e-3, 1e-4, 3.0)
    )
    torch.testing.assert_close(10 * small, plain, rtol=1e-4, atol=1e-6)
    assert (large / 3e3 - plain).abs().max() > 1e-4  # where tanh is no line


@pytest.mark.parametrize("operator", ["consensus", "emr", "localize_and_stitch", "pcb"])
def test_permuting_positions_permutes_the_result(tmp_path, operator):
    models = [torch.cat([t.flatten() for t in model.values()]) for model in fine_tuned(3)]
    order = torch.randperm(SIZE, generator=torch.manual_seed(0))
    plain = flat(opened(tmp_path, *models, operator=operator))
    found = flat(opened(tmp_path, *[model[order] for model in models], operator=operator))
    assert torch.equal(found, plain[:, order])


@pytest.mark.parametrize("operator", ["arcee_fusion", "breadcrumbs", "sce", "widen"])
def test_permuting_rows_and_columns_permutes_the_result(tmp_path, operator):
    models = fine_tuned(3, shapes={"w": (13, 9)})
    generator = torch.manual_seed(0)
    rows, columns = torch.randperm(13, generator=generator), torch.randperm(9, generator=generator)
    plain = vectors(opened(tmp_path, *models, operator=operator))["w"]
    turned = [{"w": model["w"][rows][:, columns].contiguous()} for model in models]
    found = vectors(opened(tmp_path, *turned, operator=operator))["w"]
    torch.testing.assert_close(found, plain[:, rows][:, :, columns], rtol=1e-12, atol=1e-14)


# -- traps ---------------------------------------------------------------------------------------------------------


def test_pcb_counts_quantiles_by_index_and_compares_unclamped_entries(tmp_path):
    models = fine_tuned(2, scale=1.5, shapes={"w": (40,)})
    base, *experts = (model["w"].numpy() for model in models)
    taus = [expert - base for expert in experts]
    settings = {"density": 0.3, "outliers": 0.2}
    found = flat(opened(tmp_path, *models, operator="pcb", **settings)).sum(dim=0).numpy()
    np.testing.assert_allclose(found, pcb(taus, **settings), rtol=1e-12)
    assert np.abs(found - pcb(taus, **settings, clamped_cross=True)).max() > 1e-3
    # [1 2 3 4]: sorted[int(4 * .1)] is 1, sorted[int(4 * .9 - 1)] is 3, so 4 counts as 3 and ties with it.
    one = flat(opened(tmp_path, [0.0] * 4, [1.0, 2.0, 3.0, 4.0], operator="pcb", density=1.0, outliers=0.1))
    assert one.tolist() == [[0.0, 2.0, 3.0, 3.0]]


@pytest.mark.parametrize("size", [1, 3, 50])
def test_pcb_of_entries_of_one_magnitude_is_their_mean(tmp_path, size):
    tau = torch.full((size,), 0.25)
    assert flat(opened(tmp_path, torch.zeros(size), tau, tau, operator="pcb")).sum(dim=0).tolist() == tau.tolist()


def test_sce_weighs_small_task_vectors_by_their_squares(tmp_path):
    one, two = torch.full((4, 4), 1e-5), torch.full((4, 4), 4e-5)
    found = flat(opened(tmp_path, torch.zeros(4, 4), one, two, operator="sce", density=1.0))
    np.testing.assert_allclose(found[0].numpy() / 1e-5, 1 / 17, rtol=1e-6)
    np.testing.assert_allclose(found[1].numpy() / 4e-5, 16 / 17, rtol=1e-6)


def test_sce_has_no_weights_in_a_tensor_of_zeros(tmp_path):
    base = {"w": torch.ones(3, 3), "still": torch.ones(3, 3)}
    experts = [{"w": base["w"] + k, "still": base["still"]} for k in (1, 2)]
    assert merged(opened(tmp_path, base, *experts, operator="sce"), 1, 1)["still"].tolist() == [[1.0] * 3] * 3


def test_sce_selects_at_least_one_position_and_only_moved_ones(tmp_path):
    one, two = [0.0, 1.0, 3.0, 0.0], [0.0, 1.0, 1.0, 0.5]
    assert flat(opened(tmp_path, [0.0] * 4, one, two, operator="sce", density=1e-9)).count_nonzero(dim=0).tolist() == [
        *(0, 0, 2, 0)
    ]
    assert flat(opened(tmp_path, [0.0] * 4, one, two, operator="sce", density=0.99)).count_nonzero(dim=0).tolist() == [
        *(0, 0, 2, 0)  # int(0.99 * 2)
    ]


@pytest.mark.parametrize(("size", "kept"), [(1, 1), (2, 1), (99, 89), (100, 90), (1000, 900)])
def test_breadcrumbs_keeps_tensors_that_are_too_small_to_have_outliers(tmp_path, size, kept):
    tau = torch.linspace(1, 2, size)
    found = flat(opened(tmp_path, torch.zeros(size), tau, operator="breadcrumbs", density=0.9, gamma=0.01))[0]
    assert found.count_nonzero() == kept
    top = size // 100
    assert torch.equal(found[size - top - kept : size - top], tau[size - top - kept : size - top])


def test_breadcrumbs_keeps_the_density_rather_than_drop_outliers(tmp_path):
    tau = torch.linspace(1, 2, 10)
    found = flat(opened(tmp_path, torch.zeros(10), tau, operator="breadcrumbs", density=0.8, gamma=0.5))[0]
    assert torch.equal(found != 0, torch.arange(10) < 8)


def test_della_keeps_entries_by_their_rank_within_their_row(tmp_path):
    tau = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [5e6, 4e6, 3e6, 2e6, 1e6], [7.0] * 5]).double()
    rows = tau.repeat(1500, 1)
    sources = opened(tmp_path, torch.zeros_like(rows), rows, operator="della", epsilon=0.4, combine="all")
    found = vectors(sources)["w"].reshape(1500, 3, 5)
    chances = torch.tensor([[0.1, 0.3, 0.5, 0.7, 0.9], [0.9, 0.7, 0.5, 0.3, 0.1], [0.5] * 5]).double()
    room = 4.5 * (chances * (1 - chances) / 1500).sqrt()
    assert (((found != 0).double().mean(dim=0) - chances).abs() <= room).all()
    torch.testing.assert_close(found[found != 0], (tau / chances).expand_as(found)[found != 0])
    assert ((found.mean(dim=0) - tau).abs() <= tau * room / chances).all()


def test_della_narrows_epsilon_to_chances_and_entries_only_join(tmp_path):
    models = fine_tuned(1)
    masks = [
        flat(opened(tmp_path, *models, operator="della", density=density, epsilon=0.5, combine="all")) != 0
        for density in (0.5, 0.7, 0.95, 1.0)
    ]
    assert all((one <= two).all() for one, two in itertools.pairwise(masks))
    assert masks[-1].all()
    assert 0.3 < masks[0].double().mean() < 0.7


def test_emr_takes_a_sum_of_zero_as_negative(tmp_path):
    one, two = [1.0, 3.0, 0.0, -2.0, 0.1], [-1.0, -1.0, 0.0, -2.0, 0.2]
    sources = opened(tmp_path, [0.0] * 5, one, two, operator="emr")
    assert merged(sources, 1, 1)["w"].tolist() == pytest.approx([-1.0, 3.0, 0.0, -2.0, 0.2])
    assert flat(sources)[:, 3].tolist() == [-1.0, -1.0]  # equal entries share the place


def test_localize_and_stitch_divides_overlaps_by_all_their_masks(tmp_path):
    taus = [[6.0, 0.0, 0.1], [3.0, 4.0, 0.1], [9.0, 0.0, 8.0]]
    found = merged(opened(tmp_path, [0.0] * 3, *taus, operator="localize_and_stitch", density=2 / 3), 1, 1, 1)["w"]
    assert found.tolist() == pytest.approx([6.0, 4.0, 4.05])  # 18 / 3; zeros are in no mask; (0.1 + 8) / 2


def test_masks_of_consensus_shrink_with_lambda_and_hold_all_for_one_task(tmp_path):
    models = fine_tuned(3)
    kept = [
        flat(opened(tmp_path, *models, operator="consensus", mask_lambda=factor)) != 0
        for factor in (0.0, 0.3, 0.8, 2.0)
    ]
    assert all((two <= one).all() for one, two in itertools.pairwise(kept))
    assert kept[0].all()
    assert not kept[-1].all()
    every = flat(opened(tmp_path, *models, operator="consensus", agree=0, mask_lambda=2.0))
    taus = [flat(opened(tmp_path, models[0], expert, operator="emr"))[0] for expert in models[1:]]
    torch.testing.assert_close(every, torch.stack(taus))


def test_consensus_of_fewer_experts_than_must_agree_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"merge.agree: expected at most the number of experts, 1, found 2"):
        opened(tmp_path, *fine_tuned(1), operator="consensus")


@pytest.mark.slow
def test_arcee_fusion_counts_all_entries_of_large_tensors(tmp_path):
    models = fine_tuned(1, torch.float32, shapes={"w": (1100, 1000)})
    found = vectors(opened(tmp_path, *models, operator="arcee_fusion"))["w"][0]
    base, expert = (model["w"].double() for model in models)
    p, q = expert.log_softmax(dim=1), base.log_softmax(dim=1)
    tau = (models[1]["w"] - models[0]["w"]).double()
    importance = tau.abs() * (p.exp() * (p - q)).sum(dim=1, keepdim=True)
    ordered = importance.flatten().sort().values
    low, median, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    expected = importance >= median + 1.5 * (high - low)
    assert ((found != 0) != expected).sum() <= 3  # at the threshold
    assert torch.equal(found, vectors(opened(tmp_path, *models, operator="arcee_fusion"))["w"][0])


def test_arcee_fusion_tells_small_changes_of_rows_apart(tmp_path):
    base = torch.randn(8, 20, dtype=torch.float64, generator=torch.manual_seed(0))
    change = torch.randn(8, 20, dtype=torch.float64, generator=torch.manual_seed(1))
    masks = [
        flat(opened(tmp_path, base, base + scale * change, operator="arcee_fusion", spread=0.5)) != 0
        for scale in (1e-3, 1e-7)
    ]
    assert 0 < masks[0].sum() < 160
    assert ((masks[0] != masks[1]).sum() <= 2).all()


def test_widen_of_columns_of_zeros_is_finite(tmp_path):
    base, one, two = (model["w"] for model in fine_tuned(2, shapes={"w": (6, 5)}))
    base[:, 0] = one[:, 0] = 0  # dead in the base, and in one expert
    base[:, 1] = one[:, 1] = two[:, 1] = 0  # dead
    two[:, 2] = 0  # an expert has cleared it
    found = vectors(opened(tmp_path, base, one, two, operator="widen"))["w"]
    assert torch.isfinite(found).all()
    assert found[:, :, 1].count_nonzero() == 0
    assert found[0, :, 0].count_nonzero() == 0
    assert torch.equal(found[1, :, 2] / (two - base)[:, 2], torch.ones(6).double())  # at a right angle: above the mean


def test_scores_of_widen_need_not_add_up_to_one(tmp_path):
    models = fine_tuned(2, shapes={"w": (6, 9)})
    found = vectors(opened(tmp_path, *models, operator="widen"))["w"]
    scores = sum(found[k, 0] / (models[k + 1]["w"] - models[0]["w"])[0] for k in range(2))
    assert scores.max() > 1.2
    plain = vectors(opened(tmp_path, *models, operator="widen", ratio=10.0))["w"]
    scores = sum(plain[k, 0] / (models[k + 1]["w"] - models[0]["w"])[0] for k in range(2))
    torch.testing.assert_close(scores, torch.ones(9).double())


@pytest.mark.parametrize(
    ("operator", "settings", "match"),
    [
        ("pcb", {"density": 0}, "density: expected a number above 0 and at most 1, found 0"),
        ("pcb", {"outliers": 0.5}, "outliers: expected a number at least 0 and below 0.5, found 0.5"),
        ("consensus", {"mask_lambda": -1}, "mask_lambda: expected a number from 0 to 2, found -1"),
        ("consensus", {"agree": 1.5}, "agree: expected an integer at least 0, found 1.5"),
        ("sce", {"merges": "masks"}, "merges: expected selected or all, found 'masks'"),
        ("breadcrumbs", {"gamma": 1}, "gamma: expected a number at least 0 and below 1, found 1"),
        ("della", {"epsilon": 0.6}, "epsilon: expected a number from 0 to 0.5, found 0.6"),
        ("della", {"combine": "median"}, "combine: expected mean, sum or all, found 'median'"),
        ("widen", {"ratio": "1"}, "ratio: expected a number from 0 to 10, found '1'"),
        ("arcee_fusion", {"spread": 11}, "spread: expected a number from 0 to 10, found 11"),
        ("emr", {"density": 0.5}, "density: the operator 'emr' has no such setting. It takes none"),
    ],
)
def test_settings_out_of_range_are_refused(operator, settings, match):
    with pytest.raises(InputError, match=match):
        operators.get(operator, settings)
