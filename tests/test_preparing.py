"""Preparing bases: statistics by expert and in the order of depth, what is written, and what is refused."""

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ecotone.fitness.gradients.calibration import EntropyLossSettings
from ecotone.fitness.preparing.layers import units
from ecotone.fitness.preparing.prepare import basis_of
from ecotone.fitness.specs import WorkerSpec
from ecotone.fitness.worker import Worker
from ecotone.merging.basis import Bases
from ecotone.merging.models.matching import Treatment
from ecotone.merging.models.names import names_of
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome
from ecotone.settings import Call

NAMES = ("one", "two")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.second = nn.Linear(5, 4)

    def forward(self, hidden):
        return hidden + self.second(torch.tanh(self.norm(self.first(hidden))))


class Net(nn.Module):
    """Two blocks and a layer after them that the data never reach."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.out = nn.Linear(4, 3)
        self.unused = nn.Linear(3, 2)

    def forward(self, inputs):
        for block in self.blocks:
            inputs = block(inputs)
        return self.out(inputs)


def net(seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    model = Net().double()
    return model if seed is None else model.eval().requires_grad_(False)


def inputs(name, count=40):
    generator = torch.Generator().manual_seed(NAMES.index(name))
    scales = torch.tensor([1.0, 2.0, 0.5, 1.0] if name == "one" else [0.5, 0.5, 2.0, 1.0])
    return (torch.randn(count, 4, generator=generator) * scales).double()


@pytest.fixture
def spec(tmp_path, monkeypatch):
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))
    base = net(0)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    for number, name in enumerate(NAMES, 1):
        other = net(number).state_dict()
        state = {key: value + 0.3 * (other[key] - value) for key, value in base.state_dict().items()}
        save_file(state, tmp_path / f"{name}.safetensors")
    tasks = [
        EntropyLossSettings(name=name, data=Call(call=f"{__file__}:inputs", arguments={"name": name}), batch=8)
        for name in NAMES
    ]
    return WorkerSpec(
        tuple(str(tmp_path / f"{name}.safetensors") for name in NAMES),
        str(tmp_path / "base.safetensors"),
        "regmean_pp",
        architecture=Call(call=f"{__file__}:net"),
        calibration=tuple(tasks),
    )


def states(spec):
    models = {}
    for name, path in zip(("base", *NAMES), (spec.base, *spec.experts), strict=True):
        model = net(0)
        sources = Sources.open([path])
        model.load_state_dict({key: sources.experts[0].tensor(key) for key in sources.layout.tensors})
        models[name] = model
    return models


def merged(spec, basis):
    """The merge at c = 1."""
    vectors = basis.models()
    base = states(spec)["base"].state_dict()
    return {key: value + sum(one.tensor(key) for one in vectors) for key, value in base.items()}


def seen(model, layer, rows):
    """(rows, in + 1) of what reaches a layer."""
    found = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, given: found.append(given[0]))
    model(rows)
    handle.remove()
    return torch.cat([found[0], torch.ones(len(rows), 1).double()], 1)


def folded(model, layer):
    module = model.get_submodule(layer)
    return torch.cat([module.weight, module.bias.unsqueeze(1)], 1)


def least_squares(grams, matrices):
    total = sum(grams)
    eps = 1e-6 * float(total.diagonal().mean())
    each = [gram + eps / len(grams) * torch.eye(len(gram)).double() for gram in grams]
    return sum(w @ g for w, g in zip(matrices, each, strict=True)) @ torch.linalg.inv(sum(each))


def gram_of(rows):
    return rows.mT @ rows / len(rows)


# -- statistics --------------------------------------------------------------------------------------------------


def test_regmean_reads_each_experts_own_activations(spec):
    found = merged(spec, basis_of(replace(spec, operator="regmean", settings={"targets": "weights"})))
    models = states(spec)
    for layer in ("blocks.0.first", "blocks.0.second", "blocks.1.first", "blocks.1.second", "out"):
        grams = [gram_of(seen(models[name], layer, inputs(name))) for name in NAMES]
        expected = least_squares(grams, [folded(models[name], layer) for name in NAMES])
        torch.testing.assert_close(found[f"{layer}.weight"], expected[:, :-1], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(found[f"{layer}.bias"], expected[:, -1], rtol=1e-8, atol=1e-10)
    for other in ("blocks.0.norm.weight", "blocks.1.norm.bias", "unused.weight", "unused.bias"):
        mean = sum(models[name].state_dict()[other] for name in NAMES) / 2
        torch.testing.assert_close(found[other], mean)


def test_regmean_pp_reads_what_the_merge_of_the_blocks_before_makes(spec):
    found = merged(spec, basis_of(spec))
    models = states(spec)
    for block in ("blocks.0", "blocks.1", "out"):
        layers = [block] if block == "out" else [f"{block}.first", f"{block}.second"]
        for layer in layers:
            grams = []
            for name in NAMES:
                hybrid = states(spec)[name]  # the expert's own block, behind what is merged
                before = {key: value for key, value in found.items() if key < block and key.startswith("blocks")}
                hybrid.load_state_dict(hybrid.state_dict() | before)
                grams.append(gram_of(seen(hybrid, layer, inputs(name))))
            expected = least_squares(grams, [folded(models[name], layer) for name in NAMES])
            torch.testing.assert_close(found[f"{layer}.weight"], expected[:, :-1], rtol=1e-7, atol=1e-9)


def test_own_targets_are_what_the_expert_makes_of_its_own_activations(spec):
    found = merged(spec, basis_of(replace(spec, operator="regmean", settings={"ridge": 1e-9})))
    models = states(spec)
    rows, answers = [], []
    for name in NAMES:
        hybrid = states(spec)[name]
        hybrid.load_state_dict(hybrid.state_dict() | {k: v for k, v in found.items() if k.startswith("blocks")})
        rows.append(seen(hybrid, "out", inputs(name)))
        answers.append(models[name](inputs(name)))
    expected = torch.linalg.lstsq(torch.cat(rows), torch.cat(answers)).solution.mT
    torch.testing.assert_close(found["out.weight"], expected[:, :-1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("alone", [True, False])
def test_what_is_frozen_is_the_bases_in_the_merge(spec, monkeypatch, alone):
    if not alone:
        monkeypatch.setattr("ecotone.fitness.preparing.depth.before_blocks", lambda *_: None)
    frozen = Treatment(freeze=("blocks.0.*",))
    basis = basis_of(replace(spec, treatment=frozen, settings={"ridge": 1e-6}))
    models = states(spec)
    before = {key: value for key, value in models["base"].state_dict().items() if key.startswith("blocks.0")}
    grams = []
    for name in NAMES:
        hybrid = states(spec)[name]
        hybrid.load_state_dict(hybrid.state_dict() | before)
        grams.append(gram_of(seen(hybrid, "blocks.1.first", inputs(name))))
    expected = least_squares(grams, [folded(models[name], "blocks.1.first") for name in NAMES])
    base = models["base"].state_dict()["blocks.1.first.weight"]
    found = base + sum(one.tensor("blocks.1.first.weight") for one in basis.models())
    torch.testing.assert_close(found, expected[:, :-1], rtol=1e-7, atol=1e-9)


def test_the_first_block_is_the_same_in_any_order(spec):
    at_once = merged(spec, basis_of(replace(spec, operator="regmean", settings={"targets": "weights"})))
    in_depth = merged(spec, basis_of(spec))
    assert torch.equal(at_once["blocks.0.first.weight"], in_depth["blocks.0.first.weight"])
    assert not torch.allclose(at_once["blocks.1.first.weight"], in_depth["blocks.1.first.weight"])


@pytest.mark.parametrize(
    ("operator", "settings"), [("regmean_pp", {}), ("regmean", {}), ("kfac", {"examples": 24, "ridge": 0.1})]
)
def test_block_by_block_is_the_same_as_by_whole_passes(spec, monkeypatch, operator, settings):
    chosen = replace(spec, operator=operator, settings=settings)
    by_blocks = basis_of(chosen)
    Bases().remove(by_blocks.key)
    monkeypatch.setattr("ecotone.fitness.preparing.depth.before_blocks", lambda *_: None)
    assert basis_of(chosen).record["files"] == by_blocks.record["files"]


def test_the_number_of_passes_does_not_grow_with_depth(spec, monkeypatch):
    """For each expert a block runs once to find the order, once before the first block, twice by itself, and once for
    the layer after the blocks; and on two examples three times, to see that blocks make the same alone, and that
    nothing skips them.
    """
    ran = []
    forward = nn.LayerNorm.forward
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, hidden: ran.append(1) or forward(self, hidden))
    basis_of(replace(spec, settings={"batch": 64}))
    blocks, experts = 2, 2
    assert len(ran) == experts * blocks * 8


@pytest.mark.parametrize(
    ("operator", "settings"), [("fisher", {}), ("kfac", {}), ("kfac", {"sequential": False}), ("regmean", {})]
)
def test_statistics_are_gathered_for_some_layers_at_a_time(spec, monkeypatch, operator, settings):
    chosen = replace(spec, operator=operator, settings=settings)
    at_once = basis_of(chosen)
    Bases().remove(at_once.key)
    monkeypatch.setattr("ecotone.fitness.preparing.known.GROUP_BYTES", 1)
    assert basis_of(chosen).record["files"] == at_once.record["files"]


class Skipping(Net):
    """The second block gets what the first one made, beside the hidden states."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(), Beside()])

    def forward(self, inputs):
        early = self.blocks[0](inputs)
        return self.out(self.blocks[2](self.blocks[1](early), early))


