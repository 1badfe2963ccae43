"""Configs of the models of a merge: what differs, what of it counts, and whose config computes a merge.

The truth is transformers: what it computes with a model's own folder.
"""

import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from families import CPU, FAMILIES, flat
from families import saved as saved_family
from tiny_language import WORDS, save_tokenizer

from ecotone import launch
from ecotone.experiments.checks import validate
from ecotone.experiments.exports import export, export_mergekit, verify
from ecotone.experiments.recipe import Recipe
from ecotone.fitness.backends.resident import Resident
from ecotone.fitness.language.perplexity import PerplexitySettings
from ecotone.fitness.specs import WorkerSpec
from ecotone.fitness.worker import Worker
from ecotone.merging.export import export_directory
from ecotone.merging.models import configs
from ecotone.merging.models.formats import opened
from ecotone.merging.sources import Sources
from ecotone.populations.errors import CheckpointError, InputError
from ecotone.populations.genome import Genome
from ecotone.populations.trial import Trial

transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(5, 17)[None]
SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base and two experts with one config, and a tokenizer beside each."""
    folder = tmp_path_factory.mktemp("saved")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data = 0.3 * torch.randn(parameter.shape)
        save_tokenizer(folder / name)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    for name in ("base", "a", "b"):
        shutil.copytree(saved / name, tmp_path / name)
    return tmp_path


def changed(folder, file="config.json", drop=(), **fields):
    """Change fields of a JSON file; ``outer__inner`` is a field of a nested mapping."""
    record = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    for name, value in fields.items():
        *outer, last = name.split("__")
        place = record
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = value
    for name in drop:
        del record[name]
    (folder / file).write_text(json.dumps(record))


def sources_of(folder, config="same", operator="task_arithmetic", base=True):
    root = folder / "base" if base else None
    return Sources.open([folder / "a", folder / "b"], root, operator if base else "linear", config=config)


def differences(folder):
    return configs.compare([opened(folder / name) for name in ("base", "a", "b")])


def logits_of(model):
    with torch.no_grad():
        return model(TOKENS).logits


def own_logits(path):
    return logits_of(transformers.AutoModelForCausalLM.from_pretrained(path))


# -- what counts -----------------------------------------------------------------------------------------

COUNTING = {
    "rope_theta": ({"rope_parameters__rope_theta": 500.0}, "rope_theta is 10000.0 in 'base', 'a' and 500.0 in 'b'"),
    "older rope_theta": ({"rope_theta": 500.0, "rope_parameters": None}, "rope_theta"),
    "epsilon": ({"rms_norm_eps": 0.1}, "rms_norm_eps is 1e-06 in 'base', 'a' and 0.1 in 'b'"),
    "activation": ({"hidden_act": "gelu"}, 'hidden_act is "silu" in'),
    "heads": ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}, "num_attention_heads is 4 in"),
    "a family's own field": ({"attention_multiplier": 0.5}, "attention_multiplier is unset in"),
    "end of text": ({"eos_token_id": 7}, "eos_token_id is 1 in"),
    "another family": ({"model_type": "mistral"}, 'model_type is "llama" in'),
    "length of other ropes": (
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
            "max_position_embeddings": 512,
        },
        "max_position_embeddings is 256 in",
    ),
}


@pytest.mark.parametrize("case", COUNTING)
def test_a_field_that_changes_the_computation_is_refused(folder, case):
    fields, text = COUNTING[case]
    changed(folder / "b", **fields)
    with pytest.raises(CheckpointError) as refused:
        sources_of(folder)
    assert text in str(refused.value)
    assert "models.config" in str(refused.value)
    for choice in ("base", "first", "each"):
        assert sources_of(folder, choice).config == choice


TOLD = {
    "versions and types": {"transformers_version": "4.0", "dtype": "bfloat16", "_name_or_path": "elsewhere"},
    "running": {"use_cache": False, "pretraining_tp": 2, "output_attentions": True, "auto_map": {"AutoConfig": "x.y"}},
    "training": {"attention_dropout": 0.5, "initializer_range": 1.0, "problem_type": "regression"},
    "drawing": {"temperature": 0.6, "do_sample": True, "top_k": 5},
    "classes": {"id2label": {"0": "cat", "1": "dog"}, "label2id": {"cat": 0, "dog": 1}},
    "length of plain ropes": {"max_position_embeddings": 512},
    "padding that one lacks": {"pad_token_id": 3},
    "the head": {"architectures": ["LlamaModel"]},
}


@pytest.mark.parametrize("case", TOLD)
def test_a_field_that_does_not_is_told(folder, case):
    changed(folder / "b", **TOLD[case])
    sources_of(folder)
    found = differences(folder)
    assert {one.field.split(".")[0] for one in found} == TOLD[case].keys()
    text = configs.described(found, "same", "base")
    assert text.startswith("the same but for")
    assert all(one.field in text for one in found)


def test_an_absent_field_has_its_default(folder):
    changed(folder / "a", drop=("rms_norm_eps", "hidden_act"))
    changed(folder / "b", drop=("rope_parameters",), rope_theta=10000.0, rope_scaling=None)
    sources_of(folder)
    changed(folder / "base", rms_norm_eps=1e-5)
    with pytest.raises(CheckpointError, match="rms_norm_eps is 1e-05 in 'base' and 1e-06 in 'a', 'b'"):
        sources_of(folder)


def test_without_transformers_plain_fields_are_compared(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    sources_of(folder)
    changed(folder / "b", rms_norm_eps=1e-5)
    with pytest.raises(CheckpointError, match="rms_norm_eps"):
        sources_of(folder)


def test_windows_that_are_off_do_not_count():
    """Qwen2.5's bases and its instruct models differ in fields of a sliding window that none of them uses."""

    def compared(**fields):
        common = {"model_type": "qwen2", "num_hidden_layers": 24, "use_sliding_window": False}
        records = [{**common, "sliding_window": 32768, "max_window_layers": 24}, {**common, **fields}]
        return [one.field for one in configs._of_configs(("x", "y"), configs._filled(records)) if one.matters]

    assert compared(sliding_window=4096, max_window_layers=21) == []
    assert "sliding_window" in compared(sliding_window=4096, max_window_layers=21, use_sliding_window=True)


