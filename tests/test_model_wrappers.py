"""Models that wrap models: merged rightly, counted in memory, exported and verified, or refused in words."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ecotone import launch
from ecotone.experiments.exports import export_mergekit, verify
from ecotone.experiments.mergekit import mergekit_config
from ecotone.experiments.recipe import Recipe
from ecotone.merging import operators
from ecotone.merging.export import export_directory
from ecotone.merging.kernel.lazy import formed
from ecotone.merging.models import preflight
from ecotone.merging.models.checkpoint import Checkpoint
from ecotone.merging.models.formats import FORMATS, opened, opened_whole
from ecotone.merging.models.lora import Adapter
from ecotone.merging.models.model import SAYS, Model, Wrapper, declared
from ecotone.merging.models.vocabulary import Resized
from ecotone.merging.sources import Sources
from ecotone.populations.errors import CheckpointError, InputError
from ecotone.populations.genome import Genome
from ecotone.testing.models import ModelSuite

SHAPES = {"model.embed_tokens.weight": (9, 6), "model.layers.0.bias": (7,), "model.layers.0.weight": (7, 30)}
EMBEDDING = "model.embed_tokens.weight"


def written(folder, name, seed, dtype=torch.float32, rows=9):
    """A Hugging Face directory of three tensors and a buffer."""
    place = folder / name
    place.mkdir()
    generator = torch.Generator().manual_seed(seed)
    shapes = SHAPES | {EMBEDDING: (rows, 6)}
    tensors = {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}
    save_file(tensors | {"steps": torch.tensor([3])}, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps({"vocab_size": rows}))
    listed = {f"t{number}": number for number in range(rows)}
    (place / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": listed}}))
    return place


def adapter(folder, name, seed):
    """A LoRA adapter of one matrix."""
    place = folder / name
    place.mkdir()
    generator = torch.Generator().manual_seed(seed)
    factors = {"A": torch.randn(2, 30, generator=generator), "B": torch.randn(7, 2, generator=generator)}
    save_file(
        {f"base_model.model.model.layers.0.lora_{part}.weight": factor for part, factor in factors.items()},
        place / "adapter_model.safetensors",
    )
    (place / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3}))
    return place


@dataclass(frozen=True, eq=False)
class Reversed(Wrapper):
    """The rows of every tensor in the opposite order, as an alignment would have them."""

    change = "rows in the opposite order"

    def tensor(self, name):
        return self.model.tensor(name).flip(0)


@dataclass(frozen=True, eq=False)
class Truncated(Wrapper):
    """Task vectors of rank one, as a whole-matrix method makes them."""

    base: Model
    rank: int = 1
    change = "task vectors of low rank"

    def tensor(self, name):
        own, start = self.model.tensor(name), self.base.tensor(name)
        if own.ndim < 2:
            return own
        u, s, v = torch.linalg.svd(own - start, full_matrices=False)
        return start + (u[:, : self.rank] * s[: self.rank]) @ v[: self.rank]

    def working_bytes(self, name):
        return 4 * self.tensors[name].nbytes + self.model.working_bytes(name)


# -- the conformance suite over our kinds and two of a test ----------------------------------------------------


class OfFloats(ModelSuite):
    dtype = torch.float32

    @pytest.fixture
    def base(self, tmp_path):
        return Checkpoint.open(written(tmp_path, "base", 0, self.dtype))

    @pytest.fixture
    def expert(self, tmp_path):
        return Checkpoint.open(written(tmp_path, "expert", 1, self.dtype))


class TestCheckpoint(OfFloats):
    @pytest.fixture
    def model(self, expert):
        return expert


class TestHalfCheckpoint(TestCheckpoint):
    dtype = torch.bfloat16


class TestAdapter(OfFloats):
    @pytest.fixture
    def model(self, base, tmp_path):
        return Adapter.open(adapter(tmp_path, "lora", 2), base)


class TestHalfAdapter(TestAdapter):
    dtype = torch.bfloat16


class TestAdapterOfAWrapper(OfFloats):
    @pytest.fixture
    def model(self, expert, tmp_path):
        return Adapter.open(adapter(tmp_path, "lora", 2), Reversed(expert))


class TestCutVocabulary(OfFloats):
    @pytest.fixture
    def model(self, tmp_path):
        return Resized(Checkpoint.open(written(tmp_path, "large", 1, rows=12)), {EMBEDDING: 9})


class TestUnitedVocabulary(OfFloats):
    @pytest.fixture
    def model(self, base, expert, tmp_path):
        small = Checkpoint.open(written(tmp_path, "small", 1, rows=5))
        return Resized(small, {EMBEDDING: 9}, None, (small, expert, base))


class TestReversed(OfFloats):
    @pytest.fixture
    def model(self, expert):
        return Reversed(expert)


class TestTruncated(OfFloats):
    @pytest.fixture
    def model(self, expert, base):
        return Truncated(expert, base)


class TestWrappersOfWrappers(OfFloats):
    @pytest.fixture
    def model(self, base, tmp_path):
        return Reversed(Truncated(Adapter.open(adapter(tmp_path, "lora", 2), base), base))


# -- several of them in one merge ------------------------------------------------------------------------------


@pytest.fixture
def trio(tmp_path):
    return [Checkpoint.open(written(tmp_path, name, seed)) for seed, name in enumerate(["base", "one", "two"])]


def sources_of(experts, base, operator="task_arithmetic", placement="auto"):
    return Sources(preflight.check([base, *experts]), operators.get(operator), experts, base, placement)


def test_a_merge_of_wrappers_is_that_of_what_they_form(trio, tmp_path):
    base, one, two = trio
    wrapped = sources_of([Reversed(one), Truncated(two, base)], base, "ties")
    for name, model in (("r", Reversed(one)), ("t", Truncated(two, base))):
        (tmp_path / name).mkdir()
        save_file({key: model.tensor(key).contiguous() for key in model.tensors}, tmp_path / name / "model.safetensors")
    plain = sources_of([Checkpoint.open(tmp_path / name) for name in ("r", "t")], base, "ties")
    genome = Genome.uniform(wrapped.layout.size, [0.4, 0.9])
    for name, values in wrapped.stack([genome]).items():
        assert torch.equal(values, plain.stack([genome])[name])
    np.testing.assert_array_equal(wrapped.space().gram.prefix, plain.space().gram.prefix)


def test_memory_counts_what_wrappers_form(trio):
    base, one, two = trio
    plain, wrapped = sources_of([one, two], base), sources_of([Reversed(one), Truncated(two, base)], base)
    cpu = torch.device("cpu")
    largest = max(info.nbytes for info in wrapped.layout.parameters.values())
    assert wrapped.memory.needs(cpu).buffers.host - plain.memory.needs(cpu).buffers.host == largest + 4 * largest
    streamed = sources_of([Reversed(one), two], base, "ties").memory.needs(cpu).buffers.host
    whole = sum(info.nbytes for info in wrapped.layout.parameters.values())
    assert streamed - sources_of([one, two], base, "ties").memory.needs(cpu).buffers.host == whole
    assert plain.held.placed(cpu) == "mapped"  # files are as near
    assert wrapped.held.placed(cpu) == "host"  # what is formed is kept, as it is small


def test_models_share_what_one_of_them_holds(trio, tmp_path):
    base, _, _ = trio
    experts = [Adapter.open(adapter(tmp_path, name, seed), base) for seed, name in enumerate("ab")]
    for each in (*experts, Resized(experts[0], {EMBEDDING: 9})):
        assert each.holder("model.layers.0.bias") is base
        assert each.holder("model.layers.0.weight") in experts
    assert Resized(experts[0], {EMBEDDING: 12}).holder(EMBEDDING) not in (base, *experts)


def test_mergekit_refuses_what_it_cannot_express_in_words(trio, tmp_path):
    base, one, two = trio
    genome = Genome.uniform(sources_of([one, two], base).layout.size, [0.4, 0.9])
    lora = Adapter.open(adapter(tmp_path, "lora", 0), base)
    expressed = mergekit_config(genome, sources_of([one, lora], base))
    assert [each["model"] for each in expressed.config["models"]][1:] == [str(one.path), f"{base.path}+{lora.path}"]
    assert expressed.adapters
    for wrapper, said in (
        (Reversed(one), "rows in the opposite order"),
        (Truncated(one, base), "task vectors of low rank"),
        (Adapter.open(lora.path, Reversed(base)), "rows in the opposite order"),
        (Resized(one, {EMBEDDING: 9}), "one that was resized"),
    ):
        with pytest.raises(InputError, match=f"mergekit .*{said}") as refused:
            mergekit_config(genome, sources_of([wrapper, two], base))
        assert str(wrapper.files) in refused.value.message or str(wrapper.path) in refused.value.message
        assert "Export a checkpoint" in refused.value.remedy


def test_an_export_takes_files_from_the_model_that_has_them(trio, tmp_path):
    base, one, two = trio
    sources = sources_of([Reversed(one), two], Reversed(base))
    genome = Genome.uniform(sources.layout.size, [1.0, 0.0])
    target = export_directory(sources, genome, tmp_path / "merged", "card", {})
    found = load_file(target / "model.safetensors")
    assert all(torch.equal(found[name], one.tensor(name).flip(0)) for name in SHAPES)
    assert (target / "tokenizer.json").read_text() == (base.path / "tokenizer.json").read_text()
    assert json.loads((target / "config.json").read_text())["vocab_size"] == 9


# -- half-declared models --------------------------------------------------------------------------------------


class Passing:
    """A wrapper that leaves all but the weights to the model in it."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def tensor(self, name):
        return self.model.tensor(name).flip(0)

    def flat(self, name):
        return self.tensor(name).reshape(-1)


