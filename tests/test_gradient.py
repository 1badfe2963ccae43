"""Gradients by coefficients: equal to autograd through the merge, whatever is merged; nothing is left behind."""

import sys
import weakref

import numpy as np
import pytest
import torch
from parts import calibration, call, objective
from safetensors.torch import save_file, save_model

from ecotone.fitness.backends import activation_checkpointing as checkpointing
from ecotone.fitness.backends import resident
from ecotone.fitness.backends.resident import Resident
from ecotone.fitness.pools import Batch, SerialPool
from ecotone.fitness.specs import WorkerSpec
from ecotone.fitness.worker import Worker
from ecotone.merging import gradient as gradients
from ecotone.merging.gradient import Slopes
from ecotone.merging.kernel import compiled
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome
from ecotone.populations.trial import Evaluation, Gradient, Scores, Trial

pytestmark = pytest.mark.usefixtures("threads")
CPU = torch.device("cpu")
OPERATORS = {"linear": {}, "task_arithmetic": {}, "ties_vectors": {"density": 0.5}}
STACKS = [0, 1 << 26]
MODULE = """
import torch
from torch import nn

def net(): return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
class Tied(nn.Module):
    def __init__(self, tie):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        if tie: self.second.weight = self.first.weight
    def forward(self, x): return self.second(torch.tanh(self.first(x)))
def tied(tie=True): return Tied(tie)
class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.used, self.unused = nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Linear(5, 2)
        for value in (self.norm.weight, self.norm.bias, self.norm.running_mean, self.norm.running_var):
            nn.init.uniform_(value, 0.5, 1.5)
    def forward(self, x): return self.used(self.norm(x))
def half(): return Half()
class Caching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.table = nn.Linear(4, 6), nn.Linear(6, 3), None
    def forward(self, x):
        x = self.first(x)
        if self.table is None: self.table = torch.linspace(0.5, 1.5, 6, dtype=x.dtype)
        return self.second(x * self.table)
def caching(): return Caching()
class Drawing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.off, self.second = nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)
    def forward(self, x): return self.second(self.off(nn.functional.dropout(self.first(x), 0.5)))
def drawing(): return Drawing()
class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(7, 2)
    def forward(self, outputs, inputs): return self.linear(outputs)
def wide(): return Wide()
def forgets(model):
    model.train()
    return torch.rand(()).item()

def data(n=20, scale=1.0):
    generator = torch.Generator().manual_seed(3)
    return scale * torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)
def total(model): return sum(float(t.double().sum()) for t in model.state_dict().values())
def spoils(model):
    with torch.no_grad():
        for parameter in model.parameters(): parameter.zero_()
    return 0.0
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with the module of architectures."""
    (tmp_path / "gradients_tested.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "gradients_tested", raising=False)
    return tmp_path


def architecture(name, **arguments):
    return call(f"gradients_tested:{name}", arguments)


def written(folder, name, count, dtype=torch.float64, **arguments):
    """Files with ``count`` models of a function of the module."""
    import gradients_tested

    paths = [folder / f"{name}{seed}.safetensors" for seed in range(count)]
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        save_model(getattr(gradients_tested, name)(**arguments).to(dtype), str(path))
    return paths


def opened(paths, operator="task_arithmetic"):
    """The first path is the base, where the operator needs one."""
    return Sources.open(paths[1:], paths[0], operator, settings=OPERATORS[operator])


def genome_of(sources, cuts, seed=0):
    layout, rng = sources.layout, np.random.default_rng(seed)
    inside = np.unique(rng.integers(1, layout.size, 7))
    borders = {
        "uniform": np.array([0, layout.size]),
        "blocks": layout.block_borders,
        "tensors": layout.tensor_borders,
        "inside": np.concatenate([[0], inside, [layout.size]]),
        "elements": np.arange(layout.size + 1),
    }[cuts]
    return Genome(borders, rng.normal(0.3, 0.3, (len(borders) - 1, len(sources.experts))))


def through_the_merge(sources, genome, model, loss):
    """The loss and its gradient by autograd: a graph from the coefficients to all weights and on to the loss."""
    layout = sources.layout
    table = torch.cat([torch.stack(sources.read(name)).double() for name in layout.tensors], 1)
    coefficients = torch.tensor(genome.coefficients, requires_grad=True)
    weights = coefficients
    if sources.operator.needs_base:
        weights = torch.cat([1 - coefficients.sum(1, keepdim=True), coefficients], 1)
    lengths = torch.tensor(np.diff(genome.boundaries))
    flat = (weights.repeat_interleave(lengths, 0).T * table).sum(0)
    pieces = flat.split([info.size for info in layout.parameters.values()])
    merged = {n: p.view(s) for n, p, s in zip(layout.tensors, pieces, layout.shapes, strict=True)}
    buffers = dict(model.named_buffers())
    merged = {name: value.detach() if name in buffers else value for name, value in merged.items()}
    merged |= {alias: merged[name] for alias, name in layout.aliases.items()}
    every = dict(model.named_parameters(remove_duplicate=False))
    twins = {id(every[name]): name for name in merged if name in every}
    merged |= {name: merged[twins[id(value)]] for name, value in every.items() if name not in merged}

    def call(*inputs, **named):
        return torch.func.functional_call(model, merged, inputs, named, tie_weights=False)

    value = loss(call)
    value.backward()
    return float(value.detach()), coefficients.grad.numpy()


def entropy(model):
    logits = torch.log_softmax(model(torch.linspace(-2, 2, 40, dtype=torch.float64).view(10, 4)), -1)
    return -(logits.exp() * logits).sum(-1).mean()


def gradient(made, genome, loss):
    """One loss and its gradient."""
    [value], slopes = made.gradient(genome, lambda model: iter([loss(model)]))
    return value, slopes


def agree(sources, genome, made, loss, rtol=1e-10):
    value, slopes = gradient(made, genome, loss)
    expected_value, expected = through_the_merge(sources, genome, made.model, loss)
    assert slopes.shape == genome.coefficients.shape
    assert slopes.dtype == np.float64
    assert np.abs(expected).max() > 0
    assert value == pytest.approx(expected_value, rel=rtol)
    np.testing.assert_allclose(slopes, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


# -- equal to autograd ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack_bytes", STACKS)
@pytest.mark.parametrize("cuts", ["uniform", "blocks", "tensors", "inside", "elements"])
@pytest.mark.parametrize("experts", [1, 2, 4])
@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_are_those_of_autograd_through_the_merge(folder, operator, experts, cuts, stack_bytes):
    sources = opened(written(folder, "net", experts + 1), operator)
    made = Resident(sources, architecture("net"), CPU, torch.float64, stack_bytes)
    for seed in range(2):
        agree(sources, genome_of(sources, cuts, seed), made, entropy)


@pytest.mark.parametrize("stack_bytes", STACKS)
@pytest.mark.parametrize("tie", [True, False])
def test_a_tied_tensor_takes_the_gradients_of_both_its_uses(folder, tie, stack_bytes):
    sources = opened(written(folder, "tied", 3))
    assert sources.layout.size == 16
    made = Resident(sources, architecture("tied", tie=tie), CPU, torch.float64, stack_bytes)
    agree(sources, genome_of(sources, "inside"), made, entropy)


def test_running_means_are_constants_and_unused_weights_have_no_slope(folder):
    sources = opened(written(folder, "half", 3))
    genome = genome_of(sources, "tensors")
    made = Resident(sources, architecture("half"), CPU, torch.float64)
    agree(sources, genome, made, entropy)
    slopes = dict(zip(sources.layout.tensors, gradient(made, genome, entropy)[1], strict=True))
    still = {name for name, row in slopes.items() if not row.any()}
    assert still == {"norm.running_mean", "norm.running_var", "unused.weight", "unused.bias"}


def test_a_residual_is_a_constant(folder):
    sources = opened(written(folder, "net", 3), "linear")
    plain = genome_of(sources, "tensors")
    residual = np.random.default_rng(0).normal(size=plain.size).astype(np.float32)
    made = Resident(sources, architecture("net"), CPU, torch.float64)
    genome = Genome(plain.boundaries, plain.coefficients, {}, residual)
    value, slopes = gradient(made, genome, entropy)
    step = 1e-6 * slopes
    up, down = (gradient(made, Genome(plain.boundaries, c, {}, residual), entropy)[0] for c in
                (plain.coefficients + step, plain.coefficients - step))  # fmt: skip
    assert (up - down) / 2 == pytest.approx(float((slopes * step).sum()), rel=1e-6)
    assert value != gradient(made, plain, entropy)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inner_products_with_small_task_vectors_keep_their_digits(folder, dtype):
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(70_000, generator=rng)
    for number in range(3):
        tuned = base + 1e-2 * number * torch.randn(70_000, generator=rng)
        save_file({"w": tuned.to(dtype)}, folder / f"{number}.safetensors")
    sources = opened([folder / f"{number}.safetensors" for number in range(3)])
    genome, gradient = genome_of(sources, "inside"), torch.randn(70_000, generator=rng).to(dtype)
    slopes = Slopes(sources, genome)
    slopes.add("w", gradient)
    stored = [tensor.double() for tensor in sources.read("w")]
    directions = torch.stack([tensor - stored[0] for tensor in stored[1:]])
    parts = (gradient.double() * directions).tensor_split(genome.boundaries[1:-1].tolist(), 1)
    expected = torch.stack([part.sum(1) for part in parts]).numpy()
    np.testing.assert_allclose(slopes.values, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


# -- how they are collected ----------------------------------------------------------------------------------


@pytest.fixture
def wide(folder):
    """Two tensors of several chunks and a small one, with gradients."""
    rng = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 40_000), "b": (2, 17), "c": (70_001,)}
    for number in range(4):
        tensors = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
        save_file(tensors, folder / f"wide{number}.safetensors")
    sources = opened([folder / f"wide{number}.safetensors" for number in range(4)])
    return sources, {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def collected(sources, genome, gradients_by_name):
    slopes = Slopes(sources, genome)
    for name, gradient in gradients_by_name:
        slopes.add(name, gradient)
    return slopes.values


def test_slopes_depend_neither_on_threads_nor_on_the_order_of_tensors(wide):
    sources, found = wide
    genome = genome_of(sources, "inside")
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results += [collected(sources, genome, order) for order in (list(found.items()), list(found.items())[::-1])]
    assert all(np.array_equal(result, results[0]) for result in results)


@pytest.mark.parametrize("resident", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_compiled_loops_give_the_same_bits(folder, monkeypatch, operator, dtype, resident):
    pytest.importorskip("numba")
    rng = torch.Generator().manual_seed(0)
    for number in range(4):
        tensors = {"a": torch.randn(70_001, generator=rng), "b": torch.randn(33, generator=rng)}
        save_file({name: value.to(dtype) for name, value in tensors.items()}, folder / f"{number}.safetensors")
    sources = opened([folder / f"{number}.safetensors" for number in range(4)], operator)
    found = {name: torch.randn(info.shape, generator=rng) for name, info in sources.layout.parameters.items()}
    found = {name: gradient.to(resident) for name, gradient in found.items()}
    used, products = [], compiled.products
    monkeypatch.setattr(compiled, "products", lambda *given: (used.append(given), products(*given)))
    for cuts in ("uniform", "inside"):
        genome = genome_of(sources, cuts)
        plain = collected(sources, genome, found.items())
        assert not used
        with monkeypatch.context() as patch:
            patch.setattr("ecotone.merging.sources.SMALL", 0)
            assert np.array_equal(collected(sources, genome, found.items()), plain)
        assert used
        used.clear()


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_weights_without_a_gradient_are_passed_over(folder, monkeypatch, operator, compiles):
    if compiles:
        pytest.importorskip("numba")
        monkeypatch.setattr("ecotone.merging.sources.SMALL", 0)
    rng = torch.Generator().manual_seed(0)
    for number in range(4):
        save_file({"words": torch.randn(5000, 30, generator=rng)}, folder / f"{number}.safetensors")
    sources = opened([folder / f"{number}.safetensors" for number in range(4)], operator)
    genome, gradient = genome_of(sources, "inside"), torch.zeros(5000, 30)
    used = torch.tensor([0, 7, 8, 4990, 4999])  # of five chunks the second to fourth have none of them
    gradient[used] = torch.randn(5, 30, generator=rng)
    read, slices = [], gradients.Stretch.__getitem__
    monkeypatch.setattr(gradients.Stretch, "__getitem__", lambda self, part: read.append(part) or slices(self, part))
    slopes = collected(sources, genome, [("words", gradient)])
    assert read
    assert all(part.start < 9 * 30 or part.stop > 4990 * 30 for part in read)
    dense = collected(sources, genome, [("words", gradient + 1e-30)])  # moves nothing that float32 can tell
    np.testing.assert_allclose(slopes, dense, rtol=1e-6, atol=1e-20)


def test_chunks_change_rounding_only(wide, monkeypatch):
    sources, found = wide
    genome = genome_of(sources, "inside")
    whole = collected(sources, genome, found.items())
    monkeypatch.setattr(gradients, "CHUNK", 9999)
    np.testing.assert_allclose(collected(sources, genome, found.items()), whole, rtol=1e-4, atol=1e-3)


def test_a_tensor_s_gradients_add_up(wide):
    sources, found = wide
    genome = genome_of(sources, "tensors")
    once, twice = collected(sources, genome, found.items()), collected(sources, genome, 2 * list(found.items()))
    assert np.array_equal(twice, 2 * once)
    assert not collected(sources, genome, [("b", found["b"])])[[0, 2]].any()
    flat_and_sparse = [("a", found["a"].flatten()), ("b", found["b"].to_sparse()), ("c", found["c"])]
    assert np.array_equal(collected(sources, genome, flat_and_sparse), once)


def test_gradients_of_no_tensor_are_refused(wide):
    sources, found = wide
    slopes = Slopes(sources, genome_of(sources, "tensors"))
    with pytest.raises(InputError, match="expected a tensor of the layout, found 'd'"):
        slopes.add("d", found["a"])
    with pytest.raises(InputError, match="gradient: a: expected 120000 elements, found 34"):
        slopes.add("a", found["b"])
    with pytest.raises(InputError, match="genome: expected 190035 parameters, found 5"):
        Slopes(sources, Genome.uniform(5, [1.0, 0.0, 0.0]))


# -- what a gradient leaves behind: nothing ------------------------------------------------------------------


def untouched(made):
    return all(
        not p.requires_grad and p.grad is None and not p._post_accumulate_grad_hooks for p in made.model.parameters()
    )


@pytest.mark.parametrize("stack_bytes", STACKS)
def test_one_gradient_lives_at_a_time(folder, monkeypatch, stack_bytes):
    sources = opened(written(folder, "net", 3))
    made = Resident(sources, architecture("net"), CPU, torch.float64, stack_bytes)
    seen, add = [], Slopes.add

    def watched(self, name, gradient):
        alive = [reference for reference in seen if reference() is not None]
        assert not alive
        seen.append(weakref.ref(gradient))
        assert sum(parameter.grad is not None for parameter in made.model.parameters()) == 1
        add(self, name, gradient)

    monkeypatch.setattr(Slopes, "add", watched)
    gradient(made, genome_of(sources, "tensors"), entropy)
    assert len(seen) == 4
    assert not any(reference() is not None for reference in seen)
    assert untouched(made)


def test_after_an_error_the_model_is_as_it_was(folder, monkeypatch):
    sources = opened(written(folder, "net", 3))
    made = Resident(sources, architecture("net"), CPU, torch.float64)
    genome = genome_of(sources, "tensors")
    expected = gradient(made, genome, entropy)

    def fails(model):
        entropy(model)
        raise ValueError("no")

    def full(self, name, gradient):
        raise MemoryError("full")

    with pytest.raises(ValueError, match="no"):
        gradient(made, genome, fails)
    assert untouched(made)
    with monkeypatch.context() as patch:
        patch.setattr(Slopes, "add", full)
        with pytest.raises(MemoryError, match="full"):
            gradient(made, genome, entropy)
    assert untouched(made)
    value, slopes = gradient(made, genome, entropy)
    assert value == expected[0]
    assert np.array_equal(slopes, expected[1])


@pytest.mark.parametrize("stack_bytes", STACKS)
def test_a_genome_is_merged_once_for_gradients_in_a_row(folder, monkeypatch, stack_bytes):
    sources = opened(written(folder, "net", 3))
    made = Resident(sources, architecture("net"), CPU, torch.float64, stack_bytes)
    one, two = genome_of(sources, "tensors", 1), genome_of(sources, "tensors", 2)
    merges, materialise = [], resident.Resident.show

    def counted(self, genomes):
        merges.append(len(genomes))
        return materialise(self, genomes)

    monkeypatch.setattr(resident.Resident, "show", counted)
    first = gradient(made, one, entropy)
    assert gradient(made, one, entropy)[0] == first[0]
    assert len(merges) == 1
    assert gradient(made, two, entropy)[0] != first[0]
    assert gradient(made, one, entropy)[0] == first[0]
    assert len(merges) == 3
    for model in made.show([one]):
        for parameter in model.parameters():
            parameter.data.zero_()  # as an objective might
    assert gradient(made, one, entropy)[0] == first[0]
    assert len(merges) == 5


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda model: 3.0, "expected one number in a tensor, found float"),
        (lambda model: model(torch.ones(2, 4).double()), r"found a tensor of shape \(2, 3\)"),
        (lambda model: torch.ones(()), "depends on the model's parameters, found a constant"),
    ],
)
def test_losses_that_cannot_be_differentiated(folder, loss, words):
    sources = opened(written(folder, "net", 2))
    made = Resident(sources, architecture("net"), CPU, torch.float64)
    with pytest.raises(InputError, match=words):
        gradient(made, genome_of(sources, "tensors"), loss)
    assert untouched(made)