def test_fields_of_nested_configs_are_compared(tmp_path):
    _, paths = saved_family(FAMILIES["qwen2_5_vl"], tmp_path)
    changed(paths[1], vision_config__hidden_act="gelu", text_config__attention_dropout=0.3)
    with pytest.raises(CheckpointError, match=r"vision_config\.hidden_act") as refused:
        Sources.open(paths[1:], paths[0])
    assert "dropout" not in str(refused.value)
    changed(paths[1], vision_config__hidden_act="silu", image_token_id=59)
    with pytest.raises(CheckpointError, match="image_token_id is 60 in 'base', 'b' and 59 in 'a'"):
        Sources.open(paths[1:], paths[0])


def test_many_fields_are_counted(folder):
    changed(folder / "b", **{f"field_{number}": number for number in range(9)})
    with pytest.raises(CheckpointError, match=r"field_4 .*; and 4 more fields"):
        sources_of(folder)


def test_the_end_of_generated_texts_counts(folder):
    same = {"bos_token_id": 0, "eos_token_id": [1, 7]}
    changed(folder / "base", "generation_config.json", **same)
    changed(folder / "a", "generation_config.json", **{**same, "eos_token_id": [7, 1], "temperature": 0.3})
    changed(folder / "b", "generation_config.json", **{**same, "pad_token_id": 9, "repetition_penalty": 1.0})
    sources_of(folder)
    changed(folder / "b", "generation_config.json", eos_token_id=1)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id"):
        sources_of(folder)
    changed(folder / "b", "generation_config.json", eos_token_id=[1, 7], repetition_penalty=1.1)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: repetition_penalty is 1.0 in"):
        sources_of(folder)