class Scaling(Checkpoint):
    """A checkpoint of other weights, which inherits what is said of the files."""

    def tensor(self, name):
        return super().tensor(name) / 2


def test_a_wrapper_that_leaves_answers_to_the_model_in_it_is_refused(trio):
    base, one, two = trio
    with pytest.raises(
        InputError, match=r"Passing: expected a model that says of itself path, .*stored.*mergekit"
    ) as no:
        sources_of([Passing(one), two], base)
    assert "Wrapper" in no.value.remedy
    with pytest.raises(InputError, match=r"Scaling: expected a model that says of itself stored, .*other weights"):
        sources_of([one, two], Scaling.open(base.path))
    with pytest.raises(TypeError, match=r"abstract.*change"):
        type("Silent", (Wrapper,), {"tensor": Reversed.tensor})(one)
    assert set(SAYS) <= set(dir(Wrapper))
    assert declared(Reversed(one)).stored is False


@pytest.mark.parametrize(
    ("test", "answers"),
    [
        ("test_mergekit_is_given_files_that_hold_the_model_or_nothing", {"mergekit_reference": lambda self: "/base"}),
        ("test_a_holder_holds_what_is_read", {"holder": lambda self, name: self.model}),
        ("test_what_is_formed_whole_is_counted", {"working_bytes": lambda self, name: 0}),
        ("test_a_record_is_plain_values", {"record": lambda self: {"name": self.name, "path": self.path}}),
        ("test_headers_say_what_is_read", {"tensor": lambda self, name: self.model.tensor(name)[:1]}),
        ("test_another_name_changes_nothing_else", {"named": lambda self, name: self.model.named(name)}),
    ],
)
def test_the_suite_finds_a_model_that_answers_wrongly(trio, test, answers):
    wrong = dataclass(frozen=True, eq=False)(type("Wrong", (Reversed,), answers))
    getattr(ModelSuite(), test)(Reversed(trio[1]))
    with pytest.raises((AssertionError, TypeError)):
        getattr(ModelSuite(), test)(wrong(trio[1]))