class Beside(Block):
    def forward(self, hidden, early):
        return super().forward(hidden) + early


class Writing(Net):
    """Something writes into the hidden states between the blocks."""

    def forward(self, inputs):
        return self.out(self.blocks[1](self.blocks[0](inputs).mul_(2)))


def skipping():
    return Skipping().double()


def writing():
    return Writing().double()


@pytest.mark.parametrize("kind", [Skipping, Writing])
def test_blocks_that_are_more_than_a_chain_are_not_run_alone(spec, tmp_path, monkeypatch, kind):
    for number, name in enumerate(("base", *NAMES)):
        torch.manual_seed(number)
        save_file(kind().double().state_dict(), tmp_path / f"{name}.safetensors")
    chosen = replace(spec, architecture=Call(call=f"{__file__}:{kind.__name__.lower()}"))
    found = basis_of(chosen)
    Bases().remove(found.key)
    monkeypatch.setattr("ecotone.fitness.preparing.depth.before_blocks", lambda *_: None)
    assert basis_of(chosen).record["files"] == found.record["files"]


def test_only_so_many_examples_are_read(spec):
    some = replace(spec, operator="regmean", settings={"targets": "weights", "examples": 10})
    found, models = merged(spec, basis_of(some)), states(spec)
    grams = [gram_of(seen(models[name], "blocks.0.first", inputs(name)[:10])) for name in NAMES]
    total = sum(grams)
    eps = 1e-3 * float(total.diagonal().mean())  # fewer than four rows a channel
    each = [gram + eps / 2 * torch.eye(5).double() for gram in grams]
    matrices = [folded(models[name], "blocks.0.first") for name in NAMES]
    expected = sum(w @ g for w, g in zip(matrices, each, strict=True)) @ torch.linalg.inv(sum(each))
    torch.testing.assert_close(found["blocks.0.first.weight"], expected[:, :-1], rtol=1e-8, atol=1e-10)