def test_processors_of_images_are_compared(tmp_path):
    pytest.importorskip("PIL")
    _, paths = saved_family(FAMILIES["vit"], tmp_path)
    image = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    for path in paths:
        image.save_pretrained(path)
    Sources.open(paths[1:], paths[0])
    changed(paths[2], "preprocessor_config.json", processor_class="X", image_processor_type="ViTImageProcessorFast")
    Sources.open(paths[1:], paths[0])
    changed(paths[2], "preprocessor_config.json", drop=("resample",))  # the class's own
    Sources.open(paths[1:], paths[0])
    changed(paths[2], "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3], size__height=8)
    with pytest.raises(CheckpointError, match=r"image_processor: (image_mean|size\.height) is") as refused:
        Sources.open(paths[1:], paths[0])
    assert "image_processor: image_mean is [0.5, 0.5, 0.5] in 'base', 'a'" in str(refused.value)


def test_choices_that_cannot_be_are_refused(folder):
    with pytest.raises(InputError, match="'base' needs a base"):
        sources_of(folder, "base", base=False)
    with pytest.raises(InputError, match="expected same, base, first or each"):
        sources_of(folder, "mean")


# -- whose config computes -------------------------------------------------------------------------------


def test_models_are_computed_with_the_chosen_config(folder):
    """Under ``each`` an expert alone is what transformers loads from its folder; else it has the chosen config."""
    changed(folder / "a", rms_norm_eps=0.2)
    changed(folder / "b", rope_parameters__rope_theta=50.0)
    own = {name: own_logits(folder / name) for name in ("a", "b")}
    with_config = {}
    for choice in ("base", "a"):
        shutil.copytree(folder / "b", folder / f"b-{choice}")
        shutil.copyfile(folder / choice / "config.json", folder / f"b-{choice}" / "config.json")
        with_config[choice] = own_logits(folder / f"b-{choice}")
    assert not torch.allclose(own["b"], with_config["base"], atol=1e-2)
    assert not torch.allclose(with_config["a"], with_config["base"], atol=1e-2)

    expected = {"each": own["b"], "base": with_config["base"], "first": with_config["a"]}
    for choice, logits in expected.items():
        sources = sources_of(folder, choice)
        for stack in (0, 1 << 26):
            resident = Resident(sources, "auto", CPU, stack_bytes=stack)
            genomes = [Genome.uniform(sources.layout.size, row) for row in ([1.0, 0.0], [0.0, 1.0], [0.5, 0.5])]
            group = [logits_of(model) for model in shown(resident, genomes)]
            assert torch.equal(group[1], logits)
            assert choice == "base" or torch.equal(group[0], own["a"])
            assert torch.equal(logits_of(resident.expert("b")), logits)
            exported = export_directory(sources, genomes[2], folder / f"{choice}{stack}", "", {})
            assert torch.equal(own_logits(exported), group[2])  # the merge's config travels with it


def shown(resident, genomes):
    for start in range(0, len(genomes), resident.group):
        yield from resident.show(genomes[start : start + resident.group])


def test_modules_of_experts_have_no_tensors_of_their_own(folder):
    changed(folder / "b", rms_norm_eps=0.2)
    sources = sources_of(folder, "each")
    resident = Resident(sources, "auto", CPU)
    assert list(sources.own_configs) == [1]
    (own,) = resident.show([Genome.uniform(sources.layout.size, [0.0, 1.0])])
    assert own is not resident.model
    merges = dict(resident.model.named_parameters())
    assert all(parameter is merges[name] for name, parameter in own.named_parameters())
    assert not own.training
    slopes = resident.gradient(
        Genome.uniform(sources.layout.size, [0.3, 0.4]), lambda model: iter([model(TOKENS).logits.square().mean()])
    )[1]
    assert np.abs(slopes).min() > 0


def test_an_expert_with_more_tokens_has_a_module_of_its_own(folder):
    """Its embeddings are resized as those of merges are: rows that other models lack are the expert's."""
    changed(folder / "b", rms_norm_eps=0.2)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "b")
    model.resize_token_embeddings(403)
    model.save_pretrained(folder / "b")
    with pytest.raises(CheckpointError, match="vocabulary"):
        sources_of(folder, "each")
    sources = Sources.open(
        [folder / "a", folder / "b"], folder / "base", "task_arithmetic", vocabulary="union", config="each"
    )
    resident = Resident(sources, "auto", CPU)
    first, second = (logits_of(one) for one in shown(resident, rows_of(sources)))
    assert torch.equal(second, own_logits(folder / "b"))
    assert torch.equal(first[..., :400], own_logits(folder / "a"))


