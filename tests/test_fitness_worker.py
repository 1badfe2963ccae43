"""The worker: known scores, candidates that fail alone, architectures that do not fit, and equal paths."""

import sys

import numpy as np
import pytest
import torch
from parts import call, objective
from safetensors.torch import save_file, save_model
from torch import nn

from ecotone.fitness.backends import resident
from ecotone.fitness.backends.resident import Resident
from ecotone.fitness.objectives import Accuracy
from ecotone.fitness.protocol import Score
from ecotone.fitness.specs import WorkerSpec
from ecotone.fitness.worker import Worker
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome
from ecotone.populations.trial import Scores, Trial

pytestmark = pytest.mark.usefixtures("threads")
MODULE = """
import torch
from torch import nn

def net(hidden=5, inputs=4): return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 3))
def norm_net(): return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
def deeper(): return nn.Sequential(*net(), nn.Linear(3, 3))
def nothing(): return {}
class Tied(nn.Module):
    def __init__(self, tie):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        if tie: self.second.weight = self.first.weight
    def forward(self, x): return self.second(self.first(x))
def tied(tie=True): return Tied(tie)

def data(n=40):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)

def first(model): return float(model["w"][0])
def total(model): return sum(float(t.double().sum()) for t in model.state_dict().values())
def names(model): return float(len(model))
def counts(model): return float(model["counter"].sum())
def spoils(model):
    value = float(model["w"].sum())
    model["w"].zero_()
    return value
def fails(model):
    value = float(model["w"][0])
    if value == 1: raise ValueError("one is not allowed\\nsecond line")
    if value == 2: return float("nan")
    if value == 3: raise MemoryError("too big")
    if value == 4: raise SystemExit(2)
    if value == 5: return "five"
    if value == 6: raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
    return value
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with two small nets, two vectors, and the module of architectures and objectives."""
    (tmp_path / "worker_tested.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "worker_tested", raising=False)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
        save_file(net.state_dict(), tmp_path / f"{name}.safetensors")
        w = torch.zeros(6)
        w[seed] = 1.0
        save_file({"w": w, "counter": torch.tensor([7, 8])}, tmp_path / f"v{name}.safetensors")
    return tmp_path


def accuracy(name="acc", **arguments):
    return objective(name, data=call("worker_tested:data", arguments))


def function(name, path):
    return objective(name, "call", call=f"worker_tested:{path}")


def nets(folder, **fields):
    fields.setdefault("architecture", call("worker_tested:net"))
    fields.setdefault("search", (accuracy(),))
    return WorkerSpec((str(folder / "a.safetensors"), str(folder / "b.safetensors")), device="cpu", **fields)


def vectors(folder, *objectives, **fields):
    paths = (str(folder / "va.safetensors"), str(folder / "vb.safetensors"))
    return WorkerSpec(paths, search=objectives, device="cpu", **fields)


def trials(size, *firsts, second=0.0):
    return [Trial(i, Genome.uniform(size, [first, second])) for i, first in enumerate(firsts)]


# -- scores --------------------------------------------------------------------------------------------------


def test_a_module_is_scored_with_the_merged_weights(folder):
    worker = Worker(nets(folder, held_out=(accuracy("test", n=20),)))
    a, b = (Sources.open([folder / f"{n}.safetensors"]).stack([Genome.uniform(43, [1.0])]) for n in "ab")
    import worker_tested

    inputs, labels = worker_tested.data()
    for weight in (0.0, 0.3, 1.0):
        module = worker_tested.net()
        module.load_state_dict({name: weight * a[name][0] + (1 - weight) * b[name][0] for name in a})
        right = (module(inputs).argmax(-1) == labels).numpy()
        [evaluation] = worker.measure([Trial(0, Genome.uniform(43, [weight, 1 - weight]))])
        assert evaluation.ok
        assert evaluation.scores == {"acc": right.mean()}
        assert np.array_equal(evaluation.per_example["acc"], right)
        assert evaluation.items == 40
        assert evaluation.seconds > 0


def test_subsets_have_their_own_objectives(folder):
    worker = Worker(nets(folder, held_out=(accuracy("test", n=20),)))
    genome = Genome.uniform(43, [1.0, 0.0])
    search, held_out = worker.measure([Trial(0, genome), Trial(1, genome, wants=Scores("held_out"))])
    assert set(search.scores) == {"acc"}
    assert set(held_out.scores) == {"test"}
    assert held_out.items == 20


def test_without_an_architecture_objectives_get_the_tensors(folder):
    worker = Worker(vectors(folder, function("first", "first"), function("names", "names"), function("n", "counts")))
    [one, two] = worker.measure(trials(6, 2.5, -1.0))
    assert one.scores == {"first": 2.5, "names": 2.0, "n": 15.0}
    assert two.scores == {"first": -1.0, "names": 2.0, "n": 15.0}


def test_no_trials_no_evaluations(folder):
    assert Worker(nets(folder)).measure([]) == []


def test_the_space_is_that_of_the_sources(folder):
    space = Worker(nets(folder, dense=True)).space()
    assert space.size == 43
    assert space.vectors is not None
    assert space.vectors.shape == (2, 43)
    assert Worker(nets(folder)).space().vectors is None


def evaluated(worker, genomes):
    return [
        (dict(e.scores), [p.tolist() for p in e.per_example.values()])
        for e in worker.measure([Trial(i, genome) for i, genome in enumerate(genomes)])
    ]


def some_genomes(count):
    rng = np.random.default_rng(0)
    return [Genome(np.array([0, 11, 43]), rng.normal(size=(2, 2))) for _ in range(count)]


def test_a_score_does_not_depend_on_the_batch_or_on_what_came_before(folder):
    worker, genomes = Worker(nets(folder)), some_genomes(9)
    together = evaluated(worker, genomes)
    assert [evaluated(worker, [genome])[0] for genome in reversed(genomes)] == together[::-1]


@pytest.mark.parametrize("stack_bytes", [0, 200, 500])
def test_models_too_large_to_stack_score_the_same(folder, monkeypatch, stack_bytes):
    genomes = some_genomes(5)
    expected = evaluated(Worker(nets(folder)), genomes)
    monkeypatch.setattr(resident.Resident.__init__, "__defaults__", (None, stack_bytes))
    worker = Worker(nets(folder))
    assert worker._backend.group == max(1, stack_bytes // 172)
    assert evaluated(worker, genomes) == expected


def test_a_model_may_be_held_in_another_type(folder):
    worker = Worker(nets(folder, dtype="bfloat16"))
    [evaluation] = worker.measure([Trial(0, Genome.uniform(43, [1.0, 0.0]))])
    assert evaluation.ok
    assert worker._backend.dtype == torch.bfloat16


def test_threads_are_the_specs(folder):
    Worker(nets(folder, threads=2))
    assert torch.get_num_threads() == 2
    Worker(nets(folder, threads=1))
    assert torch.get_num_threads() == 1


def test_folders_of_the_spec_are_on_the_path(folder, monkeypatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(folder)])
    with pytest.raises(InputError, match="no module named 'worker_tested'"):
        Worker(nets(folder))
    Worker(nets(folder, sys_path=(str(folder),)))
    assert sys.path.count(str(folder)) == 1


# -- trying out ----------------------------------------------------------------------------------------------


def test_trying_out_asks_one_example_of_each_objective_and_one_score_of_each_function(folder, monkeypatch):
    import worker_tested

    asked = []
    scored = Accuracy.score
    monkeypatch.setattr(Accuracy, "score", lambda self, model: asked.append(self.count) or scored(self, model))
    monkeypatch.setattr(worker_tested, "total", lambda model: asked.append("total") or 1.0)
    worker = Worker(nets(folder, search=(accuracy(), function("f", "total")), held_out=(accuracy("test", n=20),)))
    worker.try_out()
    assert asked == [1, "total", 1]
    [evaluation] = worker.measure(trials(43, 1.0))
    [other] = Worker(nets(folder)).measure(trials(43, 1.0))
    assert evaluation.scores["acc"] == other.scores["acc"]
    assert asked[-3:] == [40, "total", 40]


def test_it_is_the_first_expert_that_is_tried_out(folder, monkeypatch):
    import worker_tested

    seen = []
    monkeypatch.setattr(worker_tested, "first", lambda model: seen.append(model["w"].tolist()) or 0.0)
    Worker(vectors(folder, function("f", "first"))).try_out()
    assert seen == [[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]


NUMBER = "expected the function to return a number or (number, scores by example), found"


@pytest.mark.parametrize("group", ["search", "held_out"])
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return None", "expected the function to return a number or (number, scores by example), found NoneType."),
        (
            "return '0.5'",
            "expected the function to return a number or (number, scores by example), found the text '0.5'.",
        ),
        (
            "return model['w']",
            "expected the function to return a number or (number, scores by example), found a tensor of shape (6,).",
        ),
        ("return [0.5]", "expected the function to return a number or (number, scores by example), found list."),
        ("return 1.0, [[1.0]]", "expected scores by example of shape (N,), numbers or bools, found (1, 1) of float64."),
        ("return float('nan')", "expected a finite score, found nan; the merged weights are finite."),
        (
            "return 1.0, [0.5, float('inf')]",
            "expected finite scores by example, found inf at example 1 (1 of 2 are not finite); the merged weights "
            "are finite.",
        ),
        ("import surely_not_installed", "ModuleNotFoundError: No module named 'surely_not_installed'"),
        ("return model.w", "AttributeError: 'dict' object has no attribute 'w'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("return len(model['w'], 2)", "TypeError: len() takes exactly one argument (2 given)"),
    ],
)
def test_an_objective_that_cannot_be_computed_is_found_before_the_search(folder, monkeypatch, group, body, words):
    (folder / "tried_out.py").write_text(f"def score(model):\n    {body}\n")
    monkeypatch.delitem(sys.modules, "tried_out", raising=False)
    wrong = objective("wrong", "call", call="tried_out:score")
    fields = {"search": (function("fine", "first"),), "held_out": ()}
    paths = tuple(str(folder / f"v{name}.safetensors") for name in "ab")
    worker = Worker(WorkerSpec(paths, device="cpu", **{**fields, group: (*fields[group], wrong)}))
    with pytest.raises(InputError) as caught:
        worker.try_out()
    assert caught.value.message.splitlines()[0] == f"objective 'wrong': {words}"
    assert caught.value.remedy == "It was tried out on the first expert, before any of the budget is spent."


@pytest.mark.parametrize("answer", [1.0, None, "good", Score("a")])
def test_what_is_no_score_is_refused(folder, monkeypatch, answer):
    monkeypatch.setattr(Accuracy, "score", lambda self, model: answer)
    with pytest.raises(InputError) as caught:
        Worker(nets(folder)).try_out()
    said = f"the objective: score(): expected a Score whose value is a number, found {answer!r}."
    assert caught.value.message.startswith(f"objective 'acc': {said}")


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("few", "expected an output for each label from 0 to 2, found 2 outputs."),
        ("flat", "expected the head's logits of shape (1, classes), one row an example, found Tensor (3,)."),
        ("broken", "RuntimeError: mat1 and mat2 shapes cannot be multiplied (1x3 and 7x3)"),
    ],
)
def test_a_head_that_does_not_fit_is_found_with_one_example(folder, head, words):
    (folder / "heads_tried_out.py").write_text(
        "import torch\n"
        "def few(): return lambda outputs, inputs: outputs[:, :2]\n"
        "def flat(): return lambda outputs, inputs: outputs[0]\n"
        "def broken(): return lambda outputs, inputs: outputs @ torch.zeros(7, 3)\n"
    )
    settings = objective("acc", data=call("worker_tested:data"), head=call(f"heads_tried_out:{head}"))
    with pytest.raises(InputError) as caught:
        Worker(nets(folder, search=(settings,))).try_out()
    assert caught.value.message.splitlines()[0] == f"objective 'acc': {words}"


