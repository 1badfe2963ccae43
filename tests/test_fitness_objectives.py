"""Objectives: known accuracies, refusals in words, and functions that give the same score wherever they run."""

import random

import numpy as np
import pytest
import torch
from parts import call as named
from parts import context, objective
from pydantic import ValidationError
from torch import nn

from ecotone.fitness.callables import call, resolve
from ecotone.fitness.data import load
from ecotone.fitness.heads import Head
from ecotone.fitness.objectives import Accuracy, CallableObjective, Entropy
from ecotone.fitness.protocol import Objective
from ecotone.populations.errors import InputError
from ecotone.populations.trial import Goal

MODULE = """
import numpy as np, torch
def inputs_and_labels(n=6): return np.eye(3, dtype="float32")[np.arange(n) % 3], np.arange(n) % 3
def one(): return torch.zeros(3, 2)
def short_labels(): return torch.zeros(3, 2), torch.zeros(2, dtype=torch.long)
def halves(): return torch.zeros(3, 2), torch.tensor([0.5, -1.0])
def by_name():
    ids = torch.tensor([[1, 2, 0], [2, 0, 0], [0, 1, 2]])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "scale": torch.ones(3, 1)}, torch.tensor([0, 1, 2])
def head(): return lambda outputs, inputs: outputs * 2
def float_labels(): return torch.zeros(3, 2), torch.zeros(3)
def negative_labels(): return torch.zeros(3, 2), torch.tensor([0, -1, 0])
def infinite(): return torch.full((3, 2), float("inf")), torch.zeros(3, dtype=torch.long)
def ragged(): return [[1.0], [1.0, 2.0]], [0, 1]
def raises(): raise ZeroDivisionError("no data today")
def score(model, times=1): return 2.0 * times
number = 3
class Box:
    @staticmethod
    def score(model): return 5.0
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "objectives_tested.py").write_text(MODULE)
    (tmp_path / "needs_more.py").write_text("import surely_not_installed\n")
    (tmp_path / "broken_module.py").write_text("raise KeyError('at import')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "objectives_tested", raising=False)
    return "objectives_tested"


def identity() -> nn.Module:
    return nn.Identity()


class Table(nn.Module):
    """Row i of a table of outputs for input i: any outputs at all, NaN too."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def forward(self, x):
        return self.rows[x]


# -- accuracy ------------------------------------------------------------------------------------------------


def accuracy(inputs, labels, batch=512):
    return Accuracy(Goal("acc"), torch.as_tensor(inputs), torch.as_tensor(labels), batch)


def test_accuracy_of_known_outputs():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 1.0, 2.0], [5.0, 1.0, 2.0]])
    score = accuracy(logits, [0, 1, 2, 2]).score(identity())
    assert score.value == 0.75
    assert score.items == 4
    assert score.per_example is not None
    assert score.per_example.dtype == bool
    assert score.per_example.tolist() == [True, True, True, False]
    assert isinstance(score.value, float)


def test_accuracy_takes_the_first_of_equal_outputs():
    """A collapsed model (all outputs equal) must not be right everywhere."""
    score = accuracy(torch.zeros(10, 10), torch.arange(10)).score(identity())
    assert score.value == 0.1


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_batches_do_not_change_what_is_right(batch):
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(20, 5, generator=generator), torch.randint(0, 5, (20,), generator=generator)
    module = nn.Linear(5, 5).eval()
    whole = accuracy(inputs, labels).score(module)
    cut = accuracy(inputs, labels, batch).score(module)
    assert cut.value == whole.value
    assert np.array_equal(cut.per_example, whole.per_example)


def test_no_pass_is_larger_than_the_batch():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return x

    accuracy(torch.zeros(10, 2), torch.zeros(10, dtype=torch.long), 4).score(Spy())
    assert max(seen) <= 4
    assert sum(seen) == 10


@pytest.mark.parametrize("column", [0, 1, 2])
def test_one_nan_output_makes_the_score_nan(column):
    logits = torch.ones(9, 3)
    logits[4, column] = float("nan")
    objective = accuracy(torch.arange(9), torch.zeros(9, dtype=torch.long), 2)
    assert np.isnan(objective.score(Table(logits)).value)
    assert objective.score(Table(torch.ones(9, 3))).value == 1.0


def test_masked_outputs_of_minus_infinity_are_fine():
    logits = torch.tensor([[1.0, float("-inf")], [2.0, float("-inf")]])
    assert accuracy([0, 1], [0, 1]).score(Table(logits)).value == 0.5