def test_models_of_one_name_are_told_apart(folder):
    shutil.copytree(folder / "a", folder / "other" / "base")
    changed(folder / "other" / "base", rms_norm_eps=0.2)
    with pytest.raises(CheckpointError) as refused:
        Sources.open([folder / "other" / "base"], folder / "base")
    for path in (folder / "base", folder / "other" / "base"):
        assert f"'base ({path})'" in str(refused.value)


def test_the_expert_alone_is_found_whatever_its_coefficients(folder):
    for operator, rows in (
        ("linear", [[0.0, 1.0]]),
        ("task_arithmetic", [[0.0, 1.0], [0.0, 1.0]]),
        ("ties", [[0.0, 1.0]]),
    ):
        sources = sources_of(folder, operator=operator)
        size = sources.layout.size
        borders = np.linspace(0, size, len(rows) + 1).astype(int)
        assert sources.alone(Genome(borders, rows)) == 1
        assert sources.alone(Genome(borders, np.array(rows) * 0.5)) is None
        assert sources.alone(Genome.uniform(size, [0.5, 0.5])) is None
        assert sources.alone(Genome([0, 9, size], [[1.0, 0.0], [0.0, 1.0]])) is None
    assert sources_of(folder).alone(Genome.uniform(size, [0.0, 0.0])) is None  # the base


def test_each_needs_modules_made_of_configs(folder):
    assert sources_of(folder, "each").own_configs == {}
    changed(folder / "b", rms_norm_eps=0.2)
    with pytest.raises(InputError, match="'each' makes a module of each expert's config"):
        Resident(sources_of(folder, "each"), None, CPU)


def test_an_experts_own_row_has_its_own_score(folder):
    """The objective's score of an expert in a worker is that of what transformers loads from the expert's folder."""
    changed(folder / "b", rms_norm_eps=0.2)
    text = folder / "text.txt"
    text.write_text(" ".join(WORDS[:150]))
    settings = PerplexitySettings(name="bits", type="bits_per_byte", data=str(text))
    spec = WorkerSpec(
        experts=(str(folder / "a"), str(folder / "b")),
        base=str(folder / "base"),
        operator="task_arithmetic",
        architecture="auto",
        search=(settings,),
        tokenizer=str(folder / "base"),
    )
    scores = {}
    for choice in ("each", "base", "first"):
        worker = Worker(replace(spec, config=choice))
        trial = Trial(0, Genome.uniform(worker._sources.layout.size, [0.0, 1.0]))
        scores[choice] = worker.measure([trial])[0].scores["bits"]
    objective = worker._objectives["search"][0]
    truth = objective.score(transformers.AutoModelForCausalLM.from_pretrained(folder / "b").eval()).value
    assert scores["each"] == truth
    assert scores["base"] == scores["first"]
    assert abs(scores["base"] - truth) > 1e-3


def test_generation_ends_as_the_experts_own_config_says(folder):
    changed(folder / "b", "generation_config.json", bos_token_id=0, eos_token_id=[1, 7])
    sources = sources_of(folder, "each")
    resident = Resident(sources, "auto", CPU)
    assert list(sources.own_configs) == [1]
    ends = [model.generation_config.eos_token_id for model in shown(resident, rows_of(sources))]
    assert ends == [1, [1, 7]]


def rows_of(sources):
    return [Genome.uniform(sources.layout.size, row) for row in ([1.0, 0.0], [0.0, 1.0])]


# -- recipes ---------------------------------------------------------------------------------------------


def recipe_of(folder, **models):
    (folder / "text.txt").write_text(" ".join(WORDS[:150]))
    return Recipe.from_record(
        {
            "name": "configs",
            "models": {"base": "base", "experts": ["a", "b"], "architecture": "auto", **models},
            "merge": {"operator": "task_arithmetic"},
            "objectives": {"search": [{"name": "bits", "type": "bits_per_byte", "data": "text.txt"}]},
            "search": {"algorithm": "random", "granularity": "model"},
            "scoring": {"batch": 2},
            "budget": {"evaluations": 4},
            "runtime": {"pool": "serial"},
            "tracking": {"mlflow": False},
        },
        folder,
    )