def test_tensors_without_an_architecture_have_no_gradient(folder):
    sources = opened(written(folder, "net", 2))
    with pytest.raises(InputError, match=r"expected a torch module, found a dict of tensors\. Name an architecture"):
        gradient(Resident(sources, None, CPU), genome_of(sources, "tensors"), entropy)


# -- several losses ------------------------------------------------------------------------------------------


def first_layer(model):
    """A loss that the second layer has no part in."""
    return next(iter(model.children()))(torch.ones(2, 4).double()).square().mean()


@pytest.mark.parametrize("stack_bytes", STACKS)
@pytest.mark.parametrize("losses", [(entropy, first_layer), (first_layer, entropy), (entropy, entropy, first_layer)])
def test_losses_together_have_the_gradient_of_their_weighted_sum(folder, losses, stack_bytes):
    sources = opened(written(folder, "net", 3))
    made = Resident(sources, architecture("net"), CPU, torch.float64, stack_bytes)
    genome, weights = genome_of(sources, "inside"), (0.5, 3.0, -1.0)[: len(losses)]
    values, slopes = made.gradient(genome, lambda model: (loss(model) for loss in losses), weights)
    apart = [gradient(made, genome, loss) for loss in losses]
    assert values == [value for value, _ in apart]
    expected = sum(weight * slope for weight, (_, slope) in zip(weights, apart, strict=True))
    np.testing.assert_allclose(slopes, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())
    assert untouched(made)


