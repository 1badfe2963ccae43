"""Objectives that change the model or the process: no score of any candidate is wrong, and each is told of once."""

from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import misbehaving
import pytest
import torch
from parts import calibration, call, objective
from safetensors.torch import save_file

from ecotone.fitness.backends import resident
from ecotone.fitness.guarded_names import OF_TORCH, Globals, Names
from ecotone.fitness.guarded_values import Contents
from ecotone.fitness.guards import STATES, Structure
from ecotone.fitness.specs import WorkerSpec
from ecotone.fitness.worker import Worker
from ecotone.populations.genome import Genome
from ecotone.populations.trial import Evaluation, Gradient, Trial

pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture
def models(tmp_path: Path) -> tuple[str, ...]:
    """Two experts."""
    for seed in range(2):
        torch.manual_seed(seed)
        save_file(misbehaving.net().state_dict(), tmp_path / f"{seed}.safetensors")
    return tuple(str(tmp_path / f"{seed}.safetensors") for seed in range(2))


def well(name: str) -> Any:
    return objective(name, "call", call="misbehaving:well")


def bad(kind: str) -> Any:
    return objective("bad", "call", call=misbehaving.call_of(kind))


def measured(models: tuple[str, ...], *objectives: Any, count: int = 5, **fields: Any) -> list[Evaluation]:
    architecture = call("misbehaving:net") if "architecture" not in fields else fields.pop("architecture")
    worker = Worker(WorkerSpec(models, architecture=architecture, search=objectives, device="cpu", **fields))
    size = worker._sources.layout.size
    trials = [Trial(number, Genome.uniform(size, [number / 4, 1 - number / 4])) for number in range(count)]
    return [found for start in range(0, count, 2) for found in worker.measure(trials[start : start + 2])]


def wrong(found: list[Evaluation], expected: list[Evaluation]) -> int:
    """Scores that are not those of the well-behaved objective on the same candidate. Failures are no scores."""
    pairs = zip(found, expected, strict=True)
    return sum(score != right.scores["first"] for one, right in pairs for score in one.scores.values())