def told(recipe, subject):
    return [finding.text for finding in validate(recipe, headers=True) if finding.subject == subject]


def test_a_run_under_each_scores_exports_and_verifies(folder):
    changed(folder / "b", rms_norm_eps=0.2, use_cache=False)
    assert told(recipe_of(folder, config="each"), "configs") == [
        "merges have that of 'base', an expert alone its own (each): rms_norm_eps is 1e-06 in 'base', 'a' and 0.2 in "
        "'b'; differences in use_cache change no computation"
    ]
    runs = {}
    for choice in ("each", "base"):
        run = launch(recipe_of(folder, config=choice), folder / "runs" / choice)
        runs[choice] = {one.id: one.scores["bits"] for one in run.references()}
        for member in ("best", 0):
            directory = export(run, member, folder / f"{choice}-{member}")
            assert all(one.difference == 0 for one in verify(directory))
    assert runs["each"]["a"] == runs["base"]["a"]
    assert abs(runs["each"]["b"] - runs["base"]["b"]) > 1e-3


def test_mergekit_cannot_give_another_config(folder):
    changed(folder / "a", rms_norm_eps=0.2)
    run = launch(recipe_of(folder, config="first"), folder / "run")
    with pytest.raises(InputError, match=r"models\.config: mergekit gives a merge the config of 'base'"):
        export_mergekit(run, "best", folder / "merge.yaml")


def test_signatures_of_older_recipes_stay(folder):
    """A choice that computes what older versions computed is not signed; their records are read as they ran."""
    plain, base, first = (recipe_of(folder, config=choice) for choice in ("same", "base", "first"))
    assert plain.signature == base.signature != first.signature
    record = plain.record()
    del record["models"]["config"]
    assert Recipe.read_back(record, "0.1").models.config == "base"
    assert Recipe.read_back(record, "0.1").signature == plain.signature
    assert Recipe.read_back(first.record(), "0.1").models.config == "first"
    del record["models"]["base"]
    assert Recipe.read_back({**record, "merge": {"operator": "linear"}}, "0.1").models.config == "first"
    with pytest.raises(InputError, match="'base' needs a base"):
        recipe_of(folder, base=None, config="base")


def test_clashes_of_tokenizers_are_told_where_no_objective_needs_one(folder):
    record = recipe_of(folder).record()
    (folder / "scores.py").write_text("def score(model):\n    return 0.5\n")
    record["objectives"]["search"] = [{"name": "o", "type": "call", "call": "scores.py:score"}]
    recipe = Recipe.from_record(record, folder)
    assert told(recipe, "tokenizers") == []
    for name, token in (("a", "<x>"), ("b", "<y>")):
        vocabulary = json.loads((folder / name / "tokenizer.json").read_text())["model"]["vocab"]
        old = next(text for text, number in vocabulary.items() if number == 300)
        del vocabulary[old]
        changed(folder / name, "tokenizer.json", model__vocab=vocabulary | {token: 300})
    (text,) = told(recipe, "tokenizers")
    assert text == (
        f"In the tokenizers of 'base' and 'a' token 300 differs: {old!r} and '<x>'. "
        f"In the tokenizers of 'base' and 'b' token 300 differs: {old!r} and '<y>'. "
        "Rows of the embeddings are mixed by number."
    )


# -- what travels ----------------------------------------------------------------------------------------