def test_outputs_with_logits_as_hugging_face_gives_them():
    class Wrapped(nn.Module):
        def forward(self, x):
            return type("Output", (), {"logits": x})

    assert accuracy(torch.eye(3), [0, 1, 2]).score(Wrapped()).value == 1.0


@pytest.mark.parametrize(
    ("inputs", "labels", "words"),
    [
        (torch.zeros(4, 3, 2), [0, 1, 2, 0], "shape \\(4, classes\\), one row an example, found Tensor \\(4, 3, 2\\)"),
        (torch.zeros(4, 3), [0, 1, 2, 3], "an output for each label from 0 to 3, found 3"),
    ],
)
def test_outputs_that_do_not_fit(inputs, labels, words):
    with pytest.raises(InputError, match=words):
        accuracy(inputs, labels).score(identity())


def test_accuracy_needs_a_module():
    with pytest.raises(InputError, match="expected a torch module"):
        accuracy(torch.zeros(1, 2), [0]).score({"w": torch.zeros(1)})


def test_accuracy_refuses_a_batch_of_none():
    with pytest.raises(InputError, match="objective 'acc': batch: expected at least 1, found 0"):
        accuracy(torch.zeros(1, 2), [0], 0)


class Named(nn.Module):
    """Logits (n, 3) that are largest for an example's first token; takes its inputs by name."""

    def forward(self, input_ids, attention_mask, scale):
        assert torch.equal(attention_mask, (input_ids > 0).long())
        return nn.functional.one_hot(input_ids[:, 0], 3) * scale


@pytest.mark.parametrize("batch", [1, 2, 512])
def test_inputs_may_have_names(module, batch):
    made = objective("acc", data=named(f"{module}:by_name"), batch=batch).build(context())
    assert made.score(Named()).per_example.tolist() == [False, False, False]
    right = Accuracy(Goal("acc"), made.inputs, torch.tensor([1, 2, 1]), batch)
    assert right.score(Named()).per_example.tolist() == [True, True, False]


def test_a_head_makes_the_logits():
    def head(outputs, inputs):
        return outputs.flip(-1) + inputs

    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
    objective = Accuracy(Goal("acc"), torch.zeros(2, 3), torch.tensor([2, 1]), head=Head(head))
    same = nn.Module()
    same.forward = lambda inputs: logits
    assert objective.score(same).value == 1.0


# -- entropy -------------------------------------------------------------------------------------------------


def entropy(inputs, batch=512):
    return Entropy(Goal("h", "minimize"), torch.as_tensor(inputs), batch)


@pytest.mark.parametrize("batch", [1, 2, 512])
def test_entropy_of_known_outputs(batch):
    logits = torch.tensor([[0.0, 0.0], [0.0, float(np.log(3.0))], [50.0, -50.0]])
    score = entropy(logits, batch).score(identity())
    expected = [np.log(2), -0.25 * np.log(0.25) - 0.75 * np.log(0.75), 0.0]
    assert score.per_example == pytest.approx(expected, abs=1e-6)
    assert score.value == pytest.approx(np.mean(expected), abs=1e-6)
    assert score.items == 3
    assert isinstance(score.value, float)


def test_entropy_is_at_most_that_of_a_guess():
    rows = torch.randn(200, 7, generator=torch.Generator().manual_seed(0))
    per_example = entropy(rows).score(identity()).per_example
    assert 0 < per_example.min() < per_example.max() < np.log(7)


def test_one_nan_output_makes_the_entropy_nan():
    rows = torch.zeros(5, 3)
    rows[2, 1] = float("nan")
    assert np.isnan(entropy(torch.arange(5), 2).score(Table(rows)).value)