# -- candidates that fail ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack_bytes", [0, 1 << 20])
def test_a_candidate_fails_alone_and_says_why(folder, monkeypatch, stack_bytes):
    monkeypatch.setattr(resident.Resident.__init__, "__defaults__", (None, stack_bytes))
    worker = Worker(vectors(folder, function("f", "fails")))
    fine, raised, nan, memory, exits, text, allocation, last = worker.measure(trials(6, 0, 1, 2, 3, 4, 5, 6, 7))
    assert fine.scores == {"f": 0.0}
    assert last.scores == {"f": 7.0}
    assert raised.failure.kind == "exception"
    assert raised.failure.message == "objective 'f': ValueError: one is not allowed"
    assert "in fails" in raised.failure.details
    assert nan.failure.kind == "not finite"
    assert nan.failure.message == "objective 'f': expected a finite score, found nan; the merged weights are finite."
    assert memory.failure.kind == allocation.failure.kind == "out of memory"
    assert exits.failure.message == "objective 'f': SystemExit: 2"
    assert text.failure.message.startswith("objective 'f': expected the function to return a number")
    assert not any(e.scores or e.ok for e in (raised, nan, memory, exits, text, allocation))


def test_weights_that_overflow_are_named(folder):
    worker = Worker(nets(folder))
    vector = np.zeros(43, np.float32)
    vector[20] = np.nan
    broken, fine = worker.measure([Trial(0, Genome.dense(vector, 2)), Trial(1, Genome.uniform(43, [1.0, 0.0]))])
    assert broken.failure.kind == "not finite"
    assert "the merged weights hold NaN or infinity (0.weight)" in broken.failure.message
    assert fine.ok