def test_inner_products_are_taken_once_whatever_the_number_of_losses(folder, monkeypatch):
    sources, seen, add = opened(written(folder, "net", 3)), [], Slopes.add

    def counted(self, name, gradient):
        seen.append(name)
        add(self, name, gradient)

    monkeypatch.setattr(Slopes, "add", counted)
    made = Resident(sources, architecture("net"), CPU, torch.float64)
    made.gradient(genome_of(sources, "tensors"), lambda model: (entropy(model) for _ in range(3)), (1.0,) * 3)
    assert sorted(seen) == sorted(sources.layout.tensors)


def test_as_many_losses_as_weights(folder):
    sources = opened(written(folder, "net", 2))
    made = Resident(sources, architecture("net"), CPU, torch.float64)
    for count in (1, 3):
        with pytest.raises(ValueError, match="zip"):
            made.gradient(genome_of(sources, "tensors"), lambda model: (entropy(model) for _ in range(count)), (1, 1))  # noqa: B023
        assert untouched(made)


# -- Hugging Face models -------------------------------------------------------------------------------------


def word_entropy(model):
    tokens = torch.arange(20).view(2, 10) % 31
    logits = torch.log_softmax(model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits, -1)
    return -(logits.exp() * logits).sum(-1).mean()


@pytest.mark.parametrize("stack_bytes", STACKS)
def test_hugging_face_models_are_like_any_other(hugging_face, stack_bytes):
    sources = opened(hugging_face)
    made = Resident(sources, "auto", CPU, torch.float64, stack_bytes)
    agree(sources, genome_of(sources, "blocks"), made, word_entropy, rtol=1e-9)
    assert untouched(made)


