"""Expert Merging: its loss on known logits, its coefficients against autograd, frozen tensors, chunks, resuming."""

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from managing import begun, ended
from parts import calibration, call, context, objective
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn

from ecotone.experiments import compose
from ecotone.experiments.recipe import Recipe
from ecotone.fitness.backends.resident import Resident, ResidentSettings
from ecotone.fitness.data import Examples
from ecotone.fitness.gradients.distillation import Behaviour, DistillationSettings, Distilled, distance, observe
from ecotone.fitness.pools import SerialPool
from ecotone.fitness.specs import WorkerSpec
from ecotone.fitness.worker import Worker
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome
from ecotone.populations.gram import GramTable
from ecotone.populations.population import ElitistArchive
from ecotone.populations.space import Space
from ecotone.populations.trial import Evaluation, Goal, Gradient, Outcome, Trial
from ecotone.search.adamerging import AdaMerging, AdaMergingSettings
from ecotone.search.expert_merging import EXCLUDED, ExpertMerging, ExpertMergingSettings, shares
from ecotone.search.kinds import Context
from ecotone.search.manager import Schedule
from ecotone.search.surrogates import sigmoid

pytestmark = pytest.mark.usefixtures("threads")
CPU = torch.device("cpu")
with_states = pytest.mark.parametrize("hugging_face", ["bert", "llama"], indirect=True)
GOALS = (Goal("acc"),)
NAMES = ("left", "right")
MODULE = """
import torch
from torch import nn

def net(): return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
def encoder(): return nn.Sequential(nn.Linear(4, 6), nn.Tanh())
def inputs(n=20, shift=0.0):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(3)).double() + shift
def data(n=20): return inputs(n), torch.arange(n) % 3
class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3, bias=False)
        nn.init.normal_(self.linear.weight, generator=torch.Generator().manual_seed(5))
    def forward(self, features, inputs): return self.linear(features)
def head(): return Head()
def texts():
    mask = (torch.arange(8) < torch.tensor([8, 5, 3, 6, 2])[:, None]).long()
    return {"input_ids": torch.arange(40).view(5, 8) % 31 * mask, "attention_mask": mask}
def sentences(): return texts(), torch.arange(5) % 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with the module of architectures and data."""
    (tmp_path / "distillation_tested.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "distillation_tested", raising=False)
    return tmp_path


def function(name, **arguments):
    return call(f"distillation_tested:{name}", arguments)


def wanted_of(name, expert=None, batch=16, **wanted):
    """Settings of a task that is drawn to an expert."""
    return DistillationSettings(name=name, data=call("m:f"), expert=expert, batch=batch, **wanted)


def written(folder, name="net", dtype=torch.float64):
    """Paths of a base and two experts near it."""
    import distillation_tested

    paths = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(distillation_tested, name)().to(dtype)
        for stem in ("base", *NAMES):
            paths.append(str(folder / f"{stem}.safetensors"))
            save_file(model.state_dict(), paths[-1])
            for parameter in model.parameters():
                parameter.data = parameter + torch.randn_like(parameter)
    return paths


def spec_of(folder, name="net", dtype=torch.float64, **fields):
    base, *experts = written(folder, name, dtype)
    wanted = fields.pop("wanted", {})
    tasks = tuple(
        calibration(
            expert,
            function("inputs", shift=0.5 * number),
            "distillation",
            head=function("head") if name == "encoder" else None,
            batch=6,
            **wanted,
        )
        for number, expert in enumerate(NAMES)
    )
    accuracy = objective("acc", data=function("data"), head=function("head") if name == "encoder" else None)
    options = {"calibration": tasks, "search": (accuracy,), "operator": "task_arithmetic", **fields}
    return WorkerSpec(tuple(experts), base, architecture=function(name), device="cpu", **options)


def differentiated(worker, coefficients, task="left", step=0, weight=1.0, borders=None):
    sources = worker._sources
    borders = sources.layout.tensor_borders if borders is None else borders
    trial = Trial(0, Genome(borders, coefficients), wants=Gradient.of(task, step, weight))
    (evaluation,) = worker.measure([trial])
    assert evaluation.ok, evaluation.failure
    return evaluation


# -- the loss ------------------------------------------------------------------------------------------------


def test_the_distance_of_known_logits():
    """Teacher (1/2, 1/2), student (1/4, 3/4): the cross-entropy is ln 4 / 2 + ln (4/3) / 2."""
    teacher, student = torch.zeros(1, 2), torch.tensor([[0.0, math.log(3.0)]])
    hidden = (torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0]]))
    other = (torch.tensor([[1.0, 5.0]]), torch.tensor([[2.0]]))
    expected = 0.5 * math.log(4) + 0.5 * math.log(4 / 3)
    loss, soft, apart = distance(Behaviour(student, hidden), Behaviour(teacher, other), 1.0, 10.0)
    assert soft.item() == pytest.approx(expected)
    assert apart.item() == pytest.approx((9 / 2 + 4) / 2)
    assert loss.item() == pytest.approx(expected + 10 * 4.25)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_gradient_of_the_soft_cross_entropy_is_the_formula_s(temperature):
    """T^2 d/dz = T (softmax(z/T) - softmax(z'/T)), a mean over rows."""
    generator = torch.Generator().manual_seed(0)
    z, other = torch.randn(2, 5, 4, dtype=torch.float64, generator=generator).unbind(0)
    z.requires_grad_()
    loss, _, apart = distance(Behaviour(z), Behaviour(other), temperature, 1.0)
    loss.backward()
    expected = temperature * (torch.softmax(z.detach() / temperature, -1) - torch.softmax(other / temperature, -1)) / 5
    assert torch.allclose(z.grad, expected, atol=1e-12)
    assert apart.item() == 0.0


def test_classes_that_the_expert_rules_out_leave_loss_and_gradient_finite():
    z = torch.tensor([[0.3, float("-inf"), 1.0]], requires_grad=True)
    loss, _, _ = distance(Behaviour(z), Behaviour(torch.tensor([[0.0, float("-inf"), 2.0]])), 1.0, 1.0)
    loss.backward()
    assert math.isfinite(loss.item())
    assert bool(torch.isfinite(z.grad).all())