def test_files_travel_from_the_first_that_has_them(folder):
    """A generation config, a chat template and a vocabulary of its own format, of which the base has only the last."""
    changed(folder / "b", "generation_config.json", eos_token_id=[1], temperature=0.5, do_sample=True)
    changed(folder / "base", "generation_config.json")
    (folder / "base" / "generation_config.json").unlink()
    (folder / "a" / "generation_config.json").unlink()
    changed(folder / "a", "tokenizer_config.json", chat_template="{{ messages[0].content }}!")
    (folder / "base" / "base.tiktoken").write_text("x 0")
    (folder / "base" / "LICENSE").write_text("free")
    for name in ("modeling_x.py", "README.md", "trainer_state.json", "model.gguf"):
        (folder / "base" / name).write_text("{}")
    assert told(recipe_of(folder), "files of exports") == [
        "generation_config.json from 'b', as 'base' lacks them; chat_template.jinja from 'a', as 'base' lacks them"
    ]
    sources = sources_of(folder)
    target = export_directory(sources, rows_of(sources)[0], folder / "merged", "card", {})
    found = {file.name for file in target.iterdir()}
    assert {"base.tiktoken", "LICENSE", "tokenizer.json", "chat_template.jinja"} <= found
    assert not {"modeling_x.py", "trainer_state.json", "model.gguf"} & found
    assert (target / "README.md").read_text() == "card"
    assert transformers.GenerationConfig.from_pretrained(target).temperature == 0.5
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert text == "hello!"


def written(place, text="{}"):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)


def test_small_folders_travel(folder):
    base = folder / "base"
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    written(
        base / "modules.json", json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "3"}])
    )
    written(base / "1_Pooling" / "config.json", json.dumps(pooling))
    written(base / "1_Pooling" / "README.md")
    written(base / "additional_chat_templates" / "tool.jinja", "{{ messages }}")
    written(base / "a" / "b" / "c.json")
    stay = ("2_Dense/model.safetensors", "2_Dense/config.json", "onnx/model.onnx", "onnx/config.json", ".git/x.json")
    stay += ("checkpoint-5/x.json", "runs/x.json", "logs/x.txt", "a/b/c/d.json", "3/code.py", "1_Pooling/.x.json")
    for name in stay:
        written(base / name)
    for number in range(65):
        written(base / "data" / f"{number}.json")
    written(base / "a" / "large.json", " " * (8 * 2**20 + 1))
    (text,) = told(recipe_of(folder), "files of exports")
    assert "2_Dense, which modules.json names, does not travel whole: it holds weights of its own (model" in text
    assert "3, which modules.json names, does not travel whole: its code.py is too large, or of no kind that" in text
    assert text.count("modules.json") == 2
    sources = sources_of(folder)
    target = export_directory(sources, rows_of(sources)[0], folder / "merged", "", {})
    found = {file.relative_to(target).as_posix() for file in target.rglob("*") if file.parent != target}
    assert found == {"1_Pooling/config.json", "additional_chat_templates/tool.jinja", "a/b", "a/b/c.json"}
    assert json.loads((target / "1_Pooling" / "config.json").read_text()) == pooling
    assert transformers.AutoTokenizer.from_pretrained(target).chat_template["tool"] == "{{ messages }}"


def test_more_chat_templates_are_the_tokenizer_s(folder):
    """They come from the model whose tokenizer the merge has."""
    for file in (folder / "base").glob("*token*"):
        file.unlink()
    for name in ("base", "a"):
        written(folder / name / "additional_chat_templates" / f"of_{name}.jinja", name)
    sources = sources_of(folder)
    target = export_directory(sources, rows_of(sources)[0], folder / "merged", "", {})
    assert [file.name for file in (target / "additional_chat_templates").iterdir()] == ["of_a.jinja"]


def test_a_generation_config_that_ends_texts_otherwise_stays_behind(folder):
    for name in ("base", "a"):
        (folder / name / "generation_config.json").unlink()
    changed(folder / "b", "generation_config.json", eos_token_id=[1, 7])
    sources = sources_of(folder, "base")
    target = export_directory(sources, rows_of(sources)[0], folder / "merged", "", {})
    assert not (target / "generation_config.json").exists()
    sources = sources_of(folder, "each")
    target = export_directory(sources, rows_of(sources)[1], folder / "expert", "", {})
    assert transformers.GenerationConfig.from_pretrained(target).eos_token_id == [1, 7]


