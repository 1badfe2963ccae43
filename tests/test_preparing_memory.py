"""What preparing holds in memory: one block's statistics and one model, and pieces of what is large."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ecotone.fitness.gradients.calibration import EntropyLossSettings
from ecotone.fitness.preparing import known, likeness, prepare
from ecotone.fitness.preparing.prepare import basis_of
from ecotone.fitness.specs import WorkerSpec
from ecotone.fitness.statistics import moments
from ecotone.fitness.statistics.moments import SlopeSettings
from ecotone.merging import operators
from ecotone.merging.basis import Bases
from ecotone.merging.operators.whole import Layer, Report, WholeMatrices
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError
from ecotone.settings import Call

NAMES = ("one", "two")
WIDTH = 32


class Live(TorchDispatchMode):
    """Counts the bytes that tensors hold: of storages that operations have made, so no mapped files."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._total = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, Tensor) and (storage := one.untyped_storage())._cdata not in given:
                self._total -= self._alive.get(storage._cdata, (None, 0))[1]
                self._total += storage.nbytes()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if self._total > self.peak:  # unless some are gone
            self._alive = {key: each for key, each in self._alive.items() if not each[0].expired()}
            self._total = sum(size for _, size in self._alive.values())
            self.peak = max(self.peak, self._total)
        return made


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden):
        return hidden + self.second(torch.tanh(self.first(hidden)))


class Net(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(count)])

    def forward(self, inputs):
        for block in self.blocks:
            inputs = block(inputs)
        return inputs


def net(count):
    return Net(count).double()


def inputs(seed):
    return torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(seed)).double()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))


def made(folder, states, **more):
    folder.mkdir(exist_ok=True)
    for name, state in zip(("base", *NAMES), states, strict=True):
        save_file(state, folder / f"{name}.safetensors")
    experts = tuple(str(folder / f"{name}.safetensors") for name in NAMES)
    return WorkerSpec(experts, str(folder / "base.safetensors"), **more)


def spec_of(folder, count):
    torch.manual_seed(0)
    base = net(count).state_dict()
    states = [{key: value + 0.01 * k * torch.randn_like(value) for key, value in base.items()} for k in range(3)]
    tasks = [
        EntropyLossSettings(name=name, data=Call(call=f"{__file__}:inputs", arguments={"seed": seed}))
        for seed, name in enumerate(NAMES)
    ]
    architecture = Call(call=f"{__file__}:net", arguments={"count": count})
    return made(folder, states, architecture=architecture, calibration=tuple(tasks))


def peak_of(spec):
    with Live() as live:
        basis_of(spec)
    return live.peak


@pytest.mark.parametrize("operator", ["kfac", "regmean", "regmean_pp", "fisher"])
def test_with_each_block_more_only_the_module_is_larger(tmp_path, monkeypatch, operator):
    monkeypatch.setattr(known, "GROUP_BYTES", 1)  # a group is a block, or a layer
    settings = {"batch": 6, **({"steps": 2} if operator == "kfac" else {})}
    peaks = []
    for count in (2, 5):
        spec = spec_of(tmp_path / str(count), count)
        peaks.append(peak_of(replace(spec, operator=operator, settings=settings)))
    block = 2 * 8 * WIDTH * (WIDTH + 1)
    assert peaks[1] - peaks[0] <= 3 * 1.3 * block


def test_statistics_are_those_of_one_layer_and_no_others(tmp_path, monkeypatch):
    """Fisher needs no second moments of inputs, and a layer's statistics are gone before the next ones are made."""
    spec = replace(spec_of(tmp_path / "models", 4), operator="fisher", settings={"batch": 6})
    made, alive = [], []
    means = moments.Moments.means

    def watched(self):
        found = means(self)
        if found:
            alive.append(sum(not one.expired() for one in made))
        made.extend(StorageWeakRef(one.untyped_storage()) for one in found.values())
        return found

    monkeypatch.setattr(moments.Moments, "means", watched)
    monkeypatch.setattr(known, "GROUP_BYTES", 1)
    monkeypatch.setattr(moments, "squares", None)
    basis_of(spec)
    assert len(made) == len(NAMES) * 4 * 2
    assert max(alive) == len(NAMES) - 1  # those of the experts before, of the same layer


# -- what is large is worked on in pieces ------------------------------------------------------------------------