@pytest.mark.parametrize("operator", ["task_arithmetic", "ties_vectors"])
@pytest.mark.parametrize("wanted", [{}, {"layers": ("0", "1", "2")}, {"hidden": 0.0}, {"temperature": 2.0}])
def test_the_expert_itself_has_no_hidden_distance_and_its_own_entropy(folder, wanted, operator):
    """Nothing excluded, one coefficient 1: for whatever operator the teacher is the expert as it is stored."""
    name = "net" if "layers" in wanted or "hidden" in wanted else "encoder"
    spec = spec_of(folder, name, wanted=wanted, operator=operator, settings={})
    worker = Worker(spec)
    for number, task in enumerate(NAMES):
        stored = load_file(spec.experts[number])
        model = Resident(worker._sources, spec.architecture, CPU, torch.float64).model
        model.load_state_dict(stored)
        worker._backend.expert(task)
        assert all(torch.equal(value, stored[key]) for key, value in worker._backend.model.state_dict().items())
        if operator == "ties_vectors":
            continue  # trimmed task vectors do not make the expert
        found = differentiated(worker, np.tile(np.eye(2)[number], (len(stored), 1)), task, step=1)
        stream = worker._tasks[task]
        logits = observe(model, stream.batch(1).inputs, stream._head, wanted_of(task, hidden=0.0)).logits
        temperature = wanted.get("temperature", 1.0)
        said = torch.log_softmax(logits.double() / temperature, -1)
        entropy = -(said.exp() * said).sum(-1).mean().item() * temperature**2
        assert found.details[Evaluation.detail_of(task, "hidden")] == 0.0
        assert found.scores[task] == pytest.approx(entropy, abs=1e-12)
        assert found.details[Evaluation.detail_of(task, "soft_cross_entropy")] == found.scores[task]


@pytest.mark.parametrize(("name", "wanted"), [("encoder", {"temperature": 2.0}), ("net", {"layers": ("1", "2")})])
def test_the_gradient_by_logits_is_that_of_autograd_through_sigmoid_merge_and_loss(folder, name, wanted):
    """The whole objective of a step, with its regulariser, in float64."""
    spec = spec_of(folder, name, wanted={"hidden": 0.7, **wanted})
    worker = Worker(spec)
    space = worker.space()
    settings = ExpertMergingSettings(exclude=("*bias",), clip=1e9, weights={"left": 3.0})
    search = ExpertMerging(space, NAMES, GOALS, 0, settings, [rows_of(space)])
    line = search._lines[0]
    line.start = line.start + 0.3  # away from where the regulariser has its kink
    sources, stored = worker._sources, [load_file(path) for path in (spec.base, *spec.experts)]
    raw = torch.tensor(line.adam.point, requires_grad=True)
    alpha = torch.sigmoid(raw)
    merged = {
        key: stored[0][key] + sum(alpha[s, k] * (stored[1 + k][key] - stored[0][key]) for k in range(2))
        for s, key in enumerate(sources.layout.tensors)
    }
    total = torch.zeros((), dtype=torch.float64)
    for number, task in enumerate(NAMES):
        stream = worker._tasks[task]
        model = worker._backend.expert(task)
        with torch.no_grad():
            said = observe(model, stream.batch(2).inputs, stream._head, stream._wanted)
        ours = observe(Functional(model, merged), stream.batch(2).inputs, stream._head, stream._wanted)
        loss, _, _ = distance(ours, said, stream._wanted.temperature, 0.7)
        total = total + (3.0, 1.0)[number] / 4 * loss
    learned = torch.isfinite(raw.detach())
    start = torch.sigmoid(torch.tensor(line.start))
    total = total + 5.0 * (alpha - start).abs()[learned].mean()
    total.backward()
    line.told = {
        number: (np.zeros((2, 1)), differentiated(worker, line.genome.coefficients, task, 2, weight).gradient)
        for number, (task, weight) in enumerate(zip(NAMES, (3.0, 1.0), strict=True))
    }
    found = search._gradient(line)
    assert np.abs(found).max() > 0.01
    np.testing.assert_allclose(found[learned.numpy()], raw.grad[learned].numpy(), rtol=1e-10, atol=1e-12)
    assert not found[~learned.numpy()].any()


class Functional(nn.Module):
    """A module with other weights, through which gradients pass; layers keep their names."""

    def __init__(self, module, weights):
        super().__init__()
        self._call, self._weights = module, weights

    def named_modules(self, *_):
        return self._call.named_modules()

    def forward(self, inputs):
        return torch.func.functional_call(self._call, self._weights, (inputs,))


# -- the stream and what the expert says ---------------------------------------------------------------------


def stream_of(size=10, batch=4, **fields):
    examples = Examples(torch.randn(size, 3, generator=torch.Generator().manual_seed(1)))
    return Distilled(wanted_of("a", "left", batch, hidden=0.0), examples, **fields)