# -- a format of another package -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scaled(Wrapper):
    """All weights times a factor."""

    factor: float

    @property
    def change(self):
        return f"weights times {self.factor}"

    def tensor(self, name):
        found = self.model.tensor(name)
        return found * self.factor if found.is_floating_point() else found


class ScaledFormat:
    """A file that names a checkpoint and a factor."""

    title = "scaled checkpoint"
    describe = "JSON that names a checkpoint and what its weights are multiplied by."
    limits = ("mergekit cannot express it.",)
    needs_base = False

    def owns(self, path):
        return path.endswith(".scaled")

    def open(self, path, base):
        with open(path) as file:  # noqa: PTH123
            said = json.load(file)
        return Scaled(Checkpoint.open(said["of"]), said["factor"])


@pytest.fixture
def scaled(trio, tmp_path):
    FORMATS.register("scaled", ScaledFormat)
    path = tmp_path / "one.scaled"
    path.write_text(json.dumps({"of": str(trio[1].path), "factor": 0.5}))
    yield path
    FORMATS.forget("scaled")


def test_ours_say_what_they_are_and_what_they_cannot_do(trio, tmp_path):
    for name, kind in FORMATS.usable().items():
        assert kind().title, name
        assert kind().describe.endswith("."), name
        assert kind().limits, name
    base = trio[0]
    lora = adapter(tmp_path, "lora", 0)
    owners = {
        str(base.path): ["hugging_face"],
        str(base.path / "model.safetensors"): ["safetensors"],
        str(lora): ["lora"],
        "org/model@v1": ["hub"],
        str(tmp_path / "none"): [],
        str(base.path / "config.json"): [],
    }
    for path, expected in owners.items():
        assert [name for name, kind in FORMATS.usable().items() if kind().owns(path)] == expected
    with pytest.raises(InputError, match=r"base: the expert '.*lora' is a LoRA adapter and needs the model"):
        opened(lora)
    with pytest.raises(CheckpointError, match="lora: expected a full model, found a LoRA adapter"):
        opened_whole(lora)
    assert isinstance(opened(lora, base), Adapter)