def test_a_genome_of_another_size_fails_alone(folder):
    worker = Worker(nets(folder))
    wrong, fine = worker.measure([Trial(0, Genome.uniform(42, [1.0, 0.0])), Trial(1, Genome.uniform(43, [1.0, 0.0]))])
    assert wrong.failure.kind == "exception"
    assert wrong.failure.message.startswith("merging: genome: expected 43 parameters, found 42")
    assert fine.ok


@pytest.mark.parametrize("stack_bytes", [0, 1 << 20])
def test_an_objective_that_spoils_the_weights_harms_no_other_candidate(folder, monkeypatch, stack_bytes):
    monkeypatch.setattr(resident.Resident.__init__, "__defaults__", (None, stack_bytes))
    worker = Worker(vectors(folder, function("f", "spoils")))
    for _ in range(2):
        assert [e.scores["f"] for e in worker.measure(trials(6, 1, 2, 3))] == [1.0, 2.0, 3.0]


# -- what cannot be opened -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"architecture": call("worker_tested:net", {"hidden": 6})},
            "0.bias: expected shape \\(5,\\).*found \\(6,\\)",
        ),
        (
            {"architecture": call("worker_tested:deeper")},
            "its tensor '3.weight' of shape \\(3, 3\\) is in no check",
        ),
        ({"architecture": call("worker_tested:tied")}, "expected a tensor '0.bias' of shape \\(5,\\)"),
        ({"architecture": call("worker_tested:nothing")}, "to return a torch module, found dict"),
        ({"architecture": call("worker_tested:nett")}, "architecture: .*Did you mean 'net'"),
        ({"architecture": "auto"}, "'auto' needs a config.json"),
        ({"architecture": "net"}, "architecture: expected 'auto' or a function, found 'net'"),
        ({"dtype": "float33"}, "dtype: expected float32.*found 'float33'"),
        ({"dtype": "int8"}, "dtype: expected float32"),
    ],
)
def test_architectures_that_do_not_fit(folder, fields, words):
    with pytest.raises(InputError, match=words):
        Worker(nets(folder, **fields))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_refused():
    with pytest.raises(InputError, match="expected a CUDA device, found none"):
        Worker(WorkerSpec(("nothing",), device="cuda"))