@pytest.mark.parametrize(("size", "batch", "parts"), [(10, 4, 3), (10, 5, 2), (3, 1, 3), (5, 16, 1)])
def test_batches_are_cut_once_and_reordered(size, batch, parts):
    stream = stream_of(size, batch)
    batches = [tuple(map(tuple, stream.batch(step).inputs.tolist())) for step in range(4 * parts)]
    assert len(set(batches)) == parts
    for epoch in range(4):
        seen = batches[epoch * parts : (epoch + 1) * parts]
        assert len(set(seen)) == parts
        assert sum(map(len, seen)) == size
    assert {len(rows) for rows in batches} <= {math.ceil(size / parts), size // parts}
    again = [
        tuple(map(tuple, stream_of(size, batch).batch(step).inputs.tolist())) for step in reversed(range(4 * parts))
    ]
    assert again[::-1] == batches


def test_the_expert_is_asked_once_a_batch_and_not_more_than_the_memory_holds():
    asked = []

    def expert(name):
        asked.append(name)
        return nn.Identity()

    stream = stream_of(12, 3)
    for step in range(12):
        stream.prepare(step, expert)
        stream.loss(nn.Linear(3, 3), step)
    assert asked == ["left"] * 4
    row = 3 * 3 * 4
    small = stream_of(12, 3, cache_bytes=2 * row)
    steps = [0, 1, 0, 2, 0, 1]  # in the first epoch, so four distinct batches: 2 evicts 1
    asked.clear()
    for step in steps:
        small.prepare(step, expert)
        small.loss(nn.Linear(3, 3), step)
        assert sum(said.nbytes for said in small._said.values()) <= 2 * row
    assert len(asked) == 4
    tiny = stream_of(12, 3, cache_bytes=0)
    asked.clear()
    for step in (0, 0, 1):
        tiny.prepare(step, expert)
        tiny.loss(nn.Linear(3, 3), step)
    assert len(asked) == 2


def test_what_is_said_of_a_trial_does_not_depend_on_those_before(folder):
    """A worker that has seen other trials, with what experts say in its cache, gives the same bits."""
    spec = spec_of(folder, "encoder", dtype=torch.float32)
    rng = np.random.default_rng(0)
    plan = [(rng.uniform(0, 1, (2, 2)), NAMES[n % 2], int(rng.integers(0, 9))) for n in range(12)]
    used = Worker(spec)
    seen = [differentiated(used, *one) for one in plan]
    for one, before in zip(reversed(plan), reversed(seen), strict=True):
        alone = differentiated(Worker(spec), *one)
        assert alone.scores == before.scores
        assert alone.details == before.details
        assert np.array_equal(alone.gradient, before.gradient)


def test_scores_between_gradients_are_those_of_the_merge_not_of_an_expert(folder):
    spec = spec_of(folder, "encoder")
    genome = Genome(Worker(spec)._sources.layout.tensor_borders, np.full((2, 2), 0.3))
    score = Worker(spec).measure([Trial(0, genome)])[0].scores
    worker = Worker(spec)
    differentiated(worker, np.full((2, 2), 0.3))
    assert worker.measure([Trial(1, genome)])[0].scores == score


# -- Hugging Face models -------------------------------------------------------------------------------------


def hugging_spec(paths, checkpointing=False, **wanted):
    task = calibration("texts", function("texts"), "distillation", batch=5, expert="left", **wanted)
    experts = tuple(map(str, paths[1:]))
    options = {
        "names": NAMES,
        "calibration": (task,),
        "device": "cpu",
        "backend": ResidentSettings(checkpointing=checkpointing),
    }
    return WorkerSpec(experts, str(paths[0]), "task_arithmetic", architecture="auto", **options)


@with_states
@pytest.mark.parametrize("wanted", [{}, {"layers": (1, -1)}, {"layers": (1,), "hidden": 3.0}])
def test_hidden_states_and_logits_of_hugging_face_models_by_token(hugging_face, wanted):
    """Against the models called as they are, padding taken out by hand."""
    worker = Worker(hugging_spec(hugging_face, **wanted))
    tensors = len(worker._sources.layout.tensors)
    found = differentiated(worker, np.full((tensors, 2), 0.2), "texts")
    inputs = worker._tasks["texts"].batch(0).inputs
    merged = next(worker._backend.show([Genome.uniform(worker._sources.layout.size, [0.2, 0.2])]))
    with torch.no_grad():
        ours = merged(**inputs, output_hidden_states=True)
        mine = [ours.logits.clone(), *(state.clone() for state in ours.hidden_states)]
        theirs = worker._backend.expert("left")(**inputs, output_hidden_states=True)
    keep = inputs["attention_mask"].bool()
    by_token = mine[0].ndim == 3
    logits, other = (t[keep] if by_token else t for t in (mine[0], theirs.logits))
    soft = -(other.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean().item()
    layers = wanted.get("layers", [-1])
    apart = np.mean([((mine[1:][i][keep] - theirs.hidden_states[i][keep]) ** 2).mean().item() for i in layers])
    assert found.details[Evaluation.detail_of("texts", "soft_cross_entropy")] == pytest.approx(soft, rel=1e-9)
    assert found.details[Evaluation.detail_of("texts", "hidden")] == pytest.approx(apart, rel=1e-9)
    assert found.scores["texts"] == pytest.approx(soft + wanted.get("hidden", 1.0) * apart, rel=1e-9)


@with_states
def test_checkpointing_changes_neither_loss_nor_gradient(hugging_face):
    names = [name for name, _ in Worker(hugging_spec(hugging_face))._backend.model.named_modules()]
    layer = next(name for name in names if name.endswith("layers.1") or name.endswith("layer.1"))
    for wanted in ({}, {"layers": (layer,)}):
        plain, again = (Worker(hugging_spec(hugging_face, flag, **wanted)) for flag in (False, True))
        coefficients = np.full((len(plain._sources.layout.tensors), 2), 0.2)
        one, two = (differentiated(worker, coefficients, "texts") for worker in (plain, again))
        assert one.details == two.details
        assert one.details[Evaluation.detail_of("texts", "hidden")] > 0
        np.testing.assert_array_equal(one.gradient, two.gradient)


@with_states
def test_the_names_of_norms_embeddings_biases_and_heads_are_excluded(hugging_face):
    sources = Sources.open(hugging_face[1:], hugging_face[0], "task_arithmetic", NAMES)
    search = ExpertMerging(sources.space(), NAMES, GOALS, 0)
    learned = set(sources.layout.tensors) - set(search.report()["excluded"])
    assert learned
    assert all(
        name.endswith("weight") and ("attention" in name or "attn" in name or "dense" in name or "mlp" in name)
        for name in learned
    )
    assert not any("norm" in name.lower() for name in learned)


# -- coefficients --------------------------------------------------------------------------------------------


TENSORS = ("a.weight", "a.bias", "norm.weight", "b.weight")
VECTORS = np.random.default_rng(3).standard_normal((2, 24)).astype(np.float32)
BORDERS = np.array([0, 8, 10, 14, 24])
LEARNED = np.array([True, False, False, True])
TARGETS = {"left": (0.7, 0.2), "right": (0.3, 0.6)}


def space_of(vectors=VECTORS, tensors=TENSORS, borders=BORDERS):
    whole = np.array([0, borders[-1]])
    gram = GramTable.from_vectors(vectors)
    return Space(NAMES, tensors, borders, ("all",), whole, gram, np.eye(2), NAMES, None)


def rows_of(space):
    return np.random.default_rng(7).uniform(0.05, 0.9, (len(space.tensors), 2))


def search_of(space=None, **settings):
    space = space_of() if space is None else space
    settings = {"steps": 30, "check_every": 10, **settings}
    seed, starts = settings.pop("seed", 0), settings.pop("starts", None)
    return ExpertMerging(space, NAMES, GOALS, seed, ExpertMergingSettings(**settings), starts)


def measured(trial):
    """Half the squared distance to the task's target in every tensor, with noise by batch, and its gradient."""
    lengths = np.diff(trial.genome.boundaries)[:, None] / 24
    c = trial.genome.coefficients
    if trial.gradient is None:
        away = [(c - TARGETS[name]) ** 2 for name in NAMES]
        return Evaluation({"acc": -float((lengths * away[0]).sum() + (lengths * away[1]).sum())})
    task, step = trial.gradient.task, trial.gradient.step
    noise = 0.2 * np.random.default_rng([step, NAMES.index(task)]).standard_normal(2)
    away = c - TARGETS[task] + noise
    return Evaluation(
        {task: 0.5 * float((lengths * away**2).sum())},
        gradient=trial.gradient.weights[0] * lengths * away,
        details={Evaluation.detail_of(task, "diversity"): 1.0},
    )


def run(search, measure=measured, n=100):
    trials = []
    while not search.done:
        asked = search.ask(n)
        assert asked
        trials += asked
        for trial in asked:
            search.tell(trial, measure(trial), Outcome(False))
    return trials


def torch_path(steps, accumulate=1, regulariser=5.0, clip=1.0, rate=0.5, init=0.1, weights=(1.0, 1.0)):
    """Coefficients (steps + 1, 4, 2) of torch's Adam on the logits of the objective, clipped by torch."""
    raw = torch.full((2, 2), math.log(init / (1 - init)), dtype=torch.float64, requires_grad=True)
    adam, start = torch.optim.Adam([raw], lr=rate), torch.sigmoid(raw).detach()
    lengths, path = torch.tensor([8.0, 10.0]).double()[:, None] / 24, []
    for step in range(steps):
        path.append(torch.sigmoid(raw).detach().numpy().copy())
        adam.zero_grad()
        alpha = torch.sigmoid(raw)
        for again in range(accumulate):
            for number, name in enumerate(NAMES):
                noise = 0.2 * np.random.default_rng([step * accumulate + again, number]).standard_normal(2)
                away = alpha - torch.tensor(TARGETS[name]) + torch.tensor(noise)
                (weights[number] / sum(weights) / accumulate * 0.5 * (lengths * away**2).sum()).backward(
                    retain_graph=True
                )
        (regulariser * (alpha - start).abs().mean()).backward()
        torch.nn.utils.clip_grad_norm_([raw], clip)
        adam.step()
    path.append(torch.sigmoid(raw).detach().numpy().copy())
    whole = np.zeros((steps + 1, 4, 2))
    whole[:, LEARNED] = path
    return whole


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"regulariser": 0.0, "clip": 0.01, "rate": 0.1},
        {"regulariser": 0.05, "accumulate": 3, "weights": {"left": 3.0}, "init": 0.4},
    ],
)
def test_its_steps_are_those_of_torchs_adam_on_logits(settings):
    search = search_of(**settings)
    trials = run(search)
    weights = (settings.get("weights", {}).get("left", 1.0), 1.0)
    expected = torch_path(30, **{**{k: v for k, v in settings.items() if k != "weights"}, "weights": weights})
    accumulate = settings.get("accumulate", 1)
    asked = [t for t in trials if t.gradient is not None and t.gradient.task == "left"]
    assert [t.gradient.step for t in asked] == list(range(30 * accumulate))
    path = np.array([t.genome.refined(BORDERS) for t in asked[::accumulate]])
    # clip_grad_norm_ divides by norm + 1e-6, and Adam hardly minds
    assert path == pytest.approx(expected[:-1], abs=1e-4 if settings.get("clip") else 1e-6)
    assert search.report()["lines"][0]["coefficients"] == pytest.approx(expected[-1], abs=1e-4)
    assert np.abs(expected[-1] - expected[0])[LEARNED].max() > 0.01