def test_pickles_are_refused_whoever_names_them(tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match=r"found a pickle \(model.bin\), which can run any code"):
        Sources.open([tmp_path / "model.bin"])


def test_a_half_declared_format_is_refused():
    half = type("Half", (), {"title": "half", "owns": lambda self, path: False})
    with pytest.raises(
        InputError, match=r"checkpoint format 'half': expected .*, found no describe, limits, needs_base, open"
    ):
        FORMATS.register("half", half)


@pytest.mark.parametrize("method", ["__init__", "owns"])
def test_a_format_that_raises_is_skipped_and_named_where_no_other_takes_the_path(scaled, trio, monkeypatch, method):
    def raises(*_):
        raise OSError("no disk")

    monkeypatch.setattr("ecotone.registry.package_of", lambda kind: "scales 1.0")
    monkeypatch.setattr(ScaledFormat, method, raises)
    assert opened(trio[1].path) == trio[1]
    with pytest.raises(InputError) as refused:
        opened(scaled)
    assert refused.value.message == (
        f"{scaled}: the checkpoint format 'scaled' of the package scales 1.0: {method}() raised OSError: no disk."
    )


def test_a_format_that_cannot_open_is_named(scaled, monkeypatch):
    monkeypatch.setattr("ecotone.registry.package_of", lambda kind: "scales 1.0")
    scaled.write_text("{}")
    with pytest.raises(
        InputError, match=r"of the package scales 1.0: open\(\) raised KeyError: 'of'. Tell the authors"
    ):
        opened(scaled)


def test_two_formats_that_take_one_path_are_refused_both_named(scaled):
    FORMATS.register("other", ScaledFormat)
    try:
        with pytest.raises(InputError, match="the checkpoint formats other and scaled both take it"):
            opened(scaled)
    finally:
        FORMATS.forget("other")


def test_what_a_format_opens_must_say_all_of_itself(scaled, monkeypatch):
    monkeypatch.setattr(ScaledFormat, "open", lambda self, path, base: Passing(base))
    with pytest.raises(InputError, match="Passing: expected a model that says of itself"):
        opened(scaled)


def test_models_of_a_plugged_format_are_searched_exported_and_verified(scaled, trio, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "wrapper_toys.py").write_text(
        "def near(model):\n    return -float((model['model.layers.0.bias'] - 0.1).square().mean())\n"
    )
    record = {
        "name": "wrapped",
        "models": {"base": "base", "experts": ["one.scaled", "two"], "names": ["half", "whole"]},
        "merge": {"operator": "task_arithmetic"},
        "objectives": {"search": [{"name": "near", "type": "call", "call": "wrapper_toys:near"}]},
        "search": {"algorithm": "random", "granularity": "model"},
        "budget": {"evaluations": 4},
        "runtime": {"pool": "serial"},
        "tracking": {"mlflow": False},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(record))
    run = launch(Recipe.from_yaml(tmp_path / "recipe.yaml"), tmp_path / "run")
    target = run.export("best", tmp_path / "best")
    assert all(one.difference == 0 for one in verify(target))
    told = json.loads((target / "ecotone.json").read_text())["models"]
    assert told["base"] == {"name": "base", "path": str(tmp_path / "base")}
    assert told["experts"][0] == {
        "name": "half",
        "change": "weights times 0.5",
        "of": {"name": "half", "path": str(tmp_path / "one")},
    }
    weights = load_file(target / "model.safetensors")["model.layers.0.bias"]
    base, one, two = (model.tensor("model.layers.0.bias") for model in trio)
    first, second = run.trial("best").genome.coefficients[0]
    torch.testing.assert_close(weights, base + float(first) * (one / 2 - base) + float(second) * (two - base))
    with pytest.raises(InputError, match=r"mergekit .* weights times 0\.5"):
        export_mergekit(run, "best", tmp_path / "merge.yaml")
    assert not (tmp_path / "merge.yaml").exists()


def test_pieces_of_an_adapter_on_a_wrapper_are_formed_as_the_whole(trio, tmp_path):
    expert = Adapter.open(adapter(tmp_path, "lora", 0), Reversed(trio[0]))
    name = "model.layers.0.weight"
    factors = Checkpoint.open(expert.path / "adapter_model.safetensors")
    a, b = (factors.tensor(f"base_model.model.model.layers.0.lora_{part}.weight") for part in "AB")
    torch.testing.assert_close(formed(expert.flat(name)).view(7, 30), trio[0].tensor(name).flip(0) + 1.5 * b @ a)