def images(name):
    return torch.randn(30, 2, 5, 5, generator=torch.Generator().manual_seed(NAMES.index(name))).double()


def pictures():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3)).double()


def test_a_convolution_is_the_least_squares_over_its_patches(tmp_path, monkeypatch):
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))
    states = []
    for number, name in enumerate(("base", *NAMES)):
        torch.manual_seed(number)
        states.append(pictures().state_dict())
        save_file(states[-1], tmp_path / f"{name}.safetensors")
    tasks = [
        EntropyLossSettings(name=name, data=Call(call=f"{__file__}:images", arguments={"name": name})) for name in NAMES
    ]
    experts = tuple(str(tmp_path / f"{name}.safetensors") for name in NAMES)
    chosen = WorkerSpec(
        experts,
        str(tmp_path / "base.safetensors"),
        "regmean",
        {"targets": "weights"},
        architecture=Call(call=f"{__file__}:pictures"),
        calibration=tuple(tasks),
    )
    vectors = basis_of(chosen).models()
    found = states[0]["0.weight"] + sum(one.tensor("0.weight") for one in vectors)
    grams, matrices = [], []
    for name, state in zip(NAMES, states[1:], strict=True):
        patches = nn.functional.unfold(images(name), 3).movedim(1, 2).reshape(-1, 18)
        grams.append(gram_of(torch.cat([patches, torch.ones(len(patches), 1).double()], 1)))
        matrices.append(torch.cat([state["0.weight"].flatten(1), state["0.bias"].unsqueeze(1)], 1))
    torch.testing.assert_close(found.flatten(1), least_squares(grams, matrices)[:, :-1], rtol=1e-8, atol=1e-10)