@pytest.mark.parametrize("settings", [{}, {"regulariser": 0.4, "clip": 0.05, "init": 1.5, "rate": 0.1}])
def test_steps_of_free_coefficients_are_those_of_torchs_adam_on_the_coefficients(settings):
    """Beyond 1 and below 0, too: there is neither sigmoid nor bound."""
    search = search_of(coefficients="free", exclude=["*bias", "norm*"], steps=60, **settings)
    run(search)
    values = torch.full((2, 2), settings.get("init", 0.3), dtype=torch.float64, requires_grad=True)
    adam, start = torch.optim.Adam([values], lr=settings.get("rate", 0.02)), values.detach().clone()
    lengths = torch.tensor([8.0, 10.0]).double()[:, None] / 24
    for step in range(60):
        noises = [0.2 * np.random.default_rng([step, number]).standard_normal(2) for number in range(2)]
        away = [values - torch.tensor(TARGETS[n]) + torch.tensor(e) for n, e in zip(NAMES, noises, strict=True)]
        loss = sum(0.25 * (lengths * one**2).sum() for one in away)
        loss = loss + settings.get("regulariser", 0.0) * (values - start).abs().mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([values], settings.get("clip", math.inf))
        adam.step()
    found = search.report()["lines"][0]["coefficients"]
    assert found[LEARNED] == pytest.approx(values.detach().numpy(), abs=1e-4)
    assert (found[~LEARNED] == 0).all()
    assert np.abs(found[LEARNED] - settings.get("init", 0.3)).max() > 0.05


def test_free_coefficients_begin_with_the_published_merge_and_exclude_nothing():
    free = ExpertMergingSettings(coefficients="free")
    for around, expected in ((1.0, 1.0), (None, 0.3)):
        space = space_of()
        own = () if around is None else (Genome.uniform(space.size, np.full(space.dimension, around)),)
        search, _ = free.make(Context(space, GOALS, 0, tasks=NAMES, own=own))
        assert (search.ask(1)[0].genome.refined(BORDERS) == expected).all()
    far = [np.array([[-0.5, 1.7]] * 4)]
    assert np.array_equal(search_of(coefficients="free", starts=far).ask(1)[0].genome.coefficients, far[0])
    again = ExpertMergingSettings.model_validate(free.model_dump())
    assert again == free
    assert (again.init, again.clip, again.exclude) == (None, None, ())
    frozen = search_of(coefficients="free", exclude=["*bias", "norm*"], restarts=2, chunks=2.0)
    assert all(
        (one.genome.refined(np.union1d(BORDERS, one.genome.boundaries))[in_frozen(one)] == 0).all()
        for one in run(frozen)
    )


def test_bounded_coefficients_are_not_told_of_in_records():
    """So signatures of recipes without the field stay."""
    assert "coefficients" not in ExpertMergingSettings().model_dump()
    assert ExpertMergingSettings(coefficients="free").model_dump()["coefficients"] == "free"


def test_an_init_of_a_tenth_comes_back_through_the_logit():
    search = search_of()
    (first,) = search.ask(1)
    coefficients = first.genome.refined(BORDERS)
    assert coefficients[LEARNED] == pytest.approx(0.1, abs=1e-15)
    assert (coefficients[~LEARNED] == 0).all()
    expected = np.repeat(np.where(LEARNED, 0.1, 0.0), 2).reshape(4, 2)
    assert search.report()["lines"][0]["start"] == pytest.approx(expected, abs=1e-15)
    x = np.array([-math.inf, -800.0, -1.0, 0.0, 2.0, 800.0])
    assert sigmoid(x).tolist() == pytest.approx([0, 0, 1 / (1 + math.e), 0.5, 1 / (1 + math.exp(-2)), 1], abs=1e-15)