@pytest.mark.parametrize("owner", ["base", "b"])
def test_processors_travel(tmp_path, owner):
    pytest.importorskip("PIL")
    _, paths = saved_family(FAMILIES["llava"], tmp_path)
    save_tokenizer(tmp_path / "words")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "words")
    image = transformers.CLIPImageProcessor(crop_size={"height": 16, "width": 16}, size={"shortest_edge": 16})
    processor = transformers.LlavaProcessor(image, tokenizer, patch_size=8, chat_template="{{ messages }}")
    place = tmp_path / owner
    config = (place / "config.json").read_text()
    processor.save_pretrained(place)
    (place / "config.json").write_text(config)
    sources = Sources.open(paths[1:], paths[0], "task_arithmetic")
    target = export_directory(sources, rows_of(sources)[0], tmp_path / "merged", "", {})
    loaded = transformers.AutoProcessor.from_pretrained(target)
    assert type(loaded) is type(processor)
    assert (
        loaded.image_processor.to_dict() == transformers.AutoProcessor.from_pretrained(place).image_processor.to_dict()
    )
    assert loaded.chat_template == "{{ messages }}"
    assert loaded.tokenizer("hello").input_ids == tokenizer("hello").input_ids
    model = transformers.LlavaForConditionalGeneration.from_pretrained(target)
    assert model.config.text_config.hidden_size == 32


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_modules_of_own_configs_in_all_families(tmp_path, name):
    """A module that shares another's tensors computes the same, bit for bit, with the same config."""
    from ecotone.merging.models.architectures import loaded, sharing

    family = FAMILIES[name]
    config, paths = saved_family(family, tmp_path)
    checkpoint = opened(paths[0])
    module = loaded(checkpoint, torch.float32).eval()
    own = sharing(checkpoint, module)
    assert all(ours is theirs for ours, theirs in zip(own.parameters(), module.parameters(), strict=True))
    torch.manual_seed(1)
    inputs = family.inputs(config)

    def outputs(model):
        torch.manual_seed(0)
        with torch.no_grad():
            return [value for value in model(**inputs).values() if isinstance(value, torch.Tensor)]

    assert all(map(torch.equal, outputs(module), outputs(own)))


EXAMPLES = ("llama", "t5", "phimoe", "nllb_moe", "esm")
UNSEEN = ("output_attentions", "output_hidden_states", "output_router_logits", "use_cache", "return_dict", "vocab_size")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in EXAMPLES else pytest.mark.slow) for name in FAMILIES]
)
def test_fields_that_do_not_count_change_nothing_in_any_family(name):
    """But for what outputs there are, sizes, and ties, which are compared where tensors are."""
    family = FAMILIES[name]
    kind = getattr(transformers, family.model)
    config = kind.config_class(**family.arguments)
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    torch.manual_seed(1)
    inputs = family.inputs(config)
    expected = numbers(model, inputs)
    changed = 0
    for path, value in fields(config.to_dict()):
        other = another(value)
        records = [{path: one, "is_encoder_decoder": config.is_encoder_decoder} for one in (value, other)]
        skipped = path.rpartition(".")[2] in (*UNSEEN, *configs._TIES) and not config.is_encoder_decoder
        if other is None or path.rpartition(".")[2] in UNSEEN or skipped or configs._matters(path, records):
            continue
        record = config.to_dict()
        place = record
        for step in path.split(".")[:-1]:
            place = place[step]
        place[path.rpartition(".")[2]] = other
        try:
            made = kind(kind.config_class.from_dict(record)).eval()
        except ValueError:  # a value that the family does not take
            continue
        made.load_state_dict(model.state_dict(), strict=False)
        found = numbers(made, inputs)
        assert len(found) == len(expected), path
        assert all(map(partial(torch.allclose, atol=1e-4, equal_nan=True), found, expected)), path
        changed += 1
    assert changed > 0


def fields(record, prefix=""):
    """The fields of a config and of the configs in it, by dotted name."""
    for name, value in record.items():
        if not isinstance(value, dict):
            yield prefix + name, value
        elif "model_type" in value:
            yield from fields(value, f"{prefix}{name}.")


def another(value):
    """Another value of the kind; None for kinds that have none of themselves."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return (value + 0.25 if value < 0.7 else value - 0.25) if isinstance(value, float) else None


def numbers(model, inputs):
    torch.manual_seed(0)
    with torch.no_grad():
        return [one for one in flat(model(**inputs)) if one.is_floating_point()]