# -- the worker --------------------------------------------------------------------------------------------------


def test_a_worker_mixes_what_was_prepared(spec):
    worker = Worker(spec)
    basis = basis_of(spec)
    size = worker._sources.layout.size
    shown = next(worker._backend.show([Genome.uniform(size, [1.0, 1.0])]))
    for key, value in merged(spec, basis).items():
        torch.testing.assert_close(shown.state_dict()[key], value, rtol=1e-12, atol=1e-12)
    shown = next(worker._backend.show([Genome.uniform(size, [0.0, 0.0])]))
    for key, value in states(spec)["base"].state_dict().items():
        assert torch.equal(shown.state_dict()[key], value)
    hashes = worker.space().contents
    assert [name for name in hashes if name.startswith("merge.operator")] == [
        "merge.operator: one",
        "merge.operator: two",
    ]


def test_what_was_prepared_is_found_again_and_its_bits_are_the_same_each_time(spec):
    first = basis_of(spec)
    stamps = [path.stat().st_mtime_ns for path in first.paths]
    assert [path.stat().st_mtime_ns for path in basis_of(spec).paths] == stamps
    Bases().remove(first.key)
    again = basis_of(spec)
    assert (again.key, again.record["files"]) == (first.key, first.record["files"])
    other = basis_of(replace(spec, settings={"ridge": 0.1}))
    assert other.key != first.key


def test_vectors_are_prepared_with_the_workers_threads_wherever_that_is(spec):
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            basis = basis_of(spec)
            found.append(basis.record["files"])
            assert torch.get_num_threads() == threads
            Bases().remove(basis.key)
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]
    assert basis_of(replace(spec, threads=2)).key != basis.key


def test_a_damaged_basis_is_made_again(spec, caplog):
    first = basis_of(spec)
    first.paths[0].chmod(0o644)
    content = bytearray(first.paths[0].read_bytes())
    content[-3] ^= 1
    first.paths[0].write_bytes(content)
    with caplog.at_level(logging.WARNING):
        again = basis_of(spec)
    assert "is damaged" in caplog.text
    assert again.record["files"] == first.record["files"]


@pytest.mark.slow
def test_a_preparation_that_is_killed_leaves_nothing_and_the_next_one_is_the_same(spec, tmp_path):
    expected = basis_of(spec).record["files"]
    Bases().remove(basis_of(spec).key)
    program = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_preparing as here
from ecotone.fitness.preparing.prepare import Preparation, basis_of
from ecotone.merging.basis import Writer
put, count = Writer.put, []
def killed(self, name, vectors, start=0):
    count.append(name)
    put(self, name, vectors, start)
    if len(count) == 6:
        os.kill(os.getpid(), 9)