def test_frozen_coefficients_are_exactly_zero_throughout():
    for settings in ({}, {"restarts": 2}, {"starts": [np.full((4, 2), 0.5)]}, {"chunks": 2.0}):
        trials = run(search_of(**settings))
        for trial in trials:
            assert (trial.genome.refined(np.union1d(BORDERS, trial.genome.boundaries))[in_frozen(trial)] == 0).all()


def in_frozen(trial):
    cuts = np.union1d(BORDERS, trial.genome.boundaries)[:-1]
    return (cuts >= 8) & (cuts < 14)


def test_the_regulariser_holds_coefficients_where_they_began_and_none_lets_them_go():
    held, free = (run_to_end(regulariser=value) for value in (100.0, 0.0))
    assert np.abs(held[LEARNED] - 0.1).max() < 0.1
    assert free[LEARNED] == pytest.approx(np.tile([0.5, 0.4], (2, 1)), abs=0.1)


def run_to_end(steps=200, rate=0.02, **settings):
    search = search_of(steps=steps, rate=rate, check_every=50, **settings)
    run(search)
    return search.report()["lines"][0]["coefficients"]


def test_restarts_begin_beside_the_first_in_logits():
    search = search_of(restarts=3, spread=0.5)
    starts = [line["start"][LEARNED] for line in search.report()["lines"]]
    assert starts[0] == pytest.approx(0.1)
    logits = [np.log(start / (1 - start)) - math.log(1 / 9) for start in starts[1:]]
    assert 0.1 < np.abs(logits).mean() < 1.0
    assert not np.allclose(starts[1], starts[2])


# -- chunks --------------------------------------------------------------------------------------------------


def test_importance_is_coefficient_times_length_times_root_of_size():
    search, coefficients = search_of(), np.array([[0.5, 0.1], [0.0, 0.0], [0.0, 0.0], [0.2, 0.4]])
    expected = np.zeros(4)
    for s, (start, stop) in enumerate(pairwise(BORDERS)):
        lengths = np.linalg.norm(VECTORS[:, start:stop].astype(np.float64), axis=1)
        expected[s] = (coefficients[s] * lengths).sum() * math.sqrt(stop - start)
    assert search.importance(coefficients) == pytest.approx(expected / expected.sum())


def test_shares_are_rounded_down():
    assert shares(np.array([0.5, 0.3, 0.2, 0.0]), 10).tolist() == [5, 3, 2, 0]
    assert shares(np.array([0.55, 0.25, 0.2, 0.0]), 4).tolist() == [2, 1, 0, 0]
    assert shares(np.zeros(3), 4).tolist() == [0, 0, 0]


def test_the_second_stage_has_the_chunks_that_importance_gives():
    vectors = np.ones((2, 24), np.float32)
    vectors[:, 8:] *= 1e-3
    search = search_of(space_of(vectors), chunks=1.0, check_every=15)
    trials = run(search)
    line = search.report()["lines"][0]
    assert line["chunks"] == {"a.weight": 3, "b.weight": 0}  # floor(4 * 0.998...)
    assert line["steps"] == 60
    assert [check["step"] for check in line["checks"]] == [0, 15, 30, 45, 60]
    assert len(line["checks"]) == search.evaluations
    assert [t.gradient.step for t in trials if t.gradient and t.gradient.task == "left"] == list(range(60))
    finest = trials[-1].genome
    assert finest.boundaries.tolist() == [0, 2, 5, 8, 10, 14, 24]
    middle = next(t for t in trials if t.gradient is not None and t.gradient.step == 30).genome
    assert middle.refined(finest.boundaries)[-1].tolist() == finest.coefficients[-1].tolist()  # 0 chunks: as it was
    assert not np.allclose(finest.coefficients[:3], middle.refined(finest.boundaries)[:3])


def test_chunks_go_on_from_the_first_stage():
    """Where the second begins the merge is what it was, and one chunk a tensor is the scalar form."""
    plain, chunked = search_of(steps=20), search_of(steps=20, chunks=3.0)
    one, two = run(plain), run(chunked)
    assert [trial.genome.digest for trial in two[: len(one)]] == [trial.genome.digest for trial in one]
    after = two[len(one)]
    assert after.genome.digest == one[-1].genome.digest
    assert after.genome.segments > one[-1].genome.segments


def test_one_chunk_a_tensor_is_the_scalar_form():
    """With equal importance each gets one; from the first stage's end, it is a fresh run of plain Expert Merging."""
    vectors = np.ones((2, 24), np.float32)
    tensors, borders = ("a.weight", "b.weight"), np.array([0, 12, 24])
    search = search_of(space_of(vectors, tensors, borders), chunks=1.0, steepness=0.0, steps=20)
    trials = run(search)
    assert search.report()["lines"][0]["chunks"] == {"a.weight": 1, "b.weight": 1}
    assert all(trial.genome.boundaries.tolist() == [0, 12, 24] for trial in trials)
    second = [t for t in trials if t.gradient is not None and t.gradient.step >= 20]
    plain = search_of(space_of(vectors, tensors, borders), starts=[second[0].genome.coefficients], steps=20)
    line = plain._lines[0]
    line.start = np.full((2, 2), math.log(1 / 9))  # the regulariser still draws to the first start
    line.before, line.last = 20, 40
    fresh = [t for t in run(plain) if t.gradient is not None and t.gradient.step >= 20]
    found, expected = (np.array([t.genome.coefficients for t in trials]) for trials in (second, fresh))
    assert found == pytest.approx(expected, abs=1e-9)


def test_patience_ends_a_stage_and_the_next_begins():
    def flat(trial):
        return Evaluation({"acc": 0.5}) if trial.gradient is None else measured(trial)

    search = search_of(chunks=1.0, patience=2, check_every=5, steps=100)
    run(search, flat)
    line = search.report()["lines"][0]
    assert [check["step"] for check in line["checks"]] == [0, 5, 10, 15, 20]
    assert line["ended"] == "no better score in 2 checks"


def test_a_line_whose_first_check_fails_is_cut_once():
    first = []

    def unlucky(trial):
        if trial.gradient is None and not first:
            first.append(trial)
            return Evaluation.failed("out of memory", "once")
        return measured(trial)

    search = search_of(chunks=2.0, patience=1, steps=4, check_every=2)
    trials = run(search, unlucky)
    line = search.report()["lines"][0]
    assert line["chunks"]
    assert line["ended"].startswith(("all steps done", "no better score"))
    sizes = [len(trial.genome.coefficients) for trial in trials]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= 2