def tables(folder):
    generator = torch.Generator().manual_seed(0)
    states = []
    for _ in range(3):
        table, matrix = (torch.randn(rows, 20, generator=generator) for rows in (3000, 30))
        states.append({"embed.weight": table, "layer.weight": matrix, "scale": torch.tensor(1.5)})
    return made(folder, states, operator="iso_c")


def test_a_table_is_prepared_in_pieces(tmp_path, monkeypatch):
    spec = tables(tmp_path / "models")
    whole = basis_of(spec)
    Bases().remove(whole.key)
    for module in (prepare, likeness):
        monkeypatch.setattr(module, "PIECE", 999)
    with Live() as live:
        pieces = basis_of(spec)
    assert pieces.record["files"] == whole.record["files"]
    torch.testing.assert_close(torch.tensor(pieces.record["cosines"]), torch.tensor(whole.record["cosines"]))
    assert live.peak < 3000 * 20 * 8


def test_pieces_come_one_after_the_other(tmp_path):
    spec = tables(tmp_path / "models")
    layout = Sources.open([spec.base]).layout
    parts = [torch.zeros(40)] * 2
    with Bases().writer("key", layout, NAMES) as writer:
        writer.put("embed.weight", parts)
        writer.put("embed.weight", parts, 40)
        with pytest.raises(InputError, match="elements from 80, found 40"):
            writer.put("embed.weight", parts, 40)
        with pytest.raises(InputError, match="expected 1 prepared elements, found 40"):
            writer.put("scale", parts)
        with pytest.raises(InputError, match=r"found none of embed\.weight, layer\.weight, scale"):
            writer.finish({})


PREPARING = [name for name in operators.OPERATORS.usable() if isinstance(operators.get(name), WholeMatrices)]


@pytest.mark.parametrize("name", PREPARING)
def test_what_is_no_matrix_is_made_element_by_element_where_the_operator_says_so(name):
    operator = operators.get(name)
    base, *experts = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    at = Layer("scale", "rest", (4, 5))
    whole = torch.stack(list(operator.rest(at, base, experts, Report()))).flatten(1)
    flat = [one.flatten().split(7) for one in (base, *experts)]
    pieces = [
        torch.stack(list(operator.rest(at, first, others, Report()))) for first, *others in zip(*flat, strict=True)
    ]
    assert torch.equal(torch.cat(pieces, 1), whole) is operator.rest_by_element


# -- logits ------------------------------------------------------------------------------------------------------


def by_autograd(logits, mask, passes):
    """Slopes of the sums over the classes of each pass of s sqrt(p) log p, p taken as given."""
    leaf = logits.clone().requires_grad_()
    likelihoods = leaf.log_softmax(-1) * mask.unsqueeze(-1)
    shares = logits.softmax(-1)
    signs = torch.randint(2, logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.int8) * 2 - 1
    turns = torch.arange(logits.shape[-1]) % passes
    dealt = turns.expand(logits.shape).clone()
    dealt.scatter_(-1, shares.topk(passes).indices, turns[:passes].expand(*logits.shape[:-1], passes))
    for turn in range(passes):
        loss = (shares.sqrt() * likelihoods * (signs * (dealt == turn))).sum()
        yield torch.autograd.grad(loss, leaf, retain_graph=True)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece", [1, 40, 10**6])
def test_slopes_at_logits_are_those_of_autograd(monkeypatch, dtype, piece):
    monkeypatch.setattr(moments, "PIECE", piece)
    logits = torch.randn(5, 4, 13, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = torch.arange(4)[None] < torch.tensor([4, 1, 3, 2, 4])[:, None]
    settings = SlopeSettings(passes=3)
    found = list(moments._slopes_of_logits(logits, mask, settings, torch.Generator().manual_seed(3)))
    for one, expected in zip(found, by_autograd(logits, mask, 3), strict=True):
        assert torch.equal(one, expected)


def test_slopes_at_logits_take_less_than_two_more_of_them(monkeypatch):
    monkeypatch.setattr(moments, "PIECE", 1000)
    logits = torch.randn(20, 10, 100)
    with Live() as live:
        for slopes in moments._slopes_of_logits(logits, None, SlopeSettings(passes=4), torch.Generator()):
            del slopes
    assert live.peak < 1.6 * logits.nbytes
