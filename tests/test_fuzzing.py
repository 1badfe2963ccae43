"""Readers of files get mutations of valid files and random bytes: each takes them, or refuses them in words.

Fast tests try a few dozen each; the slow ones thousands. Both draw the same examples every time.
"""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile
import pytest
import safetensors
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ecotone import Recipe
from ecotone.experiments import storage
from ecotone.experiments.exports import read_record
from ecotone.experiments.logs import in_words
from ecotone.experiments.mergekit import import_mergekit
from ecotone.experiments.recipe import apply_settings, parse_settings
from ecotone.experiments.tracking.notes import statuses
from ecotone.fitness.language.texts import context_of, documents, records
from ecotone.merging.models import checkpoint, configs, tokenizers
from ecotone.merging.sources import Sources
from ecotone.populations.errors import EcotoneError, shown
from ecotone.populations.genome import Genome
from ecotone.populations.journal import Journal

FEW, MANY = 10, 1000
JOURNALS = Path(__file__).parent / "journals"


def fuzzed(examples: int) -> Callable[[Any], Any]:
    """The same examples every time, however long each takes."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(derandomize=True, database=None, deadline=None, max_examples=examples, suppress_health_check=checks)


@contextlib.contextmanager
def in_words_or_not_at_all() -> Iterator[None]:
    """Nothing but an ``EcotoneError`` may come out, and none of its characters may act on a terminal."""
    said = "."
    try:
        yield
    except EcotoneError as error:
        said = str(error)
    assert said
    assert shown(said, len(said), lines=True) == said


# -- mutations -------------------------------------------------------------------------------------------------------

ODD_TEXTS = st.sampled_from(
    ["", "\x1b]8;;http://evil\x07", "a\nerror: fake", "\u202e", "\ud800", "../../x", "/", "\0", "0" * 5000]
)
ODD_NUMBERS = st.sampled_from(
    [0, -1, 1.0, -0.0, 2**31, 2**63, 2**64, 10**30, 10**300, 1e308, float("nan"), float("inf")]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | ODD_TEXTS | ODD_NUMBERS
ODD_BYTES = st.sampled_from([b'"', b"\\ud800", b"{", b"[" * 300, b"9" * 5000, b"\0", b"\x1b[31m"])
ODD_MARKS = st.sampled_from(
    [b"&a ", b"*a", b"!!int ", b"!x ", b"- ", b"? ", b": ", b"<<: *a", b"|", b"---\n", b"1:30", b"2024-99-99"]
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6) | ODD_TEXTS, inner, max_size=4),
    max_leaves=8,
)


def places(value: Any, steps: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The steps to every value in a value."""
    yield steps
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*steps, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from places(inner, (*steps, number))


