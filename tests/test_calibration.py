"""Calibration tasks: known losses and diversities, batches that depend on nothing but their number, heads that stay."""

import copy
import gc
import math
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from parts import calibration, call, context, objective
from pydantic import TypeAdapter, ValidationError
from torch import nn

from ecotone.fitness import heads
from ecotone.fitness.data import Examples, load
from ecotone.fitness.gradients.calibration import Task
from ecotone.fitness.heads import Head, logits
from ecotone.fitness.objectives import Accuracy, Entropy, entropies
from ecotone.fitness.registry import AnyCalibration
from ecotone.populations.errors import InputError
from ecotone.populations.trial import Goal

SETTINGS = {"expert", "temperature", "hidden", "layers"}  # of distillation

MODULE = """
import numpy as np, torch
from torch import nn

def inputs(n=10): return torch.arange(float(n))[:, None].repeat(1, 3)
def pair(n=10): return inputs(n), torch.arange(n) % 3
def none(): return torch.zeros(0, 3)
def scalar(): return torch.tensor(1.0)
def infinite(): return {"x": torch.zeros(2, 1), "y": torch.full((2, 1), float("nan"))}
def no_names(): return {}
def uneven(): return {"x": torch.zeros(3, 1), "y": torch.zeros(2, 1)}
def with_labels(): return {"input_ids": torch.zeros(3, 1, dtype=torch.long), "labels": torch.zeros(3)}
def ragged(): return {"input_ids": [[1, 2], [3]]}

made = []
class Scale(nn.Module):
    def __init__(self, times=1.0):
        super().__init__()
        made.append(times)
        self.linear = nn.Linear(3, 2)
        self.dropout = nn.Dropout(0.5)
    def forward(self, outputs, inputs): return self.dropout(self.linear(outputs))
def scale(times=1.0): return Scale(times)
def double(): return lambda outputs, inputs: outputs * 2
def linear(): return nn.Linear(3, 2)
def number(): return 7
def cube(): return lambda outputs, inputs: outputs[:, None, None]
def short(): return lambda outputs, inputs: outputs[1:]
def words(): return lambda outputs, inputs: "logits"
def cut(): return lambda outputs, inputs: outputs.detach()
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "calibration_tested.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "calibration_tested", raising=False)
    return "calibration_tested"


def made(name="a", data="inputs", head=None, dtype=None, arguments=None, seed=0, **fields):
    head = None if head is None else call(f"calibration_tested:{head}")
    settings = calibration(name, call(f"calibration_tested:{data}", arguments), head=head, **fields)
    return settings.build(context(dtype), seed)


def task(inputs, labels=None, **fields):
    return Task("a", Examples(inputs, labels), **fields)


def seen(stream, steps):
    """Numbers of the examples of each of the first batches, whose inputs are their numbers."""
    return [stream.batch(step).inputs.flatten().int().tolist() for step in range(steps)]


# -- known losses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([0.0, 0.0, 0.0, 0.0], math.log(4)),
        ([0.0, math.log(3.0)], -0.25 * math.log(0.25) - 0.75 * math.log(0.75)),
        ([1000.0, 0.0, -1000.0], 0.0),
        ([0.0, 0.0, float("-inf")], math.log(2)),
        ([7.0, 7.0], math.log(2)),
    ],
)
def test_entropies_of_known_predictions(row, expected):
    found = entropies(torch.tensor([row, row]))
    assert found.shape == (2,)
    assert found.tolist() == pytest.approx([expected, expected], abs=1e-6)


def test_an_entropy_is_not_a_number_when_a_logit_is_not():
    assert entropies(torch.tensor([[0.0, float("nan")], [0.0, 0.0]])).isnan().tolist() == [True, False]
    assert entropies(torch.tensor([[0.0, float("inf")]])).isnan().all()


def test_the_gradient_of_the_entropy_is_the_formula_s():
    """dH/dz_c = -p_c (ln p_c + H)."""
    z = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    entropies(z).sum().backward()
    p = z.detach().softmax(-1)
    expected = -p * (p.log() + entropies(z.detach())[:, None])
    assert torch.allclose(z.grad, expected, atol=1e-12)


def test_a_class_that_is_ruled_out_leaves_the_gradient_finite():
    z = torch.tensor([[0.3, float("-inf"), 1.0], [2000.0, -2000.0, 0.0]], requires_grad=True)
    entropies(z).sum().backward()
    assert bool(torch.isfinite(z.grad).all())
    assert z.grad[0, 1] == 0


def test_the_loss_is_the_mean_over_the_batch():
    rows = torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)]])
    loss, details, items = task(rows).loss(nn.Identity(), 0)
    assert loss.item() == pytest.approx((math.log(2) + 0.5623351446188083) / 2)
    mean = np.array([0.5 + 0.25, 0.5 + 0.75]) / 2
    assert details == {"diversity": pytest.approx(-(mean * np.log(mean)).sum() / math.log(2))}
    assert items == 2


def test_cross_entropy_is_minus_the_log_of_the_label_s_probability():
    rows, labels = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(3.0)]]), torch.tensor([0, 1], dtype=torch.uint8)
    loss, _, _ = task(rows, labels, loss="cross_entropy").loss(nn.Identity(), 0)
    assert loss.item() == pytest.approx(-(math.log(0.25) + math.log(0.75)) / 2)


def test_diversity_tells_a_collapse_from_sure_predictions():
    """Both have entropy 0; only where all predictions are one class is the diversity 0."""
    collapsed, varied = torch.eye(4)[[1, 1, 1, 1]] * 1e4, torch.eye(4) * 1e4
    for rows, expected in ((collapsed, 0.0), (varied, 1.0), (torch.zeros(4, 4), 1.0)):
        _, details, _ = task(rows).loss(nn.Identity(), 0)
        assert details["diversity"] == pytest.approx(expected, abs=1e-6)
    assert task(varied).loss(nn.Identity(), 0)[0].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", ["entropy", "cross_entropy"])
def test_the_loss_carries_its_graph_to_the_parameters(loss):
    model, labels = nn.Linear(3, 3), torch.arange(10) % 3
    torch.nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(1))
    value, details, _ = task(torch.randn(10, 3), labels, loss=loss, batch=4).loss(model, 3)
    value.backward()
    assert value.ndim == 0
    assert model.weight.grad.abs().max() > 0
    assert type(details["diversity"]) is float


def test_without_gradients_there_is_no_graph():
    with torch.no_grad():
        assert not task(torch.zeros(4, 3)).loss(nn.Linear(3, 2), 0)[0].requires_grad
    assert not task(torch.zeros(4, 3)).loss(nn.Linear(3, 2).requires_grad_(False), 0)[0].requires_grad


# -- the stream ----------------------------------------------------------------------------------------------


def test_a_decoder_s_inputs_keep_their_own_columns():
    """Sources and targets may be padded to one length, and are of different lengths."""
    from ecotone.fitness.data import Examples
    from ecotone.fitness.gradients.distillation import _rows

    mask, targets = torch.zeros(4, 8, dtype=torch.long), torch.arange(32).view(4, 8)
    mask[:, :2] = 1
    decoder = torch.ones(4, 8, dtype=torch.long)
    decoder[:, 6:] = 0
    examples = Examples(
        {"input_ids": targets, "attention_mask": mask, "decoder_input_ids": targets, "decoder_attention_mask": decoder}
    )
    [passed] = examples.batches(4)
    for inputs in (examples.rows(torch.tensor([0, 1, 2, 3])).inputs, passed):
        assert [tuple(inputs[name].shape) for name in inputs] == [(4, 2), (4, 2), (4, 8), (4, 8)]
    assert _rows(torch.zeros(4, 8, 5), examples.inputs).shape == (24, 5)
    without = {name: value for name, value in examples.inputs.items() if name != "decoder_attention_mask"}
    assert _rows(torch.zeros(4, 8, 5), without).shape == (4, 8, 5)


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (10, 5), (7, 3), (3, 1), (5, 16), (1, 2)])
def test_every_example_comes_once_an_epoch(module, size, batch):
    stream = made(batch=batch, arguments={"n": size})
    batch = min(batch, size)
    rows = [number for numbers in seen(stream, 3 * size) for number in numbers[::3]]
    assert len(rows) == 3 * size * batch
    for epoch in range(3 * batch):
        assert sorted(rows[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_batches_hold_as_many_examples_as_asked(module):
    assert {len(made(batch=4).batch(step)) for step in range(6)} == {4}
    assert {made(batch=4).loss(nn.Linear(3, 2), step)[2] for step in range(6)} == {4}


def test_a_batch_does_not_depend_on_those_before(module):
    stream = made(batch=4)
    forwards = seen(stream, 12)
    assert [seen_once(made(batch=4), step) for step in (11, 0, 5)] == [forwards[11], forwards[0], forwards[5]]
    assert [seen_once(stream, step) for step in reversed(range(12))] == forwards[::-1]


def seen_once(stream, step):
    return stream.batch(step).inputs.flatten().int().tolist()


@pytest.mark.slow
def test_a_batch_is_the_same_in_another_process(module, tmp_path):
    (tmp_path / "elsewhere.py").write_text(
        "import torch\nfrom ecotone.fitness.data import Examples\n"
        "from ecotone.fitness.gradients.calibration import Task\n"
        "print(Task('a', Examples(torch.arange(50.0)[:, None]), seed=3).batch(7).inputs.tolist())"
    )
    command = [sys.executable, str(tmp_path / "elsewhere.py")]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    here = Task("a", Examples(torch.arange(50.0)[:, None]), seed=3).batch(7).inputs.tolist()
    assert run.stdout.strip() == str(here)


def test_seeds_names_and_epochs_have_their_own_orders():
    def first(name="a", seed=0, step=0):
        return Task(name, Examples(torch.arange(50)), batch=50, seed=seed).batch(step).inputs.tolist()

    orders = [first(), first(seed=1), first("b"), first(step=1), first(step=2), sorted(first())]
    assert Counter(tuple(order) for order in orders).most_common(1)[0][1] == 1


def test_labels_stay_with_their_inputs():
    numbers = torch.arange(20)
    batch = Task("a", Examples({"x": numbers, "y": 2 * numbers}, numbers + 1), batch=8).batch(4)
    assert torch.equal(batch.inputs["x"] + 1, batch.labels)
    assert torch.equal(batch.inputs["y"] + 2, 2 * batch.labels)


# -- inputs by name ------------------------------------------------------------------------------------------


def texts(lengths, columns=6):
    """Token numbers above 0 and a mask, padded to so many columns."""
    mask = (torch.arange(columns) < torch.tensor(lengths)[:, None]).long()
    tokens = torch.arange(1, len(lengths) * columns + 1).view(len(lengths), columns) % 30 + 1
    return {"input_ids": tokens * mask, "attention_mask": mask}


def test_a_batch_drops_the_columns_that_none_of_its_texts_needs():
    inputs = texts([2, 5, 1, 3, 4, 2]) | {"other": torch.zeros(6, 9), "image": torch.zeros(6, 6, 2)}
    examples = Examples(inputs | {"inputs_embeds": torch.zeros(6, 6, 2)})
    for rows, columns in (([0, 2], 2), ([1], 5), ([2], 1), ([3, 5], 3)):
        found = examples.rows(torch.tensor(rows)).inputs
        assert {n: t.shape[1] for n, t in found.items()} == {
            "input_ids": columns,
            "attention_mask": columns,
            "other": 9,
            "image": 6,
            "inputs_embeds": columns,
        }
        assert torch.equal(found["input_ids"], inputs["input_ids"][rows, :columns])


def test_masked_columns_stay_where_a_text_is_padded_on_the_left_or_empty():
    mask = torch.tensor([[0, 0, 1], [0, 1, 1], [0, 0, 0]])
    examples = Examples({"attention_mask": mask})
    assert examples.rows(torch.tensor([0, 1])).inputs["attention_mask"].shape == (2, 3)
    assert examples.rows(torch.tensor([2])).inputs["attention_mask"].shape == (1, 1)


@pytest.mark.parametrize("size", [1, 2, 4, 6, 100])
def test_texts_of_like_length_share_a_pass_and_values_come_back_in_order(size):
    inputs = texts([2, 5, 1, 3, 4, 2])
    batches = Examples(inputs).batches(size)
    passes = [part["attention_mask"] for part in batches]
    assert all(len(mask) <= size for mask in passes)
    assert sum(mask.numel() for mask in passes) <= {1: 17, 2: 20, 4: 24}.get(size, 30)
    firsts = batches.restored([part["input_ids"][:, 0] for part in batches])
    assert torch.equal(firsts, inputs["input_ids"][:, 0])


def test_a_mapping_without_a_mask_is_cut_as_it_is():
    parts = list(Examples({"x": torch.arange(5), "y": torch.arange(10).view(5, 2)}).batches(2))
    assert [part["x"].tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert [part["y"][:, 1].tolist() for part in parts] == [[1, 3], [5, 7], [9]]


# -- Hugging Face models -------------------------------------------------------------------------------------


def tiny_config(**fields):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertConfig(**sizes, intermediate_size=16, max_position_embeddings=12, **fields)


@pytest.fixture(scope="module")
def encoder():
    from transformers import AutoModel

    torch.manual_seed(0)
    return AutoModel.from_config(tiny_config()).eval()


@pytest.fixture(scope="module")
def classifier():
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(tiny_config(num_labels=3)).eval()


class Mean(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.linear = nn.Linear(8, classes)
        self.kinds = []

    def forward(self, outputs, inputs):
        self.kinds.append(outputs.last_hidden_state.dtype)
        mask = inputs["attention_mask"][..., None]
        return self.linear((outputs.last_hidden_state * mask).sum(1) / mask.sum(1))


LENGTHS = [2, 5, 1, 3, 4, 2, 6, 6, 3, 1]


def test_an_encoder_with_a_head(encoder):
    """The losses of all batches of an epoch have the mean entropy that all texts have at once, unpadded or padded."""
    head, inputs = Mean().requires_grad_(False), texts(LENGTHS)
    with torch.no_grad():
        expected = entropies(head(encoder(**inputs), inputs))
        stream = Task("a", Examples(inputs), head=Head(head), batch=2)
        losses = [stream.loss(encoder, step)[0].item() for step in range(5)]
    assert np.mean(losses) == pytest.approx(expected.mean().item(), abs=1e-6)
    score = Entropy(Goal("h", "minimize"), inputs, 3, Head(head)).score(encoder)
    assert score.per_example == pytest.approx(expected.numpy(), abs=1e-6)
    assert score.value == pytest.approx(expected.mean().item(), abs=1e-6)
    assert score.items == 10


def test_the_accuracy_of_an_encoder_with_a_head(encoder):
    head, inputs = Mean(), texts(LENGTHS)
    with torch.no_grad():
        predicted = head(encoder(**inputs), inputs).argmax(-1)
    labels = predicted.clone()
    labels[[1, 7]] = (labels[[1, 7]] + 1) % 4
    score = Accuracy(Goal("acc"), inputs, labels, 3, Head(head)).score(encoder)
    assert score.value == 0.8
    assert np.flatnonzero(~score.per_example).tolist() == [1, 7]


def test_a_classifier_needs_no_head(classifier):
    inputs = texts(LENGTHS)
    with torch.no_grad():
        expected = classifier(**inputs).logits
    loss, _, _ = task(inputs, batch=10).loss(classifier, 0)
    assert loss.item() == pytest.approx(entropies(expected).mean().item(), abs=1e-6)
    score = Accuracy(Goal("acc"), inputs, expected.argmax(-1), 4).score(classifier)
    assert score.value == 1.0
    loss.backward()
    assert classifier.bert.embeddings.word_embeddings.weight.grad.abs().max() > 0
    classifier.zero_grad()


def test_features_of_a_bfloat16_encoder_reach_the_head_in_float32(encoder):
    half, head = copy.deepcopy(encoder).bfloat16(), Mean()
    loss, _, _ = task(texts(LENGTHS), head=Head(head)).loss(half, 0)
    assert head.kinds == [torch.float32]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(task(texts(LENGTHS), head=Head(head)).loss(encoder, 0)[0].item(), abs=0.02)


def test_an_encoder_without_a_head_is_refused(encoder):
    for score in (task(texts(LENGTHS)).loss, Entropy(Goal("h"), texts(LENGTHS)).score):
        with pytest.raises(InputError, match=r"expected outputs of shape \(10, classes\).*found BaseModelOutput.*head"):
            score(encoder, *(() if score.__name__ == "score" else (0,)))


# -- heads ---------------------------------------------------------------------------------------------------


def test_a_head_is_frozen_and_not_trained(module):
    stream = made(head="scale")
    inner = stream._head.function
    assert not inner.training
    assert not any(parameter.requires_grad for parameter in inner.parameters())
    model = nn.Linear(3, 3)
    values = [stream.loss(model, 0)[0] for _ in range(2)]
    assert values[0].item() == values[1].item()
    values[0].backward()
    assert all(parameter.grad is None for parameter in inner.parameters())
    assert model.weight.grad is not None


def test_the_same_call_gives_one_head(module):
    import calibration_tested

    head = call("calibration_tested:scale", {"times": 2.0})
    data = call("calibration_tested:inputs")
    tasks = [calibration(name, data, head=head).build(context(), 0) for name in "ab"]
    scored = objective("h", "entropy", data=data, head=head).build(context())
    other = calibration("c", data, head=call(head.call, {"times": 3.0})).build(context(), 0)
    assert tasks[0]._head is tasks[1]._head is scored.head
    assert other._head is not scored.head
    assert calibration_tested.made == [2.0, 3.0]


def test_heads_are_let_go_with_their_last_holder(module):
    gc.collect()  # what other tests have left
    before = len(heads._heads)
    stream = made(head="scale")
    assert len(heads._heads) == before + 1
    del stream
    gc.collect()
    assert len(heads._heads) == before


@pytest.mark.parametrize(
    ("model", "expected"), [(torch.bfloat16, torch.float32), (None, torch.float32), (torch.float64, torch.float64)]
)
def test_heads_are_at_least_as_precise_as_the_model(module, model, expected):
    stream = made(head="scale", dtype=model)
    assert {parameter.dtype for parameter in stream._head.function.parameters()} == {expected}
    assert stream.batch(0).inputs.dtype == (model or torch.float32)
    assert stream.loss(nn.Identity(), 0)[0].dtype == expected


def test_a_head_may_be_a_plain_function(module):
    rows = made(data="inputs").batch(0).inputs
    assert torch.equal(logits(nn.Identity(), rows, made(head="double")._head), 2 * rows)


def test_containers_of_outputs_keep_their_type():
    from typing import NamedTuple

    class Two(NamedTuple):
        first: torch.Tensor
        second: dict

    outputs = Two(torch.ones(2, 2).half(), {"ids": torch.ones(1).long(), "list": [torch.ones(1).half(), "a", None]})
    seen = []

    class Model(nn.Module):
        def forward(self, x):
            return outputs

    logits(Model(), torch.zeros(2), Head(lambda outputs, inputs: seen.append(outputs) or torch.zeros(2, 2)))
    [found] = seen
    assert type(found) is Two
    assert found.first.dtype == found.second["list"][0].dtype == torch.float32
    assert found.second["ids"].dtype == torch.int64
    assert found.second["list"][1:] == ["a", None]


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"seed": -1}, "seed: expected at least 0, found -1"),
        ({"loss": "cross_entropy"}, r"data: expected .*:inputs to return \(inputs, labels\), found Tensor \(10, 3\)"),
        ({"data": "none"}, r"data: inputs: expected shape \(N, ...\) with N >= 1, found \(0, 3\)"),
        ({"data": "scalar"}, r"data: inputs: expected shape \(N, ...\) with N >= 1, found \(\)"),
        ({"data": "infinite"}, "data: inputs: y: expected finite numbers, found NaN or infinity"),
        ({"data": "no_names"}, "data: inputs: expected tensors by name, found none"),
        ({"data": "uneven"}, "data: inputs: y: expected 3 rows, as the first input has, found 2"),
        ({"data": "with_labels"}, r"data: inputs: expected no 'labels'.*Return \(inputs, labels\)"),
        ({"data": "ragged"}, "data: inputs: input_ids: expected a tensor or an array, found list of 2"),
        ({"head": "number"}, r"head: expected .*:number to return a callable of \(outputs, inputs\), found int"),
        ({"head": "linear"}, r"head: expected .*:linear .*found Linear .*Write a module whose forward"),
        ({"head": "missing"}, "head: module 'calibration_tested' has no 'missing'"),
    ],
)
def test_tasks_that_cannot_be_built(module, fields, words):
    with pytest.raises(InputError, match=f"calibration 'a': {words}"):
        made(**fields)


@pytest.mark.parametrize(
    ("fields", "place", "words"),
    [
        ({"batch": 0}, ("entropy", "batch"), "Input should be greater than or equal to 1"),
        (
            {"loss": "hinge"},
            ("loss",),
            "expected one of entropy, cross_entropy, distillation, found 'hinge'. If another package has it",
        ),
        ({"loss": 3}, ("loss",), "expected one of entropy, cross_entropy, distillation, found 3."),
        ({"expert": "b"}, (), "Value error, expert: belongs to loss: distillation, found loss: entropy"),
        (
            {"loss": "cross_entropy", "hidden": 0.5},
            (),
            "Value error, hidden: belongs to loss: distillation, found loss: cross_entropy",
        ),
        ({"expart": "b"}, ("entropy", "expart"), "Extra inputs are not permitted"),
    ],
)
def test_settings_that_do_not_fit_a_loss(fields, place, words):
    with pytest.raises(ValidationError) as caught:
        calibration("a", call("m:f"), **fields)
    [error] = caught.value.errors()
    assert error["loc"] == place
    assert error["msg"].startswith(words)


@pytest.mark.parametrize("loss", ["entropy", "cross_entropy", "distillation"])
def test_a_record_tells_the_settings_of_every_loss_and_is_taken_back(loss):
    record = {"name": "a", "data": {"call": "m:f", "arguments": {}}, "loss": loss, "head": None, "batch": 16}
    record |= {"expert": None, "temperature": 1.0, "hidden": 1.0, "layers": None}
    tasks: TypeAdapter[Any] = TypeAdapter(tuple[AnyCalibration, ...])
    [found] = tasks.validate_python([record])
    assert tasks.dump_python((found,), mode="json") == [record]
    assert set(type(found).model_fields) == set(record) - (set() if loss == "distillation" else SETTINGS)
    assert (found.loss, found.teacher) == (loss, "a" if loss == "distillation" else None)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "entropy of m:f with m:h, 16 examples a step"),
        ({"loss": "cross_entropy", "batch": 4}, "cross_entropy of m:f with m:h, 4 examples a step"),
        ({"loss": "distillation"}, "distillation from a of m:f with m:h, 16 examples a step"),
        ({"loss": "distillation", "expert": "b"}, "distillation from b of m:f with m:h, 16 examples a step"),
    ],
)
def test_a_task_is_told_in_words(fields, words):
    assert calibration("a", call("m:f"), head=call("m:h"), **fields).describe() == words


@pytest.mark.parametrize(
    ("fields", "model", "words"),
    [
        ({"head": "cube"}, nn.Identity(), r"the head's logits of shape \(10, classes\).*found Tensor \(10, 1, 1, 3\)"),
        ({"head": "short"}, nn.Identity(), r"the head's logits of shape \(10, classes\).*found Tensor \(9, 3\)"),
        ({"head": "words"}, nn.Identity(), r"the head's logits of shape \(10, classes\).*found str"),
        ({"head": "cut"}, nn.Linear(3, 3), "a loss that depends on the model's parameters.*no detach"),
        ({}, nn.Unflatten(1, (3, 1)), r"expected outputs of shape \(10, classes\).*found Tensor \(10, 3, 1\).*a head"),
        ({}, nn.Linear(3, 1), "expected at least 2 classes to take an entropy of, found 1"),
        ({}, {"w": torch.zeros(1)}, "expected a torch module to score, found a dict"),
        ({"data": "pair", "loss": "cross_entropy"}, nn.Linear(3, 2), "an output for each label from 0 to 2, found 2"),
    ],
)
def test_models_that_do_not_fit_a_task(module, fields, model, words):
    with pytest.raises(InputError, match=words):
        made(**fields).loss(model, 0)


def test_labels_that_are_not_needed_are_left_out(module):
    assert made(data="pair").batch(0).labels is None
    assert load(call("calibration_tested:pair"), "d", labelled=False).labels is None


def test_labels_need_not_be_given_to_a_task_by_hand():
    with pytest.raises(InputError, match="calibration 'a': loss: cross_entropy needs labels"):
        task(torch.zeros(3, 2), loss="cross_entropy")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_task_on_a_gpu_has_the_losses_of_the_cpu(encoder):
    device, labels = torch.device("cuda"), torch.tensor(LENGTHS) % 4
    head, model = Mean(), copy.deepcopy(encoder).to(device)
    here = Task("a", Examples(texts(LENGTHS), labels), "cross_entropy", Head(head), batch=3)
    expected = [here.loss(encoder, step)[0].item() for step in range(4)]
    accuracy = Accuracy(Goal("acc"), texts(LENGTHS), labels, 3, Head(head)).score(encoder)
    examples = Examples(texts(LENGTHS), labels).to(device)
    there = Task("a", examples, "cross_entropy", Head(head.to(device)), batch=3)
    assert [there.loss(model, step)[0].item() for step in range(4)] == pytest.approx(expected, abs=1e-4)
    found = Accuracy(Goal("acc"), examples.inputs, examples.labels, 3, Head(head)).score(model)
    assert found.per_example.tolist() == accuracy.per_example.tolist()