Writer.put = killed
import pickle
basis_of(pickle.load(open({str(tmp_path / "spec")!r}, "rb")))
"""
    import pickle

    (tmp_path / "spec").write_bytes(pickle.dumps(spec))
    folder = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{folder.parent}:{folder}"}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, check=False, capture_output=True)
    assert ended.returncode == -9, ended.stderr
    assert Bases().all() == []
    assert basis_of(spec).record["files"] == expected
    assert [one.name for one in Bases().folder.iterdir() if one.name.endswith(".partial")] == []


def test_without_room_on_the_disk_the_numbers_are_told(spec, monkeypatch):
    monkeypatch.setattr("ecotone.merging.basis.shutil.disk_usage", lambda _: os.terminal_size((0, 10)) and Usage())
    with pytest.raises(InputError, match=r"prepared vectors need .* of disk, found 10 bytes free"):
        basis_of(spec)


class Usage:
    free = 10


def test_a_cache_that_cannot_be_written_serves_what_it_has_and_is_told_of_otherwise(spec, monkeypatch):
    first = basis_of(spec)
    opened = Path.open

    def refused(self, mode="r", *given, **named):
        if "w" in mode and "bases" in self.parts:
            raise OSError(30, "Read-only file system", str(self))
        return opened(self, mode, *given, **named)

    monkeypatch.setattr(Path, "open", refused)
    assert basis_of(spec).record == first.record
    with pytest.raises(InputError, match=r"bases: cannot be written \(Read-only file system\)"):
        basis_of(replace(spec, settings={"ridge": 0.5}))
    monkeypatch.setattr(Path, "rename", lambda self, to: refused(self, "w"))
    with pytest.raises(InputError, match="cannot be written"):
        Bases().remove(first.key)
    assert Bases().find(first.key) is not None


def test_a_removal_that_was_killed_is_finished_by_the_next(spec):
    first = basis_of(spec)
    left = first.folder.with_name(f".{first.key}.removed")
    left.mkdir()
    (left / "v-1.safetensors").write_text("")
    Bases().remove(first.key)
    assert not left.exists()
    assert Bases().find(first.key) is None


def test_the_least_recently_used_goes_first(spec):
    ages = {0.1: 300, 0.2: 100, 0.3: 200}
    made = {}
    for ridge in ages:
        made[ridge] = basis_of(replace(spec, settings={"ridge": ridge}))
    for ridge, age in ages.items():
        os.utime(made[ridge].folder, (1e9 - age, 1e9 - age))
    bases = Bases()
    assert [one.key for one in bases.all()] == [made[ridge].key for ridge in (0.1, 0.3, 0.2)]
    each = made[0.1].nbytes
    assert [one.key for one in bases.prune(2 * each, keep=made[0.1].key)] == [made[0.3].key]
    assert {one.key for one in bases.all()} == {made[0.1].key, made[0.2].key}


# -- warnings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"two": 1.001}, "one and two are nearly the same (cosine 1.00 of their task vectors): they count twice"),
        ({"two": 0.0}, "two is the base itself"),
        ({"two": 90.0}, "the task vector of two is "),
    ],
)
def test_what_a_practitioner_would_warn_of(spec, tmp_path, changes, expected):
    base, one = (Sources.open([path]).experts[0] for path in (spec.base, spec.experts[0]))
    for name, factor in changes.items():
        state = {key: base.tensor(key) + factor * (one.tensor(key) - base.tensor(key)) for key in base.tensors}
        save_file(state, tmp_path / f"{name}-changed.safetensors")
        paths = (spec.experts[0], str(tmp_path / f"{name}-changed.safetensors"))
    found = basis_of(replace(spec, experts=paths, names=NAMES)).record
    assert any(expected in text for text in found["warnings"]), found["warnings"]
    assert found["cosines"][0][0] == pytest.approx(1)


def test_what_is_amplified_is_told(spec):
    twice = replace(spec, operator="iso_c", experts=(spec.experts[0],) * 2, names=NAMES)
    assert any("amplifies what they share" in text for text in basis_of(twice).record["warnings"])
    assert not any("nearly the same" in text for text in basis_of(replace(spec, operator="iso_c")).record["warnings"])


# -- refused -----------------------------------------------------------------------------------------------------


def test_an_expert_without_data_of_its_own(spec):
    with pytest.raises(InputError, match="reads inputs of each expert's own task, found none for 'two'"):
        basis_of(replace(spec, calibration=spec.calibration[:1]))


def test_a_dict_of_tensors_has_no_layers_to_observe(spec):
    with pytest.raises(InputError, match="gathers statistics of layers, found a dict of tensors"):
        basis_of(replace(spec, architecture=None))


class Broken(nn.Module):
    def forward(self, outputs, inputs):
        raise ValueError("no such head")


def broken():
    return Broken()


@pytest.mark.parametrize("operator", ["kfac", "regmean", "regmean_pp", "fisher"])
def test_statistics_that_are_no_numbers_are_refused(spec, tmp_path, operator):
    expert = Sources.open([spec.experts[0]]).experts[0]
    state = {key: expert.tensor(key) * (1e200 if key == "blocks.0.second.weight" else 1) for key in expert.tensors}
    save_file(state, tmp_path / "one-large.safetensors")
    paths = (str(tmp_path / "one-large.safetensors"), spec.experts[1])
    with pytest.raises(InputError, match=r"merge\.operator: .*NaN or infinity"):
        basis_of(replace(spec, operator=operator, experts=paths, names=NAMES))
    assert Bases().all() == []


def test_what_a_head_raises_is_told_in_words_and_leaves_nothing(spec):
    tasks = [task.model_copy(update={"head": Call(call=f"{__file__}:broken")}) for task in spec.calibration]
    with pytest.raises(InputError, match=r"merge\.operator: kfac could not be prepared: ValueError: no such head"):
        basis_of(replace(spec, operator="kfac", calibration=tuple(tasks)))
    assert Bases().all() == []
    assert [one for one in Bases().folder.iterdir() if one.name.endswith(".partial")] == []


def test_operators_without_data_need_no_module(spec):
    plain = basis_of(replace(spec, operator="iso_c", architecture=None, calibration=()))
    shown = basis_of(replace(spec, operator="iso_c"))
    for one, other in zip(plain.models(), shown.models(), strict=True):
        for key in one.tensors:
            torch.testing.assert_close(one.tensor(key), other.tensor(key))


# -- layers ------------------------------------------------------------------------------------------------------


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(7, 4)
        self.patch = nn.Conv2d(3, 4, 2)
        self.lm_head = nn.Linear(4, 7, bias=False)
        self.mlp = nn.Linear(4, 6)


def test_layers_are_told_by_their_modules(tmp_path):
    model = Fused()
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    layout = Sources.open([tmp_path / "m.safetensors"]).layout
    model.get_output_embeddings = lambda: model.lm_head
    found = {unit.at.name: unit for unit in units(layout, model, names_of(model, layout), folds=True)}
    assert {name: unit.at.kind for name, unit in found.items()} == {
        "embed_tokens.weight": "embedding",
        "lm_head.weight": "embedding",
        "mlp.weight": "linear",
        "patch.weight": "convolution",
    }
    assert found["mlp.weight"].names == ("mlp.weight", "mlp.bias")
    assert found["patch.weight"].matrix(model.patch.weight, model.patch.bias).shape == (4, 13)
    weight, bias = found["patch.weight"].parts(found["patch.weight"].matrix(model.patch.weight, model.patch.bias))
    assert torch.equal(weight, model.patch.weight)
    assert torch.equal(bias, model.patch.bias)
    unfolded = [unit.at.name for unit in units(layout, model, names_of(model, layout))]
    assert unfolded == sorted(layout.tensors)


def test_stacks_of_experts_are_prepared_matrix_by_matrix(tmp_path, monkeypatch):
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    for name in ("base", "one", "two"):
        stack = torch.randn(3, 5, 4, dtype=torch.float64)
        save_file({"mlp.experts.up": stack}, tmp_path / f"{name}.safetensors")
        for number, matrix in enumerate(stack):
            (tmp_path / str(number)).mkdir(exist_ok=True)
            save_file({"w.weight": matrix.contiguous()}, tmp_path / str(number) / f"{name}.safetensors")

    def vectors(folder):
        experts = tuple(str(folder / f"{name}.safetensors") for name in NAMES)
        return basis_of(WorkerSpec(experts, str(folder / "base.safetensors"), "tsv_m")).models()

    whole = vectors(tmp_path)
    for number in range(3):
        for one, alone in zip(whole, vectors(tmp_path / str(number)), strict=True):
            assert torch.equal(one.tensor("mlp.experts.up")[number], alone.tensor("w.weight"))


def test_what_is_warned_of_is_told_once(spec, caplog, monkeypatch):
    monkeypatch.setattr("ecotone.fitness.preparing.prepare._warned", set())
    twice = replace(spec, operator="iso_c", experts=(spec.experts[0],) * 2, names=NAMES)
    with caplog.at_level("WARNING", "ecotone"):
        for _ in range(2):
            basis_of(twice)
    assert len([one for one in caplog.records if "amplifies what they share" in one.getMessage()]) == 1