def test_it_begins_with_the_merges_that_it_is_given_to_the_last_bit():
    """So that a later stage knows them and does not pay for them again."""
    space = space_of()
    starts = [np.random.default_rng(seed).uniform(0.05, 0.95, (len(space.tensors), 2)) for seed in range(20)]
    search = search_of(space, starts=starts, exclude=[])
    asked = search.ask(1000)
    begun = [trial.genome.coefficients for trial in asked if trial.gradient is None]
    assert all(np.array_equal(found, start) for found, start in zip(begun, starts, strict=True))
    for trial in asked:
        search.tell(trial, measured(trial), Outcome(False))
    assert not np.array_equal(search.ask(1)[0].genome.coefficients, starts[0])


def test_without_chunks_for_any_tensor_it_ends_after_the_first_stage():
    search = search_of(chunks=0.2)
    run(search)
    assert search.report()["lines"][0]["steps"] == 30
    assert search.report()["lines"][0]["chunks"] == {}


def test_a_tensor_of_few_regions_has_no_more_chunks_than_regions():
    search = search_of(chunks=50.0)
    run(search)
    line = search.report()["lines"][0]
    assert line["chunks"] == {"a.weight": 8, "b.weight": 10}


# -- runs ----------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process dies."""


class Dying(SerialPool):
    """A serial pool that dies after so many batches."""

    def __init__(self, spec, batches=None):
        super().__init__(spec)
        self._left = batches

    def submit(self, batch):
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise Crash
        super().submit(batch)


def managed(spec, path, pool=None, make=ExpertMerging, **settings):
    with pool or SerialPool(spec) as open_pool:
        space = open_pool.start()
        settings = {"steps": 12, "check_every": 4, **settings}
        if make is ExpertMerging:
            search = ExpertMerging(space, NAMES, GOALS, 0, ExpertMergingSettings(**settings))
        else:
            search = AdaMerging(space.tensor_borders, 2, NAMES, GOALS, 0, AdaMergingSettings(**settings))
        schedule = Schedule(batch=2, in_flight=4)
        manager = begun(path, search, ElitistArchive(GOALS, 4), GOALS, open_pool, schedule)
        assert ended(manager) == "converged"
    return search


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_learns_and_leaves_frozen_tensors_to_the_base_bit_for_bit(folder, dtype):
    spec = spec_of(folder, "encoder", dtype)
    search = managed(spec, folder / "j.sqlite", regulariser=0.0, steps=15, check_every=5, chunks=2.0)
    line = search.report()["lines"][0]
    first, last = line["checks"][0]["losses"], line["checks"][-1]["losses"]
    assert sum(last.values()) < 0.9 * sum(first.values())
    worker = Worker(spec)
    merged = next(worker._backend.show([search._lines[0].genome])).state_dict()
    base = load_file(spec.base)
    assert torch.equal(merged["0.bias"], base["0.bias"])
    assert not torch.equal(merged["0.weight"], base["0.weight"])


def test_killed_anywhere_and_resumed_it_has_the_same_coefficients_to_the_last_bit(folder):
    spec, settings = spec_of(folder, "encoder"), {"chunks": 2.0, "restarts": 2}
    through = managed(spec, folder / "whole" / "j.sqlite", **settings)
    bits = json.dumps(through.report(), default=np.ndarray.tolist)
    for batches in (3, 20, 33, 41):
        path = folder / str(batches) / "j.sqlite"
        with pytest.raises(Crash):
            managed(spec, path, Dying(spec, batches), **settings)
        found = json.dumps(managed(spec, path, **settings).report(), default=np.ndarray.tolist)
        assert found == bits