def replaced(value: Any, steps: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at a place; an ellipsis takes what is there away."""
    if not steps:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if new is ... and len(steps) == 1:
        del copy[steps[0]]
    else:
        copy[steps[0]] = replaced(copy[steps[0]], steps[1:], new)
    return copy


@st.composite
def values_like(draw: st.DrawFn, valid: Any) -> Any:
    """A valid value with a few of its parts replaced or taken away."""
    value = valid
    for _ in range(draw(st.integers(1, 3))):
        steps = draw(st.sampled_from(sorted(places(value), key=repr)[:400]))
        if isinstance(value, dict | list):
            value = replaced(value, steps, draw(VALUES | (st.just(...) if steps else st.nothing())))
    return value


@st.composite
def bytes_like(draw: st.DrawFn, valid: bytes) -> bytes:
    """Valid bytes with a few of them changed, doubled or left out; or none of them."""
    data = valid
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.integers(0, 40)))
        new = draw(
            st.binary(max_size=8)
            | st.sampled_from([b'"', b"\\ud800", b"{", b"[" * 300, b"9" * 5000, b"\0", b"\x1b[31m"])
        )
        data = data[:start] + new + draw(st.sampled_from([b"", data[start:stop]])) + data[stop:]
    return draw(st.sampled_from([data, data[: draw(st.integers(0, len(data)))]]))


def json_like(valid: Any) -> st.SearchStrategy[bytes]:
    """Texts like the JSON of a valid value."""
    whole = json.dumps(valid).encode()
    changed = values_like(valid).map(lambda value: json.dumps(value).encode())
    return changed | bytes_like(whole) | st.binary(max_size=50)


def yaml_like(valid: Any) -> st.SearchStrategy[bytes]:
    """Texts like the YAML of a valid value."""
    whole = yaml.safe_dump(valid).encode()
    changed = values_like(valid).map(lambda value: yaml.safe_dump(value).encode("utf-8", "replace"))

    @st.composite
    def with_marks(draw: st.DrawFn) -> bytes:
        data = whole
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(data)))
            data = data[:at] + draw(ODD_MARKS) + data[at:]
        return data

    return changed | bytes_like(whole) | with_marks() | st.binary(max_size=50)


# -- readers ---------------------------------------------------------------------------------------------------------

SLOWLY = pytest.mark.parametrize("examples", [pytest.param(MANY, marks=pytest.mark.slow)])
HOW_MANY = pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])


def feed(examples: int, inputs: st.SearchStrategy[Any], read: Callable[[Any], object]) -> None:
    """Give a reader that many inputs."""

    @fuzzed(examples)
    @given(inputs)
    def check(data: Any) -> None:
        with in_words_or_not_at_all():
            read(data)

    check()


def of_file(file: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """A reader of bytes that writes them into a file first."""

    def reader(data: bytes) -> object:
        file.write_bytes(data)
        return read(file)

    return reader


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
    "b": {"dtype": "BF16", "shape": [], "data_offsets": [8, 10]},
    "c": {"dtype": "I64", "shape": [0], "data_offsets": [10, 10]},
}


@HOW_MANY
def test_headers(tmp_path: Path, examples: int) -> None:
    """Whatever the library refuses is refused, and all tensors of a header that is taken can be read."""
    file = tmp_path / "a.safetensors"

    def read(header: bytes) -> None:
        content = hostile.file_of(header, bytes(10))
        file.write_bytes(content)
        shard = checkpoint.read_header(file)
        taken = dict(safetensors.deserialize(content))
        assert shard.tensors.keys() == taken.keys()
        for name in shard.tensors:
            assert shard.tensor(name).nbytes == len(taken[name]["data"])

    feed(examples, json_like(HEADER), read)


@SLOWLY
def test_whole_safetensors_files(tmp_path: Path, examples: int) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2), "b": torch.ones(1, dtype=torch.bfloat16)}, file)
    feed(examples, bytes_like(file.read_bytes()), of_file(file, checkpoint.Checkpoint.open))


@SLOWLY
def test_indices(tmp_path: Path, examples: int) -> None:
    for name in "ab":
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    index = {"metadata": {"total_size": 16}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}

    def read(_: Path) -> None:
        checkpoint.Checkpoint.open(tmp_path)
        checkpoint.check_index(tmp_path)
        checkpoint.unread(tmp_path)

    feed(examples, json_like(index), of_file(tmp_path / checkpoint.INDEX, read))


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "eos_token_id": [1, 2],
    "tie_word_embeddings": False,
    "text_config": {"max_position_embeddings": 16},
}
GENERATION = {"eos_token_id": [1, 2], "do_sample": False, "temperature": 1.0}


@SLOWLY
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_configs(tmp_path: Path, name: str, examples: int) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        save_file({"model.norm.weight": torch.ones(2)}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "generation_config.json").write_text(json.dumps(GENERATION))

    def read(_: Path) -> None:
        Sources.open([tmp_path / "a", tmp_path / "b"])
        models = [checkpoint.Checkpoint.open(tmp_path / one) for one in "ab"]
        configs.compare(models)
        configs.generate_alike(*models)
        context_of(str(tmp_path / "b"), None)

    valid = CONFIG if name == "config.json" else GENERATION
    feed(examples, json_like(valid), of_file(tmp_path / "b" / name, read))


TOKENIZER = {
    "tokenizer.json": {
        "added_tokens": [{"id": 3, "content": "<s>", "special": True}],
        "normalizer": None,
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"], "a b"]},
    },
    "tokenizer_config.json": {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "added_tokens_decoder": {"3": {"content": "<s>"}},
        "chat_template": [{"name": "default", "template": "{{ x }}"}],
    },
    "special_tokens_map.json": {"bos_token": "<s>"},
    "added_tokens.json": {"<s>": 3},
    "vocab.json": {"a": 0, "b": 1},
}


@SLOWLY
@pytest.mark.parametrize("name", TOKENIZER)
def test_tokenizers(tmp_path: Path, name: str, examples: int) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        for file, content in TOKENIZER.items():
            if file != "tokenizer.json" or name == file:
                (folder / file).write_text(json.dumps(content))

    def read(_: Path) -> None:
        models = [("a", tmp_path / "a"), ("b", tmp_path / "b")]
        tokenizers.compare(models)
        tokenizers.clashes(models, 3)
        tokenizers.check(models[0], models, 3)
        tokenizers.chat_template(tmp_path / "b")

    feed(examples, json_like(TOKENIZER[name]), of_file(tmp_path / "b" / name, read))


ADAPTER = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 3,
    "target_modules": ["fc"],
    "rank_pattern": {"fc": 2},
    "alpha_pattern": {"fc": 3.0},
    "modules_to_save": None,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "layers_to_transform": [0],
}


@SLOWLY
def test_adapters(tmp_path: Path, examples: int) -> None:
    save_file({"fc.weight": torch.ones(3, 4)}, tmp_path / "base.safetensors")
    folder = tmp_path / "adapter"
    folder.mkdir()
    factors = {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(3, 2)}
    save_file({f"base_model.model.fc.{name}.weight": one for name, one in factors.items()}, folder / checkpoint.ADAPTER)

    def read(_: Path) -> None:
        sources = Sources.open([folder, tmp_path / "base.safetensors"], tmp_path / "base.safetensors")
        for model in sources.experts:
            model.tensor("fc.weight")

    feed(examples, json_like(ADAPTER), of_file(folder / checkpoint.ADAPTER_CONFIG, read))


RECIPE = {
    "name": "toy",
    "seed": 3,
    "models": {"experts": ["a.safetensors", "b.safetensors"], "base": None},
    "merge": {"operator": "ties", "density": 0.5},
    "objectives": {
        "search": [{"name": "acc", "type": "call", "call": "m:f", "direction": "maximize", "arguments": {"x": [1]}}]
    },
    "search": {"algorithm": "cma_es", "low": 0.0, "high": 1.0},
    "budget": {"evaluations": 10},
    "tracking": {"mlflow": {"uri": "http://x"}},
}


@HOW_MANY
def test_recipes(tmp_path: Path, examples: int) -> None:
    def read(file: Path) -> None:
        recipe = Recipe.from_yaml(file)
        assert Recipe.from_record(recipe.record()).signature == recipe.signature
        file.write_text(recipe.text())
        assert Recipe.from_yaml(file).signature == recipe.signature

    feed(examples, yaml_like(RECIPE), of_file(tmp_path / "recipe.yaml", read))


@HOW_MANY
def test_settings_of_the_command_line(examples: int) -> None:
    keys = st.sampled_from(
        ["seed", "search.low", "objectives.search.0.name", "a..b", ".", "objectives.search." + "9" * 5000]
    )
    pairs = st.tuples(
        keys | st.text(max_size=8), yaml_like({"a": [1, "x"]}).map(lambda text: text.decode(errors="replace"))
    )
    feed(examples, pairs, lambda pair: Recipe.from_record(apply_settings(RECIPE, parse_settings(["=".join(pair)]))))


MERGEKIT = {
    "genome": {
        "models": ["a", "b"],
        "merge_method": "ties",
        "base_model": "c",
        "layer_granularity": 0,
        "normalize": True,
    },
    "tasks": [{"name": "arc_easy", "weight": 1.0}],
}


@HOW_MANY
def test_mergekit_s_files(tmp_path: Path, examples: int) -> None:
    merge = {
        "merge_method": "linear",
        "models": [{"model": "a", "parameters": {"weight": [{"filter": "mlp", "value": 0.3}, 0.5]}}, {"model": "b"}],
        "dtype": "bfloat16",
        "tasks": [{"name": "arc_easy"}],
    }
    reader = of_file(tmp_path / "evolve.yaml", lambda file: import_mergekit(file, layers=2))
    feed(examples, yaml_like(MERGEKIT) | yaml_like(merge), reader)


@SLOWLY
def test_lines_of_data(tmp_path: Path, examples: int) -> None:
    def read(file: Path) -> None:
        for read_as in (lambda: records([file], "here"), lambda: documents([file], "text", "here")):
            with in_words_or_not_at_all():
                read_as()

    valid = {"text": "a", "choices": ["b", "c"], "answer": 1}
    feed(examples, json_like(valid), of_file(tmp_path / "data.jsonl", read))


@HOW_MANY
def test_genomes(examples: int) -> None:
    dense = json.loads(Genome.dense([0.5, 1.5], 2).to_json())
    plain = json.loads(Genome.uniform(4, [0.5, 0.5], density=0.5, kind="x").split(2).to_json())

    def read(text: bytes) -> None:
        genome = Genome.from_json(text.decode(errors="replace"))
        assert Genome.from_json(genome.to_json()).digest == genome.digest

    feed(examples, json_like(dense) | json_like(plain), read)


@HOW_MANY
def test_small_records(tmp_path: Path, examples: int) -> None:
    """What lies beside a run or an export, and lines of its log."""
    manifest = {
        "epoch": 1,
        "serial": 2,
        "home": "x",
        "counts": [1, 2, 3],
        "bytes": 4,
        "time": 1.5,
        "files": {"journal.sqlite": {"object": "journal-1.sqlite", "bytes": 4, "hash": "ab"}},
    }
    lease = {"epoch": 1, "owner": "me", "lasts": 60.0, "renewed": 1.0, "released": False, "since": 1.0}
    store = tmp_path / "store"
    (store / "run").mkdir(parents=True)
    feed(
        examples,
        json_like({"url": "s3://x", "home": "y"}),
        of_file(tmp_path / "storage.json", lambda _: storage.url_of(tmp_path)),
    )
    for name, valid in (("mirror-000001-000001.json", manifest), ("lease-000001.json", lease)):
        reader = of_file(store / "run" / name, lambda _: storage.standing(f"file://{store}/run"))
        feed(examples, json_like(valid), reader)
    notes = {"mlflow": {"uri": "x", "run_id": "y", "mirrored": 3, "complete": True, "memory": {"a": 1}}}
    feed(examples, json_like(notes), of_file(tmp_path / "tracking.json", lambda _: statuses(tmp_path)))
    export = {"recipe": {"name": "x"}, "scores": {"search": {"a": 1.0}}, "genome": {}}
    feed(examples, json_like(export), of_file(tmp_path / "ecotone.json", lambda _: read_record(tmp_path)))
    event = {"time": "2024-01-01T00:00:00", "level": "info", "message": "x"}
    feed(examples, json_like(event), lambda line: in_words(line.decode(errors="replace")))


@SLOWLY
@pytest.mark.parametrize("name", ["format-4-gradients-whole", "format-3-samples-killed"])
def test_journals(tmp_path: Path, name: str, examples: int) -> None:
    whole = gzip.decompress((JOURNALS / f"{name}.sqlite.gz").read_bytes())

    def read(file: Path) -> None:
        with Journal.open(file) as journal:
            for _ in journal.rows(unscored=True):
                pass
            for _ in journal.evaluations():
                pass
            journal.references()
            journal.trial(0)

    feed(examples if examples == FEW else MANY // 10, bytes_like(whole), of_file(tmp_path / "journal.sqlite", read))