def test_checkpointing_changes_no_gradient_and_is_off_afterwards(hugging_face):
    sources = opened(hugging_face)
    genome = genome_of(sources, "tensors")
    kept = Resident(sources, "auto", CPU, torch.float64)
    again = Resident(sources, "auto", CPU, torch.float64, checkpointing=True)
    calls = []
    chosen = checkpointing.layers(again.model)
    for layer in chosen:
        layer.register_forward_hook(lambda layer, inputs, output: calls.append(layer))
        attention = next(layer.children())
        attention.register_forward_hook(lambda layer, inputs, output: calls.append(layer))
    caching = again.model.config.use_cache if hasattr(again.model.config, "use_cache") else None
    value, slopes = gradient(again, genome, word_entropy)
    expected = gradient(kept, genome, word_entropy)
    assert value == expected[0]
    np.testing.assert_array_equal(slopes, expected[1])
    assert len(calls) == 3 * len(chosen)  # what is in a layer once more on the way back
    assert not any("forward" in vars(layer) for layer in chosen)
    assert not any(module.training for module in again.model.modules())
    assert getattr(again.model.config, "use_cache", None) == caching
    assert untouched(again)
    calls.clear()
    word_entropy(again.model)
    assert len(calls) == 2 * len(chosen)


def test_checkpointing_keeps_fewer_activations(hugging_face):
    sources = opened(hugging_face)
    genome = genome_of(sources, "tensors")
    kept = []
    for again in (False, True):
        made = Resident(sources, "auto", CPU, torch.float64, checkpointing=again)
        sizes = []

        def packed(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        def loss(model, packed=packed):
            with torch.autograd.graph.saved_tensors_hooks(packed, lambda tensor: tensor):
                return word_entropy(model)

        gradient(made, genome, loss)
        kept.append(sum(sizes))
    assert kept[1] < 0.6 * kept[0]


def test_checkpointing_is_for_models_that_have_it(folder):
    sources = opened(written(folder, "net", 2))
    with pytest.raises(InputError, match=r"checkpointing: expected a Hugging Face model.*found Sequential"):
        Resident(sources, architecture("net"), CPU, checkpointing=True)
    with pytest.raises(InputError, match="found a dict of tensors"):
        Resident(sources, None, CPU, checkpointing=True)


# -- the worker ----------------------------------------------------------------------------------------------


def spec_of(folder, dtype=torch.float64, **fields):
    paths = [str(path) for path in written(folder, "net", 3, dtype)]
    accuracy = objective("acc", data=call("gradients_tested:data"))
    tasks = tuple(
        calibration(name, call("gradients_tested:data", {"scale": scale}), batch=6, **more)
        for name, scale, more in (("sure", 1.0, {}), ("told", 2.0, {"loss": "cross_entropy"}))
    )
    options = {"search": (accuracy,), "calibration": tasks, "architecture": architecture("net"), **fields}
    return WorkerSpec(tuple(paths[1:]), paths[0], "task_arithmetic", device="cpu", **options)


def trial(number, genome, task=None, step=0):
    return Trial(number, genome, wants=Scores() if task is None else Gradient.of(task, step))


def same(one, two):
    assert one.failure == two.failure
    assert one.scores == two.scores
    assert one.details == two.details or one.gradient is None  # else seconds
    assert one.items == two.items
    assert (one.gradient is None) == (two.gradient is None)
    assert one.gradient is None or np.array_equal(one.gradient, two.gradient)


@pytest.fixture
def mixed(folder):
    """A spec and trials of both kinds."""
    spec = spec_of(folder)
    sources = Sources.open(spec.experts, spec.base, spec.operator)
    genomes = [genome_of(sources, "tensors", seed) for seed in range(3)]
    kinds = [(0, None), (0, "sure"), (0, "told"), (1, None), (2, None), (2, "sure"), (1, "sure"), (1, None)]
    return spec, [trial(n, genomes[g], task, step=n) for n, (g, task) in enumerate(kinds)]


def test_a_gradient_trial_has_a_loss_and_a_gradient_and_no_scores(mixed):
    spec, trials = mixed
    worker = Worker(spec)
    for one, evaluation in zip(trials, worker.measure(trials), strict=True):
        assert evaluation.ok
        assert evaluation.seconds > 0
        if one.gradient is None:
            assert set(evaluation.scores) == {"acc"}
            assert evaluation.gradient is None
            assert 0 < evaluation.details["merge_seconds"] <= evaluation.seconds
            continue
        assert set(evaluation.scores) == {one.gradient.task}
        assert evaluation.items == 6
        assert 0 < evaluation.details[Evaluation.detail_of(one.gradient.task, "diversity")] <= 1
        assert evaluation.gradient.shape == one.genome.coefficients.shape


@pytest.mark.parametrize("task", ["sure", "told"])
def test_the_gradient_is_that_of_the_loss(folder, task):
    worker = Worker(spec_of(folder))
    genome = genome_of(worker._sources, "tensors")
    [evaluation] = worker.measure([trial(0, genome, task, 5)])
    step = 1e-5 * np.random.default_rng(1).normal(size=genome.coefficients.shape)
    moved = [Genome(genome.boundaries, genome.coefficients + sign * step) for sign in (1, -1)]
    up, down = (e.scores[task] for e in worker.measure([trial(n, g, task, 5) for n, g in enumerate(moved)]))
    assert (up - down) / 2 == pytest.approx(float((evaluation.gradient * step).sum()), rel=1e-6)


def test_tasks_together_are_the_weighted_sum_of_each_alone(folder):
    worker = Worker(spec_of(folder))
    genome = genome_of(worker._sources, "tensors")
    both = Trial(0, genome, wants=Gradient(("sure", "told"), 5, (2.0, 0.5)))
    one, two, joint = worker.measure([trial(1, genome, "sure", 5), trial(2, genome, "told", 5), both])
    assert joint.scores == {**one.scores, **two.scores}
    assert joint.details == {**one.details, **two.details}
    assert joint.items == one.items + two.items
    np.testing.assert_allclose(joint.gradient, 2 * one.gradient + 0.5 * two.gradient, rtol=1e-5)


def test_a_task_that_fails_among_others_is_named(folder):
    worker = Worker(spec_of(folder))
    genome = genome_of(worker._sources, "tensors")
    wrong = Trial(0, genome, wants=Gradient(("sure", "sore"), 0, (1.0, 1.0)))
    [found] = worker.measure([wrong])
    assert found.failure.message.startswith("calibration 'sore': expected a calibration task of that name")


def test_mixed_batches_measure_as_each_alone(mixed):
    spec, trials = mixed
    worker = Worker(spec)
    together = worker.measure(trials)
    for one, expected in zip(reversed(trials), reversed(together), strict=True):
        same(worker.measure([one])[0], expected)
        same(Worker(spec).measure([one])[0], expected)


def test_mixed_batches_through_the_serial_pool(mixed):
    spec, trials = mixed
    expected = Worker(spec).measure(trials)
    with SerialPool(spec) as pool:
        pool.start()
        pool.submit(Batch(0, tuple(trials[:5])))
        pool.submit(Batch(1, tuple(trials[5:])))
        found = []
        while done := pool.completed():
            found += [evaluation for _, evaluations in done for evaluation in evaluations]
    for one, two in zip(found, expected, strict=True):
        same(one, two)


def test_gradient_trials_fail_alone_and_say_why(folder):
    worker = Worker(spec_of(folder))
    fine = genome_of(worker._sources, "tensors")
    broken = np.zeros(fine.size, np.float32)
    broken[20] = np.nan
    found = worker.measure(
        [
            trial(0, fine, "sore"),
            trial(1, Genome.uniform(7, [0.1, 0.1]), "sure"),
            trial(2, Genome.dense(broken, 2), "sure"),
            trial(3, fine, "sure"),
        ]
    )
    assert [one.failure.kind for one in found[:3]] == ["exception", "exception", "not finite"]
    assert "found 'sore'. Did you mean 'sure'?" in found[0].failure.message
    assert "genome: expected 51 parameters, found 7" in found[1].failure.message
    assert found[2].failure.message.startswith("calibration 'sure': expected a finite loss, found nan; the merged")
    assert not any(one.scores or one.gradient is not None for one in found[:3])
    assert found[3].ok


def test_an_infinite_gradient_of_a_finite_loss_fails(folder, monkeypatch):
    worker = Worker(spec_of(folder))
    genome = genome_of(worker._sources, "tensors")
    monkeypatch.setattr(Slopes, "values", np.full((4, 2), np.inf))
    [found] = worker.measure([trial(0, genome, "sure")])
    assert found.failure.kind == "not finite"
    assert "expected a finite gradient" in found.failure.message


def test_calibration_without_an_architecture_is_refused(folder):
    with pytest.raises(InputError, match=r"calibration: expected a torch module to differentiate\. Name an archi"):
        Worker(spec_of(folder, architecture=None, search=()))


def test_a_worker_without_tasks_says_so(folder):
    worker = Worker(spec_of(folder, calibration=()))
    [found] = worker.measure([trial(0, genome_of(worker._sources, "tensors"), "sure")])
    assert "The worker has no calibration tasks" in found.failure.message


def test_objectives_that_spoil_weights_harm_no_gradient(folder):
    spoils = objective("s", "call", call="gradients_tested:spoils")
    worker = Worker(spec_of(folder, search=(spoils,)))
    genome = genome_of(worker._sources, "tensors")
    first, _, last = worker.measure([trial(0, genome, "sure"), trial(1, genome), trial(2, genome, "sure")])
    same(first, last)


def test_checkpointing_is_the_spec_s(folder):
    with pytest.raises(InputError, match="checkpointing: expected a Hugging Face model"):
        Worker(spec_of(folder, backend=resident.ResidentSettings(checkpointing=True)))


# -- on a GPU ------------------------------------------------------------------------------------------------


def worker_of(folder, name, head=None):
    """A worker with the objectives ``acc`` and ``odd``, and the calibration task ``t``."""
    paths = tuple(map(str, written(folder, name, 3)))
    acc = objective("acc", data=architecture("data"))
    odd = objective("odd", "call", call="gradients_tested:forgets")
    task = calibration("t", architecture("data"), head=head, batch=8)
    return Worker(
        WorkerSpec(
            *(paths[1:], paths[0], "task_arithmetic"),
            architecture=architecture(name),
            search=(acc, odd),
            calibration=(task,),
            device="cpu",
        )
    )


@pytest.mark.parametrize("name", ["net", "caching", "drawing"])
def test_a_gradient_does_not_depend_on_what_was_scored_before(folder, name):
    """Not on a constant that the model keeps of its first pass, on draws, nor on the mode an objective left it in."""
    found = []
    for before in (0, 1, 3):
        worker = worker_of(folder, name)
        genome = Genome.uniform(worker._sources.layout.size, [0.3, 0.3])
        gradient = Trial(before, genome, wants=Gradient.of("t", 0))
        *_, evaluation = worker.measure([*(Trial(number, genome) for number in range(before)), gradient])
        assert evaluation.ok, evaluation.failure
        found.append((evaluation.scores["t"], evaluation.gradient.tobytes()))
    assert len(set(found)) == 1


def test_a_head_that_does_not_fit_is_refused_before_the_first_batch(folder):
    with pytest.raises(
        InputError, match="calibration 't': the model and the task's head cannot be run on an example"
    ) as it:
        worker_of(folder, "net", architecture("wide"))
    assert "shapes cannot be multiplied" in it.value.message
    assert "the head's width" in it.value.remedy


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("placement", ["device", "host", "mapped"])
def test_cuda_gives_the_slopes_of_the_cpu(wide, placement):
    sources, found = wide
    sources = Sources(sources.layout, sources.operator, sources.experts, sources.base, placement)
    for cuts in ("uniform", "inside"):
        genome = genome_of(sources, cuts)
        here = collected(sources, genome, found.items())
        there = collected(sources, genome, [(name, value.cuda()) for name, value in found.items()])
        np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-5 * np.abs(here).max())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("again", [False, True])
def test_hugging_face_models_on_cuda(hugging_face, again):
    sources = opened(hugging_face)
    genome = genome_of(sources, "tensors")

    def there(model):
        return word_entropy(lambda **inputs: model(**{name: value.cuda() for name, value in inputs.items()}))

    value, slopes = Resident(sources, "auto", CPU, torch.float64).gradient(genome, word_entropy)
    cuda = Resident(sources, "auto", torch.device("cuda"), torch.float64, checkpointing=again)
    found, slopes_there = cuda.gradient(genome, there)
    assert found == pytest.approx(value, rel=1e-9)
    np.testing.assert_allclose(slopes_there, slopes, rtol=1e-8, atol=1e-9 * np.abs(slopes).max())
    assert untouched(cuda)