@pytest.mark.parametrize("at", [1, 40, 66, 75, 130])
def test_restored_in_the_middle_it_goes_on_the_same(at):
    settings = {"chunks": 2.0, "accumulate": 2, "steps": 10, "check_every": 4}
    through, resumed, flying = search_of(**settings), search_of(**settings), []

    def driven(search, flying, count):
        for _ in range(count):
            flying += search.ask(min(2, 5 - len(flying)))
            if flying:
                trial = flying.pop(len(flying) // 2)
                search.tell(trial, measured(trial), Outcome(False))
        return flying

    driven(through, flying, at)
    resumed.restore(through.state())
    again = list(flying)
    for search, one in ((through, flying), (resumed, again)):
        driven(search, one, 400)
        assert search.done
    assert json.dumps(resumed.report(), default=np.ndarray.tolist) == json.dumps(
        through.report(), default=np.ndarray.tolist
    )


def test_adamerging_learns_from_labels(folder):
    """The supervised path: cross-entropy on labelled batches, the same machinery."""
    spec = spec_of(folder)
    labelled = tuple(calibration(name, function("data"), "cross_entropy", batch=10) for name in NAMES)
    spec = WorkerSpec(**{**vars(spec), "calibration": labelled})
    search = managed(spec, folder / "j.sqlite", make=AdaMerging, rate=0.05, steps=40, check_every=20)
    checks = search.report()["lines"][0]["checks"]
    assert sum(checks[-1]["losses"].values()) < sum(checks[0]["losses"].values()) - 0.1
    sources = Sources.open(spec.experts, spec.base, "task_arithmetic")
    import distillation_tested

    model = distillation_tested.net().double()
    inputs, labels = distillation_tested.data()
    losses = []
    for genome in (Genome.uniform(sources.layout.size, [0.3, 0.3]), search._lines[0].genome):
        model.load_state_dict({k: v[0] for k, v in sources.stack([genome], torch.float64).items()})
        losses.append(nn.functional.cross_entropy(model(inputs), labels).item())
    assert losses[1] < losses[0] - 0.05  # on all examples, computed without any of the machinery


def test_batches_may_be_accumulated_in_adamerging_too():
    """Two batches a step are one of twice the size."""

    def linear(trial):
        if trial.gradient is None:
            return Evaluation({"acc": 0.0})
        c, step = trial.genome.coefficients, trial.gradient.step
        return Evaluation({trial.gradient.task: float(step)}, gradient=c - np.array([0.0, 1.0]) * (step % 2))

    settings = {"steps": 30, "check_every": 10, "rate": 0.05}
    whole = np.array([0, 24])
    search = AdaMerging(whole, 2, ("left",), GOALS, 0, AdaMergingSettings(accumulate=2, **settings))
    trials = run(search, linear)
    steps = [t.gradient.step for t in trials if t.gradient is not None]
    assert steps == list(range(60))

    def mean(trial):
        if trial.gradient is None:
            return Evaluation({"acc": 0.0})
        return Evaluation({"left": 0.0}, gradient=trial.genome.coefficients - np.array([0.0, 0.5]))

    plain = AdaMerging(whole, 2, ("left",), GOALS, 0, AdaMergingSettings(**settings))
    run(plain, mean)
    ours, theirs = (s.report()["lines"][0] for s in (search, plain))
    assert ours["coefficients"] == pytest.approx(theirs["coefficients"], abs=1e-12)
    assert [check["losses"]["left"] for check in ours["checks"]] == [0.5, 11.5, 31.5, 50.5]


# -- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init": 0.0}, "init: expected more than 0 and less than 1, found 0; or use coefficients: free"),
        ({"init": 1.0}, "init: expected more than 0 and less than 1, found 1; or use coefficients: free"),
        ({"init": None}, "init: expected more than 0 and less than 1, found null; or use coefficients: free"),
        ({"coefficients": "loose"}, "coefficients\n  Input should be 'bounded' or 'free'"),
        ({"regulariser": -1.0}, "regulariser\n  Input should be greater than or equal to 0"),
        ({"clip": 0.0}, "clip\n  Input should be greater than 0"),
        ({"chunks": 0.0}, "chunks\n  Input should be greater than 0"),
        ({"chunks": math.inf}, "chunks\n  Input should be a finite number"),
        ({"steepness": -0.1}, "steepness\n  Input should be greater than or equal to 0"),
        ({"rate": 0.0}, "rate\n  Input should be greater than 0"),
        ({"accumulate": 0}, "accumulate\n  Input should be greater than or equal to 1"),
        ({"granularity": "block"}, "granularity\n  Input should be 'tensor'"),
        ({"groups": 2}, "groups\n  Input should be 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ValidationError) as caught:
        ExpertMergingSettings(**settings)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"exclude": ["*"]}, "search.exclude: all 4 tensors are excluded"),
        ({"exclude": ["*bias", "a.wieght"]}, "'a.wieght' matches no tensor. Did you mean 'a.weight'?"),
        ({"starts": [np.zeros((3, 2))]}, "search.start: expected coefficients of shape (4, 2)"),
    ],
)
def test_mistakes_are_refused_in_words(settings, words):
    with pytest.raises(InputError) as caught:
        search_of(**settings)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "wanted", "words"),
    [
        ("net", {"expert": "lift"}, "calibration 'left': expert: expected one of left, right, found 'lift'."),
        ("net", {}, "calibration 'left': layers: the model's outputs are its logits"),
        ("net", {"layers": (1,)}, "layers: expected names of modules (no Hugging Face model), found 1"),
        ("net", {"layers": ("1", "7")}, "layers: the model has no module '7'"),
    ],
)
def test_tasks_that_cannot_be_distilled_are_refused_before_the_first_batch(folder, name, wanted, words):
    spec = spec_of(folder, name)
    tasks = tuple(calibration("left", task.data, "distillation", **wanted) for task in spec.calibration[:1])
    with pytest.raises(InputError) as caught:
        Worker(WorkerSpec(**{**vars(spec), "calibration": tasks}))
    assert words in str(caught.value)


@with_states
def test_a_position_beyond_the_hidden_states_is_refused_before_the_first_batch(hugging_face):
    with pytest.raises(InputError, match="calibration 'texts': layers: expected a position among 4 hidden states, fou"):
        Worker(hugging_spec(hugging_face, layers=(7,)))


def test_a_layer_that_gives_no_tensor_fails_in_words():
    class Odd(nn.Module):
        def forward(self, x):
            return {"x": x}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.idle = Odd(), nn.Identity()

        def forward(self, x):
            return self.odd(x)["x"]

    for layer, words in (("odd", "odd: expected a tensor of real numbers"), ("idle", "did not use its module 'idle'")):
        with pytest.raises(InputError, match=words):
            observe(Model(), torch.zeros(2, 3), None, wanted_of("left", layers=(layer,)))


def test_a_task_without_more_words_is_drawn_to_the_expert_of_its_name():
    task = calibration("left", function("inputs"), "distillation", hidden=0.0)
    assert (task.expert, task.teacher) == (None, "left")
    task.build(context(torch.float32), 0).fits(nn.Linear(4, 3), ["right", "left"])


# -- what it says of itself ----------------------------------------------------------------------------------


def test_settings_make_the_search_they_describe():
    settings = ExpertMergingSettings(steps=8, check_every=4, restarts=2, chunks=1.5, archive=3)
    context = Context(space_of(), GOALS, 5, tasks=NAMES)
    search, population = settings.make(context)
    assert search.settings is settings
    assert (search.tasks, search.seed, population.capacity) == (NAMES, 5, 3)
    assert settings.describe(search, context) == "; 2 x 16 steps on 2 tasks, scored 10 times"
    assert settings.describe(None, context) == ""
    assert sum(trial.gradient is None for trial in run(search)) == 10
    assert settings.needs().gradients
    assert settings.needs().affine


def test_settings_begin_with_given_merges():
    start = Genome(BORDERS, np.where(LEARNED[:, None], rows_of(space_of()), 0.0))
    search, _ = ExpertMergingSettings().make(Context(space_of(), GOALS, 0, tasks=NAMES, starts=(start,)))
    assert search.ask(1)[0].genome.digest == start.digest


def test_with_chunks_its_segments_may_be_any():
    space = space_of()
    plain, chunked = ExpertMergingSettings(), ExpertMergingSettings(chunks=1.0)
    assert (plain.fineness(), chunked.fineness()) == ("tensor", "element")
    assert plain.borders(space).tolist() == BORDERS.tolist()
    assert chunked.borders(space).tolist() == list(range(25))
    trials = run(chunked.make(Context(space, GOALS, 0, tasks=NAMES))[0])
    assert not all(np.isin(trial.genome.boundaries, BORDERS).all() for trial in trials)
    assert all(np.isin(trial.genome.boundaries, chunked.borders(space)).all() for trial in trials)