@pytest.mark.parametrize(
    "stack_bytes", [pytest.param(0, id="in place"), pytest.param(1 << 20, id="stacked", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", misbehaving.KINDS)
def test_no_score_is_wrong(models, monkeypatch, caplog, kind, stack_bytes):
    monkeypatch.setattr(resident, "STACK_BYTES", stack_bytes)
    expected = measured(models, well("first"))
    states = [state.get() for state in STATES]
    with caplog.at_level(logging.WARNING, "ecotone"):
        found = measured(models, well("first"), bad(kind), well("last"))
    assert all(one.ok for one in found) or kind in misbehaving.MAY_FAIL, found
    assert wrong(found, expected) == 0
    assert all("objective 'bad' left threads" in one.failure.message for one in found if not one.ok)
    assert [state.get() for state in STATES] == states
    told = [record for record in caplog.records if record.event == "objective_misbehaved"]
    assert {record.subject for record in told} == {"objective 'bad'"}
    assert len({(record.subject, record.kind) for record in told}) == len(told)


@pytest.mark.parametrize("kind", misbehaving.OF_DICTS)
def test_no_score_of_a_dict_of_tensors_is_wrong(models, kind):
    expected = measured(models, well("first"), architecture=None)
    found = measured(models, well("first"), bad(kind), well("last"), architecture=None)
    assert all(one.ok for one in found), found
    assert wrong(found, expected) == 0


def test_a_well_behaved_objective_is_told_nothing_of(models, caplog):
    with caplog.at_level(logging.WARNING, "ecotone"):
        measured(models, well("first"), well("last"))
    assert not caplog.records


def test_a_warning_says_what_was_changed_and_what_to_do(models, caplog):
    with caplog.at_level(logging.WARNING, "ecotone"):
        measured(models, bad("replaces a parameter"), well("last"))
    [record] = caplog.records
    assert record.getMessage() == (
        "objective 'bad' changed parameters (first.weight). That is put back after each call. Have it work on a copy: "
        "copy.deepcopy(model)."
    )


def head(bad: str) -> Any:
    return call("misbehaving:Head", {"bad": bad})


DATA = call("misbehaving:data")


@pytest.mark.parametrize("kind", ["", "itself", "model", "weights"])
def test_heads_that_change_the_model_or_themselves(models, kind):
    def entropy(name: str, bad: str) -> Any:
        return objective(name, "entropy", data=DATA, head=head(bad))

    expected = measured(models, entropy("first", ""))
    found = measured(models, entropy("first", ""), entropy("bad", kind), entropy("last", kind))
    assert all(one.ok for one in found), found
    assert wrong(found, expected) == 0


def gradients(models: tuple[str, ...], *tasks: Any) -> list[Evaluation]:
    worker = Worker(WorkerSpec(models, calibration=tasks, architecture=call("misbehaving:net"), device="cpu"))
    genomes = [Genome.uniform(worker._sources.layout.size, [share, 1 - share]) for share in (0.2, 0.2, 0.7)]
    names = tuple(task.name for task in tasks)
    return worker.measure(
        [Trial(n, one, wants=Gradient(names, 0, (1.0,) * len(names))) for n, one in enumerate(genomes)]
    )


@pytest.mark.parametrize(
    "kind",
    [
        "adds a forward hook",
        "patches forward",
        "writes into a buffer",
        "changes the default type",
        "sets an attribute",
        "replaces a parameter",
    ],
)
def test_gradients_of_other_tasks_and_later_candidates_are_right(models, kind):
    first, last = calibration("first", DATA, head=head("")), calibration("last", DATA, head=head(""))
    right = gradients(models, first, last)
    number = list(misbehaving.KINDS).index(kind)
    found = gradients(models, calibration("first", DATA, head=head(str(number))), last)
    assert all(one.ok for one in found), found
    assert [one.scores for one in found] == [one.scores for one in right]
    assert all((one.gradient == other.gradient).all() for one, other in zip(found, right, strict=True))


def test_well_behaved_losses_are_told_nothing_of(models, caplog):
    """Our own hooks for gradients are none of theirs."""
    tasks = calibration("first", DATA, head=head("")), calibration("last", DATA, head=head(""))
    with caplog.at_level(logging.WARNING, "ecotone"):
        assert all(one.ok for one in gradients(models, *tasks))
    assert not caplog.records


@pytest.mark.parametrize("kind", ["writes into weights", "writes into weights through .data"])
def test_a_loss_that_writes_into_weights_fails_and_the_next_candidate_is_right(models, kind):
    number = list(misbehaving.KINDS).index(kind)
    tasks = calibration("bad", DATA, head=head(str(number))), calibration("last", DATA)
    worker = Worker(WorkerSpec(models, calibration=tasks, architecture=call("misbehaving:net"), device="cpu"))
    genome = Genome.uniform(worker._sources.layout.size, [0.2, 0.8])
    wants = [Gradient((name,), 0, (1.0,)) for name in ("last", "bad", "last")]
    right, failed, again = worker.measure([Trial(number, genome, wants=wish) for number, wish in enumerate(wants)])
    assert "wrote into the model's weights" in failed.failure.message
    assert again.scores == right.scores
    assert (again.gradient == right.gradient).all()


def test_what_cannot_be_put_back_fails_this_candidate_and_all_later_ones(models, monkeypatch):
    monkeypatch.setattr("ecotone.fitness.guarded_weights.WHOLE", 8)
    found = measured(models, bad("writes into a buffer"), well("last"))
    messages = {one.failure.message for one in found}
    assert messages == {
        "objective 'bad' cannot be undone: it wrote into shift. Have it work on a copy: copy.deepcopy(model)."
    }


def test_torch_may_wrap_its_own_functions(models, monkeypatch, caplog):
    """As it does when ``torch._dynamo`` is imported, at any time."""
    wrapped = torch._disable_dynamo(torch.manual_seed)
    monkeypatch.setattr(torch, "manual_seed", torch.manual_seed)
    monkeypatch.setitem(misbehaving.KINDS, "writes into weights", lambda model: setattr(torch, "manual_seed", wrapped))
    function = misbehaving.scored_first(misbehaving.KINDS["writes into weights"])
    monkeypatch.setattr(misbehaving, "bad_10", function)
    with caplog.at_level(logging.WARNING, "ecotone"):
        measured(models, bad("writes into weights"), well("last"))
    assert not caplog.records
    assert torch.manual_seed is wrapped


def test_names_that_hide_nothing_may_be_added_to_torch():
    """As libraries do that are imported late."""
    names = Names(OF_TORCH)
    try:
        torch.Tensor.brand_new = torch.brand_new = lambda *given: 1
        assert not names.same()
        assert names.put_back() == []
        assert names.same()
    finally:
        del torch.Tensor.brand_new, torch.brand_new


def test_another_function_of_torch_is_no_wrapper_of_the_first():
    names, plain = Names(OF_TORCH), torch.nn.functional.relu
    torch.nn.functional.relu = torch.nn.functional.gelu = torch.nn.functional.leaky_relu
    assert names.put_back() == ["torch.nn.functional.relu", "torch.nn.functional.gelu"]
    assert torch.nn.functional.relu is plain


def test_globals_that_a_models_code_sets_are_its_own():
    module = ModuleType("counting")
    code = "calls, scale = 0, 1.0\nclass Net:\n def forward(self):\n  global calls\n  calls += 1\n  return scale\n"
    exec(code, vars(module))
    values = Globals([module.Net])
    module.calls, module.scale = 5, 2.0
    assert values.put_back() == ["counting.scale"]
    assert (module.calls, module.scale) == (5, 1.0)


def test_containers_whose_class_has_code_of_its_own_are_left_out():
    class Loud(dict):
        def __getitem__(self, key):
            raise ValueError

    contents, loud, quiet = Contents(), Loud(one=1), {"one": {1, 2}}
    contents.follow({"loud": loud, "quiet": (quiet,)}, "attributes", "model")
    contents.seal()
    loud["two"] = 2
    assert contents.same()
    quiet["one"].add(3)
    assert contents.put_back() == [("attributes", "model.quiet.0.one")]
    assert quiet == {"one": {1, 2}}


def test_configurations_and_lists_of_modules_are_put_back():
    class Config:
        def __init__(self):
            self.scale, self.rope = 1.0, {"theta": 1.0}

    model = misbehaving.net()
    model.config, model.kinds = Config(), ["a", "b"]
    structure = Structure(model)
    assert structure.same()
    model.config.scale, model.config.rope["theta"] = 2.0, 3.0
    model.kinds.append("c")
    assert not structure.same()
    places = {change.place for change in structure.mend()}
    assert places == {"config.scale", "config.rope.theta", "kinds"}
    assert (model.config.scale, model.config.rope, model.kinds) == (1.0, {"theta": 1.0}, ["a", "b"])
    assert structure.same()


def test_tied_weights_stay_tied():
    """An objective that unties two layers changes parameters of one of them."""
    model = misbehaving.net()
    model.third = torch.nn.Linear(4, 6)
    model.third.weight = model.first.weight
    structure = Structure(model)
    model.third.weight = torch.nn.Parameter(torch.zeros(6, 4))
    assert [change.place for change in structure.mend()] == ["third.weight"]
    assert model.third.weight is model.first.weight


def test_hooks_that_transformers_adds_when_hidden_states_are_asked_for_are_told_to_nobody():
    transformers = pytest.importorskip("transformers", minversion="5")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=5, **sizes)).eval()
    structure = Structure(model)
    model(torch.zeros(1, 2, dtype=torch.int64), output_hidden_states=True)
    assert not structure.same()
    model.register_forward_hook(lambda *_: None)
    assert [change.kind for change in structure.mend() if change.kind] == ["hooks"]
    assert structure.same()
    found = model(torch.zeros(1, 2, dtype=torch.int64), output_hidden_states=True)
    assert len(found.hidden_states) == 2