# -- the resident model --------------------------------------------------------------------------------------


def shown(sources, architecture, genomes, **options):
    made = Resident(sources, architecture, torch.device("cpu"), **options)
    for model in made.show(genomes):
        state = model if isinstance(model, dict) else model.state_dict()
        yield {name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize("stack_bytes", [0, 1 << 20])
def test_running_means_are_merged_and_counters_are_restored(folder, tmp_path, stack_bytes):
    import worker_tested

    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        net = worker_tested.norm_net()
        net(torch.randn(30, 4) + seed)
        paths.append(tmp_path / f"norm{seed}.safetensors")
        save_file(net.state_dict(), paths[-1])
    sources = Sources.open(paths)
    genomes = [Genome.uniform(sources.layout.size, [0.25, 0.75]), Genome.uniform(sources.layout.size, [1.0, 0.0])]
    made = Resident(sources, call("worker_tested:norm_net"), torch.device("cpu"), None, stack_bytes)
    means = []
    for model in made.show(genomes):
        means.append(model[1].running_mean.clone())
        assert int(model[1].num_batches_tracked) == 1
        model[1].num_batches_tracked += 5
    stack = sources.stack(genomes)
    assert torch.equal(torch.stack(means), stack["1.running_mean"])


@pytest.mark.parametrize("stack_bytes", [0, 1 << 20])
@pytest.mark.parametrize("tie", [True, False])
def test_tied_weights_get_the_same_values_whether_or_not_the_architecture_ties_them(folder, tmp_path, tie, stack_bytes):
    import worker_tested

    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        paths.append(tmp_path / f"tied{seed}.safetensors")
        save_model(worker_tested.tied(), str(paths[-1]))
    sources = Sources.open(paths)
    assert sources.layout.size == 16
    genomes = [Genome.uniform(16, [0.5, 0.5]), Genome.uniform(16, [0.0, 1.0])]
    stack = next(iter(sources.stack(genomes).values()))
    found = list(shown(sources, call("worker_tested:tied", {"tie": tie}), genomes, stack_bytes=stack_bytes))
    for state, expected in zip(found, stack, strict=True):
        assert torch.equal(state["first.weight"], expected)
        assert torch.equal(state["second.weight"], expected)
    for state, expected in zip(shown(sources, None, genomes, stack_bytes=stack_bytes), stack, strict=True):
        assert torch.equal(state["first.weight"], expected)
        assert torch.equal(state["second.weight"], expected)


def test_hugging_face_directories(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    tokens = torch.arange(10)[None]
    outputs = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config).eval()
        model.save_pretrained(tmp_path / f"hf{seed}")
        outputs.append(model(tokens).logits)
    sources = Sources.open([tmp_path / "hf0", tmp_path / "hf1"])
    size = sources.layout.size
    made = Resident(sources, "auto", torch.device("cpu"))
    genomes = [Genome.uniform(size, [1.0, 0.0]), Genome.uniform(size, [0.0, 1.0])]
    for model, expected in zip(made.show(genomes), outputs, strict=True):
        assert torch.equal(model(tokens).logits, expected)
    for model, expected in zip(
        Resident(sources, "auto", torch.device("cpu"), None, 0).show(genomes), outputs, strict=True
    ):
        assert torch.equal(model(tokens).logits, expected)
    reread = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf0").eval()
    assert torch.equal(reread(tokens).logits, outputs[0])


def test_an_architecture_that_transformers_lacks_is_named(tmp_path):
    pytest.importorskip("transformers")
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": ["MyOwnModel"], "model_type": "mine"}')
    with pytest.raises(InputError, match=r"has no 'MyOwnModel'.*[Gg]ive the architecture as a function"):
        Resident(Sources.open([tmp_path]), "auto", torch.device("cpu"))


def test_a_gpu_that_an_error_has_broken_ends_the_worker(monkeypatch):
    """A kernel's failed assertion: the next call that waits for the GPU raises it again."""
    from ecotone.fitness.failures import WorkerBrokenError, failed

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert (
        failed("objective 'f'", ValueError("a mistake"), 0.0).failure.message == "objective 'f': ValueError: a mistake"
    )

    def broken():
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(
        WorkerBrokenError, match="objective 'f': the GPU cannot be used any more in this process"
    ) as error:
        failed("objective 'f'", IndexError("out of range"), 0.0)
    assert "IndexError: out of range" in error.value.message


def test_a_score_that_does_not_depend_on_the_model_is_told_of_before_any_budget_is_spent(folder, monkeypatch, caplog):
    code = "def constant(model): return 0.5\ndef first(model): return float(model['w'][0])\n"
    (folder / "constant_scores.py").write_text(code)
    monkeypatch.delitem(sys.modules, "constant_scores", raising=False)
    both = [objective(name, "call", call=f"constant_scores:{name}") for name in ("constant", "first")]
    with caplog.at_level("WARNING", "ecotone"):
        Worker(vectors(folder, *both, try_out=True)).space()
    [said] = [one.getMessage() for one in caplog.records]
    assert said == "objectives.search.constant: 0.5 for the first and for the last expert: does it depend on the model?"