@pytest.mark.parametrize(
    ("operator", "needs_base", "losses", "words"),
    [
        (
            "linear",
            False,
            ["distillation"],
            "merge.operator: expert_merging leaves tensors as the base has them, found l",
        ),
        ("task_arithmetic", True, ["entropy"], "found loss entropy alone; say loss: distillation"),
        (
            "task_arithmetic",
            True,
            ["entropy", "cross_entropy", "entropy"],
            "found loss cross_entropy and entropy alone",
        ),
        ("task_arithmetic", True, ["entropy", "distillation"], ""),
    ],
)
def test_what_does_not_fit_it_is_refused(operator, needs_base, losses, words):
    settings = ExpertMergingSettings()
    tasks = [calibration(f"task {i}", function("inputs"), loss) for i, loss in enumerate(losses)]
    if not words:
        settings.check(operator, needs_base, tasks)
        return
    with pytest.raises(ValueError, match=words):
        settings.check(operator, needs_base, tasks)


# -- recipes -------------------------------------------------------------------------------------------------


def record(**changes):
    data = {"call": "distillation_tested:inputs"}
    task = {"name": "left", "data": data, "loss": "distillation", "hidden": 0.0}
    return {
        "name": "tested",
        "models": {
            "base": "base.safetensors",
            "experts": ["left.safetensors", "right.safetensors"],
            "architecture": {"call": "distillation_tested:net"},
        },
        "merge": {"operator": "task_arithmetic"},
        "objectives": {"search": [{"name": "acc", "type": "accuracy", "data": data}]},
        "budget": {"evaluations": 10},
        "calibration": [task, {**task, "name": "all", "expert": "right", "temperature": 2.0, "layers": ["0", 1]}],
        "search": {"algorithm": "expert_merging"},
        **changes,
    }


def test_a_recipe_becomes_specs_and_a_search(folder):
    base, left, right = written(folder)
    models = {"base": base, "experts": [left, right], "architecture": {"call": "distillation_tested:net"}}
    search = {"algorithm": "expert_merging", "chunks": 1.2, "steps": 40, "check_every": 20, "accumulate": 2}
    recipe = Recipe.from_record(record(models=models, search=search))
    assert Recipe.from_record(recipe.record()).signature == recipe.signature
    first, second = compose.worker_spec(recipe, None).calibration
    data = function("inputs")
    assert first == DistillationSettings(name="left", data=data, hidden=0.0)
    assert second == DistillationSettings(
        name="all", data=data, expert="right", temperature=2.0, hidden=0.0, layers=("0", 1)
    )
    assert [task.teacher for task in (first, second)] == ["left", "right"]
    sources = Sources.open([left, right], base, "task_arithmetic")
    made, _ = compose.make_search(recipe, sources.space())
    assert isinstance(made, ExpertMerging)
    settings = made.settings
    assert (settings.steps, settings.chunks, settings.accumulate, made.evaluations) == (40, 1.2, 2, 5)
    (checked,) = compose.check_search(recipe, sources)
    assert checked.coefficients is not None
    assert checked.coefficients[0] == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"merge": {"operator": "linear"}}, "merge.operator: expert_merging leaves tensors as the base has them"),
        ({"calibration": []}, "calibration: expert_merging learns on tasks given there, found none"),
        (
            {"calibration": [{"name": "left", "data": {"call": "a:b"}}]},
            "expert_merging learns to be like the experts, found loss entropy alone; say loss: distillation",
        ),
        (
            {"calibration": [{"name": "left", "data": {"call": "a:b"}, "temperature": 2.0}]},
            "temperature: belongs to loss: distillation, found loss: entropy",
        ),
        (
            {"calibration": [{"name": "left", "data": {"call": "a:b"}, "loss": "distillation", "hidden": -1.0}]},
            "calibration[0].hidden: input should be greater than or equal to 0, found -1.0.",
        ),
        (
            {"calibration": [{"name": "left", "data": {"call": "a:b"}, "loss": "distillation", "temperature": 0}]},
            "calibration[0].temperature: input should be greater than 0, found 0.",
        ),
        (
            {"calibration": [{"name": "left", "data": {"call": "a:b"}, "loss": "distilation"}]},
            "calibration[0].loss: expected one of entropy, cross_entropy, distillation, found 'distilation'. "
            "Did you mean 'distillation'?",
        ),
        (
            {"calibration": [{"name": "left", "data": {"call": "a:b"}, "loss": "distillation", "temprature": 2}]},
            "calibration[0].temprature: unknown key. Did you mean 'temperature'?",
        ),
        ({"search": {"algorithm": "expert_merging", "clamp": True}}, "search.clamp: unknown key"),
        ({"search": {"algorithm": "expert_merging", "granularity": "block"}}, "search.granularity"),
        ({"search": {"algorithm": "expert_merging", "init": 1.0}}, "init: expected more than 0"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(InputError) as caught:
        Recipe.from_record(record(**changes))
    assert words in str(caught.value)


def test_an_unknown_expert_is_known_before_the_models_are():
    recipe = Recipe.from_record(record(search={"algorithm": "expert_merging"}))
    assert compose.check_search(recipe)[0].coefficients is None
    task = record()["calibration"][0]
    for changes, words in (
        (
            {"name": "first"},
            "calibration 'first': expert: expected one of left, right, found 'first'. Say which expert",
        ),
        ({"expert": "rihgt"}, "found 'rihgt'. Did you mean 'right'?"),
    ):
        with pytest.raises(InputError) as caught:
            compose.check_search(Recipe.from_record(record(calibration=[task | changes])))
        assert words in str(caught.value)


def test_the_ready_recipe():
    """Each task is drawn to the expert of its name, and what a complete run needs is within its budget."""
    file = Path(__file__).parents[1] / "experiments" / "recipes" / "digits-expert-merging.yaml"
    recipe = Recipe.from_yaml(file)
    assert compose.check_search(recipe)[0].coefficients is None
    worker = compose.worker_spec(recipe, Path("prepared"))
    assert [task.teacher for task in worker.calibration] == [task.name for task in recipe.calibration]
    made, _ = compose.make_search(recipe, space_of())
    assert made.evaluations == 7 <= recipe.budget.evaluations


def test_default_patterns_are_names_in_lower_case():
    assert all(pattern == pattern.lower() for pattern in EXCLUDED)


# -- CUDA ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_losses_and_gradients_of_the_cpu(folder):
    spec = spec_of(folder, "encoder")
    here, there = (Worker(WorkerSpec(**{**vars(spec), "device": device})) for device in ("cpu", "cuda"))
    for task in NAMES:
        one, two = (differentiated(worker, np.full((2, 2), 0.3), task, 1) for worker in (here, there))
        assert two.scores[task] == pytest.approx(one.scores[task], rel=1e-9)
        np.testing.assert_allclose(two.gradient, one.gradient, rtol=1e-8)
        assert all(tensor.device == CPU for tensor in there._tasks[task]._said.popitem()[1].hidden)