def test_entropy_of_bfloat16_outputs_is_computed_in_float32():
    rows = torch.randn(64, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert entropy(rows).score(identity()).value == entropy(rows.float()).score(identity()).value


def test_entropy_refuses_one_class_and_no_batch():
    with pytest.raises(InputError, match="at least 2 classes to take an entropy of, found 1"):
        entropy(torch.zeros(4, 1)).score(identity())
    with pytest.raises(InputError, match="objective 'h': batch: expected at least 1, found 0"):
        entropy(torch.zeros(4, 2), 0)
    with pytest.raises(InputError, match="expected a torch module"):
        entropy(torch.zeros(4, 2)).score({"w": torch.zeros(1)})


@pytest.mark.parametrize("function", ["one", "inputs_and_labels", "halves"])
def test_entropy_needs_no_labels_and_ignores_them(module, function):
    made = objective("h", "entropy", data=named(f"{module}:{function}")).build(context())
    assert isinstance(made, Entropy)
    assert made.goal.direction == "minimize"
    assert 0 < made.score(identity()).value < 1.1


@pytest.mark.parametrize("type", ["accuracy", "entropy"])
def test_settings_may_name_a_head(module, type):
    data = named(f"{module}:inputs_and_labels")
    plain, doubled = (
        objective("o", type, data=data, head=head).build(context()).score(identity())
        for head in (None, named(f"{module}:head"))
    )
    assert (plain.value, doubled.value) == (
        (1, 1) if type == "accuracy" else pytest.approx((0.97531, 0.66557), abs=1e-4)
    )


# -- Python functions ----------------------------------------------------------------------------------------


def scored(function, **arguments):
    return CallableObjective(Goal("f", "minimize"), function, arguments).score({"w": torch.ones(2)})


@pytest.mark.parametrize("returned", [1.5, np.float32(1.5), torch.tensor(1.5), np.array(1.5)])
def test_a_function_may_return_any_number(returned):
    score = scored(lambda model: returned)
    assert (score.value, score.per_example, score.items) == (1.5, None, 0)


@pytest.mark.parametrize("examples", [[0.0, 1.0], np.array([False, True]), torch.tensor([0, 1], dtype=torch.bfloat16)])
def test_a_function_may_return_scores_by_example(examples):
    score = scored(lambda model: (0.5, examples))
    assert score.items == 2
    assert np.asarray(score.per_example, float).tolist() == [0.0, 1.0]


def test_a_function_gets_its_arguments_and_the_model():
    assert scored(lambda model, times: float(model["w"].sum()) * times, times=3).value == 6.0


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (None, "found NoneType"),
        ("high", "found the text 'high'"),
        (True, "found the bool True"),
        (np.array([True]), r"found an array of shape \(1,\)"),
        (np.array(True), "found an array of bool"),
        (torch.tensor(True), "found a tensor of torch.bool"),
        (torch.tensor([1.5]), r"found a tensor of shape \(1,\)"),
        (1 + 2j, "found complex"),
        (torch.tensor(1j), "found a tensor of torch.complex64"),
        ({"acc": 1.0}, "found dict"),
        ((1.0, 2.0, 3.0), "found tuple"),
        ((1.0, [[1.0], [2.0]]), "found \\(2, 1\\)"),
        ((1.0, ["a", "b"]), "numbers or bools"),
    ],
)
def test_what_a_function_may_not_return(returned, words):
    with pytest.raises(InputError, match=words):
        scored(lambda model: returned)


def test_one_example_that_is_not_finite_makes_the_score_nan():
    assert np.isnan(scored(lambda model: (1.0, [1.0, float("nan")])).value)


def test_a_function_that_draws_gives_the_same_score_each_time_and_leaves_the_generators_alone():
    def draws(model):
        return random.random() + float(np.random.rand()) + float(torch.rand(()))

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = states()
    first = scored(draws).value
    assert states() == before
    random.random(), np.random.rand(), torch.rand(3)
    assert scored(draws).value == first


def test_generators_are_restored_after_a_function_that_raises():
    before = random.getstate()
    with pytest.raises(ZeroDivisionError):
        scored(lambda model: random.random() / 0)
    assert random.getstate() == before


def test_all_kinds_are_objectives():
    assert isinstance(accuracy(torch.zeros(1, 2), [0]), Objective)
    assert isinstance(entropy(torch.zeros(1, 2)), Objective)
    assert isinstance(CallableObjective(Goal("f"), len), Objective)


# -- names of functions --------------------------------------------------------------------------------------


def test_resolve(module):
    assert resolve("math:hypot")(3, 4) == 5
    assert resolve(f"{module}:Box.score")(None) == 5.0
    assert call(named(f"{module}:score", {"model": None, "times": 2})) == 4.0


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("math.hypot", "f: expected 'package.module:function' or './file.py:function', found 'math.hypot'"),
        ("math:", "expected 'package.module:function'"),
        (":f", "expected 'package.module:function'"),
        ("no_such_module_here:f", "no module named 'no_such_module_here'"),
        ("objectives_tested.sub:f", "no module named 'objectives_tested.sub'"),
        ("objectives_tested:scor", "has no 'scor'.*Did you mean 'score'"),
        ("objectives_tested:number", "expected a function at 'objectives_tested:number', found int"),
        ("needs_more:f", "importing 'needs_more'.*needs the module 'surely_not_installed'"),
        ("broken_module:f", "importing 'broken_module'.*raised KeyError: 'at import'"),
    ],
)
def test_names_that_do_not_resolve(module, path, words):
    with pytest.raises(InputError, match=words):
        resolve(path, "f")


def test_what_a_function_raises_is_named(module):
    with pytest.raises(InputError, match=r"data: objectives_tested:raises\(\) raised ZeroDivisionError: no data today"):
        call(named(f"{module}:raises"), "data")


# -- data and specs ------------------------------------------------------------------------------------------


def test_data_may_be_arrays(module):
    examples = load(named(f"{module}:inputs_and_labels", {"n": 6}), "data", labelled=True)
    assert examples.inputs.shape == (6, 3)
    assert examples.labels.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("one", "expected .*:one to return \\(inputs, labels\\), found Tensor \\(3, 2\\)"),
        ("short_labels", "labels: expected shape \\(3,\\), one an input, found \\(2,\\)"),
        ("float_labels", "labels: expected integers, found torch.float32"),
        ("negative_labels", "labels: expected class numbers from 0, found -1"),
        ("infinite", "inputs: expected finite numbers"),
        ("ragged", "inputs: expected a tensor or an array, found list of 2"),
    ],
)
def test_data_that_does_not_fit(module, function, words):
    with pytest.raises(InputError, match=f"objective 'acc': data: {words}"):
        objective("acc", data=named(f"{module}:{function}")).build(context())


@pytest.mark.parametrize(
    ("kind", "fields", "place", "error"),
    [
        ("accuracy", {}, ("accuracy", "data"), "missing"),
        ("entropy", {}, ("entropy", "data"), "missing"),
        ("call", {}, ("call", "call"), "missing"),
        ("recall", {}, ("type",), "unknown_kind"),
        ("call", {"call": "m:f", "data": {"call": "m:d"}}, ("call", "data"), "extra_forbidden"),
        ("entropy", {"data": {"call": "m:d"}, "call": "m:f"}, ("entropy", "call"), "extra_forbidden"),
        ("accuracy", {"data": {"call": "m:d"}, "batch": 0}, ("accuracy", "batch"), "greater_than_equal"),
        ("accuracy", {"data": {"call": "m:d"}, "direction": "minimize"}, ("accuracy", "direction"), "literal_error"),
    ],
)
def test_settings_that_do_not_belong(kind, fields, place, error):
    with pytest.raises(ValidationError) as caught:
        objective("o", kind, **fields)
    assert [(found["loc"], found["type"]) for found in caught.value.errors()] == [(place, error)]


def test_inputs_take_the_models_dtype_and_token_ids_do_not(module):
    made = objective("acc", data=named(f"{module}:inputs_and_labels")).build(context(torch.bfloat16))
    assert isinstance(made, Accuracy)
    assert made.inputs.dtype == torch.bfloat16
    assert made.labels.dtype == torch.int64
    by_name = objective("acc", data=named(f"{module}:by_name")).build(context(torch.bfloat16))
    kinds = {name: tensor.dtype for name, tensor in by_name.inputs.items()}
    assert kinds == {"input_ids": torch.int64, "attention_mask": torch.int64, "scale": torch.bfloat16}


class Greedy(nn.Module):
    """Writes into its inputs."""

    def forward(self, inputs):
        inputs += 0.3
        return inputs


@pytest.mark.parametrize("batch", [2, 8])
def test_a_model_that_writes_into_the_objectives_data_is_refused_from_then_on(batch):
    inputs, labels = torch.eye(3).repeat(2, 1), torch.arange(6) % 3
    objectives = [Accuracy(Goal("a"), inputs, labels, batch), Entropy(Goal("e", "minimize"), inputs.clone(), batch)]
    for one in objectives:
        one.score(identity())
        for model in (Greedy(), identity()):
            with pytest.raises(InputError, match="wrote into its inputs"):
                one.score(model)


def test_arguments_are_the_same_for_each_call():
    seen = []

    def score(model, items):
        items.append(len(items))
        seen.append(list(items))
        return 1.0

    one = CallableObjective(Goal("a"), score, {"items": [7]})
    one.score(identity())
    one.score(identity())
    assert seen == [[7, 1], [7, 1]]
