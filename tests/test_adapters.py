"""Adapters of every kind beside PEFT itself: what PEFT merges, transformers saves and we read must be one."""

import json
import shutil
from typing import ClassVar

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file

import ecotone.merging.models.low_rank
from ecotone.fitness.backends.resident import Resident
from ecotone.merging.adapters import merged_adapter
from ecotone.merging.export import export_adapter, export_directory
from ecotone.merging.models import lora_bases
from ecotone.merging.models.checkpoint import Checkpoint
from ecotone.merging.models.formats import opened as opened_as
from ecotone.merging.models.lora import Adapter
from ecotone.merging.models.lora_changes import Elements, parts_of
from ecotone.merging.models.names import Place
from ecotone.merging.sources import Sources
from ecotone.populations.errors import CheckpointError
from ecotone.populations.genome import Genome
from ecotone.testing.models import ModelSuite

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def base_of(family, folder, **more):
    """A random model of a family, saved; returns its class."""
    kind = getattr(transformers, FAMILIES[family].model)
    torch.manual_seed(0)
    model = kind(kind.config_class(**{**FAMILIES[family].arguments, **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return kind


def trained(kind, base, folder, seed=0, rows=None, **options):
    """An adapter of PEFT's with random weights in ``folder``; its merged weights, as transformers saves them."""
    model = kind.from_pretrained(base)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(folder)
    merged = folder.with_name(f"{folder.name}-merged")
    wrapped.merge_and_unload().save_pretrained(merged)
    return load_file(merged / "model.safetensors")


STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "use_dora": True}),
    "transposed dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "convolutions dora": ("vit", {"target_modules": ["projection", "q_proj"], "use_dora": True}),
    "a whole parameter": ("llama", {"target_modules": ["q_proj"], "target_parameters": ["mlp.down_proj.weight"]}),
    "experts": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": STACKS}),
    "some experts": ("qwen3_moe", {"target_parameters": STACKS[1:], "rank_pattern": {STACKS[1]: 3}}),
    "experts (in, out)": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": STACKS}),
    "old names of experts": ("mixtral", {"target_modules": ["v_proj"], "target_parameters": STACKS}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3, 4, 63, 0]}),
    "tokens of both": ("llama", {"trainable_token_indices": {"lm_head": [2], "embed_tokens": [5, 1]}}),
    "gpt_neox": ("gpt_neox", {"target_modules": ["query_key_value", "dense", "embed_in"], "bias": "all"}),
    "qwen2_5_vl": ("qwen2_5_vl", {"target_modules": "all-linear"}),
    "vit": ("vit", {"target_modules": ["q_proj", "fc1"], "modules_to_save": ["classifier"], "bias": "lora_only"}),
    "bert": ("bert", {"target_modules": ["query", "dense"]}),
    "split in the module": ("nomic_bert", {"target_modules": "all-linear"}),
}
FAST = ("dora", "experts", "tokens", "gpt_neox", "vit")


@pytest.mark.parametrize("case", [one if one in FAST else pytest.param(one, marks=pytest.mark.slow) for one in CASES])
def test_agrees_with_what_peft_merges(tmp_path, case):
    family, options = CASES[case]
    if "target_modules" not in options:
        options = {"target_modules": ["q_proj"], **options}
    kind = base_of(family, tmp_path / "base", tie_word_embeddings=False)
    expected = trained(kind, tmp_path / "base", tmp_path / "adapter", **options)
    expert = Adapter.open(tmp_path / "adapter", Checkpoint.open(tmp_path / "base"))
    assert set(expert.tensors) >= set(expected)
    changed = {name for name, tensor in expected.items() if not torch.equal(tensor, expert.base.tensor(name))}
    assert changed
    assert changed <= set(expert.changes)
    for name, tensor in expected.items():
        assert expert.tensors[name].shape == tensor.shape
        torch.testing.assert_close(expert.tensor(name), tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["lm_head", "embed_tokens"]}, {"trainable_token_indices": [65]}]
)
def test_a_vocabulary_that_was_resized(tmp_path, options, tied):
    if tied and "modules_to_save" in options:
        pytest.skip("PEFT trains two copies of what is tied")
    kind = base_of("llama", tmp_path / "base", tie_word_embeddings=tied)
    expected = trained(kind, tmp_path / "base", tmp_path / "a", rows=68, target_modules=["q_proj"], **options)
    expert = Adapter.open(tmp_path / "a", Checkpoint.open(tmp_path / "base"))
    assert expert.rows == 68
    for name, tensor in expected.items():
        torch.testing.assert_close(expert.tensor(name), tensor, rtol=1e-5, atol=1e-6, msg=name)
    sources = Sources.open([tmp_path / "a"], tmp_path / "base", "task_arithmetic", vocabulary="union")
    assert sources.layout.parameters["model.embed_tokens.weight"].shape == (68, 32)
    assert torch.equal(
        sources.experts[0].tensor("model.embed_tokens.weight"), expert.tensor("model.embed_tokens.weight")
    )


def test_a_resized_vocabulary_that_no_list_names(tmp_path):
    """Mamba's embeddings: 68 rows in the adapter where the base's config says 64."""
    name = "backbone.embeddings.weight"
    kind = base_of("mamba", tmp_path / "base", tie_word_embeddings=False)
    save = ["embeddings", "lm_head"]
    model = kind.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(68, mean_resizing=False)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["x_proj"], modules_to_save=save))
    wrapped.save_pretrained(tmp_path / "a")
    expected = wrapped.merge_and_unload().state_dict()
    expert = Adapter.open(tmp_path / "a", Checkpoint.open(tmp_path / "base"))
    assert expert.rows == 68
    assert torch.equal(expert.tensor(name), expected[name])
    sources = Sources.open([tmp_path / "a"], tmp_path / "base", "task_arithmetic", vocabulary="union")
    assert sources.layout.parameters[name].shape == (68, 16)
    assert sources.origin.config["vocab_size"] == 68


def test_what_is_saved_is_read_and_not_its_frozen_original(tmp_path):
    kind = base_of("llama", tmp_path / "base", tie_word_embeddings=False)
    trained(kind, tmp_path / "base", tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"])
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    head = tensors.pop("base_model.model.lm_head.weight")
    saved = {"lm_head.modules_to_save.weight": head, "lm_head.original_module.weight": torch.zeros_like(head)}
    save_file(tensors | {f"base_model.model.{name}": tensor for name, tensor in saved.items()}, file)
    expert = Adapter.open(tmp_path / "a", Checkpoint.open(tmp_path / "base"))
    assert torch.equal(expert.tensor("lm_head.weight"), head)


def test_trained_tokens_keep_a_tie_and_two_tables_break_it(tmp_path):
    kind = base_of("llama", tmp_path / "base", tie_word_embeddings=True)
    base = Checkpoint.open(tmp_path / "base")
    trained(kind, tmp_path / "base", tmp_path / "one", target_modules=["q_proj"], trainable_token_indices=[3, 9])
    expert = Adapter.open(tmp_path / "one", base)
    changed = (expert.tensor("model.embed_tokens.weight") != base.tensor("model.embed_tokens.weight")).any(dim=1)
    assert changed.nonzero().view(-1).tolist() == [3, 9]
    two = {"lm_head": [3], "embed_tokens": [9]}
    trained(kind, tmp_path / "base", tmp_path / "two", target_modules=["q_proj"], trainable_token_indices=two)
    expert = Adapter.open(tmp_path / "two", base)
    before = base.tensor("model.embed_tokens.weight")
    for name, row in (("lm_head.weight", 3), ("model.embed_tokens.weight", 9)):
        assert (expert.tensor(name) != before).any(dim=1).nonzero().view(-1).tolist() == [row]


@pytest.mark.parametrize(("family", "bare"), [("llama", "LlamaModel"), ("bert", "BertModel"), ("vit", "ViTModel")])
def test_adapters_of_the_model_without_its_head(tmp_path, family, bare):
    base_of(family, tmp_path / "base")
    target = "query" if family == "bert" else "q_proj"
    kind = getattr(transformers, bare)
    expected = trained(kind, tmp_path / "base", tmp_path / "a", target_modules=[target])
    expert = Adapter.open(tmp_path / "a", Checkpoint.open(tmp_path / "base"))
    prefix = {"llama": "model.", "bert": "bert.", "vit": "vit."}[family]
    assert len(expert.changes) == 2
    for name in expert.changes:
        merged = expected.get(name.removeprefix(prefix), expected.get(name))
        torch.testing.assert_close(expert.tensor(name), merged, rtol=1e-5, atol=1e-6)


def test_a_bias_that_the_base_has_not(tmp_path):
    kind = base_of("llama", tmp_path / "base")
    wrapped = peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), peft.LoraConfig(r=2, lora_bias=True))
    wrapped.save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"no 'model\.layers.*\.bias': PEFT cannot merge it, either"):
        Adapter.open(tmp_path / "a", Checkpoint.open(tmp_path / "base"))


def test_tokens_that_the_configuration_does_not_number(tmp_path):
    kind = base_of("llama", tmp_path / "base")
    trained(kind, tmp_path / "base", tmp_path / "a", target_modules=["q_proj"], trainable_token_indices=[3, 9])
    change(tmp_path / "a", trainable_token_indices=[3])
    with pytest.raises(CheckpointError, match=r"expected a row of 'model\.embed_tokens\.weight'.*found \[3\]"):
        Adapter.open(tmp_path / "a", Checkpoint.open(tmp_path / "base"))


def test_pieces_of_dora_have_the_bits_of_the_whole(tmp_path, monkeypatch):
    kind = base_of("llama", tmp_path / "base", tie_word_embeddings=False)
    options: ClassVar = {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}
    trained(kind, tmp_path / "base", tmp_path / "a", **options)
    base = Checkpoint.open(tmp_path / "base")
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"):
        whole = Adapter.open(tmp_path / "a", base).flat(name).formed()
        monkeypatch.setattr(ecotone.merging.models.low_rank, "CHUNK", 7)
        flat = Adapter.open(tmp_path / "a", base).flat(name)
        for low, high in ((0, 1), (31, 33), (5, 600), (100, 1024)):
            assert torch.equal(flat[low:high].formed(), whole[low:high])
            assert torch.equal(flat[3:].to(torch.device("cpu"))[low:high].formed(), whole[low + 3 : high + 3])


def test_a_stack_that_is_no_rectangle_is_formed_by_its_elements(tmp_path):
    kind = base_of("nomic_bert", tmp_path / "base")
    trained(kind, tmp_path / "base", tmp_path / "a", target_modules="all-linear")
    expert = Adapter.open(tmp_path / "a", Checkpoint.open(tmp_path / "base"))
    kinds = {type(one) for changes in expert.changes.values() for one in changes}
    assert Elements in kinds
    (name,) = [n for n, changes in expert.changes.items() if isinstance(changes[0], Elements)][:1]
    assert expert.working_bytes(name) >= expert.tensors[name].nbytes


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [
        ((5, 7), (7, 1), 0),  # the first matrix
        ((5, 7), (7, 1), 70),  # the third
        ((2, 7), (7, 1), 35 + 14),  # some rows of the second
        ((7, 5), (1, 7), 35),  # transposed
        ((3, 2), (7, 1), 36),  # a corner
        ((3, 7), (14, 1), 0),  # every second row
        ((3, 5, 7), (35, 7, 1), 0),  # all
        ((2, 7, 5), (35, 1, 7), 35),  # the last two, transposed
    ],
)
def test_parts_of_stacks(shape, stride, offset):
    stack = torch.arange(3 * 5 * 7).view(3, 5, 7)
    place = Place("name", "target", shape, stride, offset)
    parts = parts_of(place, (3, 5, 7))
    found = [stack[one.expert][one.rows, one.columns] for one in parts]
    found = [one.T if part.flipped else one for one, part in zip(found, parts, strict=True)]
    assert torch.equal(torch.cat([one.reshape(-1) for one in found]), place.of(stack).reshape(-1))


@pytest.mark.parametrize(("shape", "stride", "offset"), [((35,), (1,), 0), ((7, 5), (5, 1), 0), ((5, 3), (7, 35), 0)])
def test_places_that_are_no_parts(shape, stride, offset):
    assert parts_of(Place("name", "target", shape, stride, offset), (3, 5, 7)) is None


# -- the base of an adapter ----------------------------------------------------------------------------------------


def change(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.fixture
def pair(tmp_path):
    kind = base_of("llama", tmp_path / "base")
    trained(kind, tmp_path / "base", tmp_path / "a", target_modules=["q_proj"])
    return tmp_path / "base", tmp_path / "a"


def checked(base, adapter):
    return lora_bases.check(Adapter.open(adapter, Checkpoint.open(base)))


def test_the_named_base_is_compared_by_content(pair, tmp_path, monkeypatch):
    base, adapter = pair
    assert checked(base, adapter).verdict == "same"
    copy = shutil.copytree(base, tmp_path / "copy")
    assert checked(copy, adapter).verdict == "same"
    half = {name: tensor.bfloat16() for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(half, copy / "model.safetensors", {"format": "pt"})
    assert checked(copy, adapter).verdict == "same"
    half["model.layers.1.mlp.up_proj.weight"][3, 5] += 1
    save_file(half, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"first in 'model\.layers\.1\.mlp\.up_proj\.weight'.*name '.*copy' as"):
        checked(copy, adapter)
    change(adapter, base_model_name_or_path=str(copy))
    assert checked(copy, adapter).verdict == "same"
    monkeypatch.setattr(lora_bases, "ALL_BYTES", 0)
    assert "sample" in checked(shutil.copytree(copy, tmp_path / "again"), adapter).text


@pytest.mark.parametrize(
    ("settings", "verdict", "text"),
    [
        ({"base_model_name_or_path": None}, "unknown", "names no base"),
        ({"base_model_name_or_path": "some/base"}, "named", "the weights were not compared"),
        ({"base_model_name_or_path": "some/other"}, "renamed", "Warning: it names the base 'some/other'"),
        ({"base_model_name_or_path": "some/other", "revision": "v2"}, "renamed", "'some/other@v2'"),
    ],
)
def test_else_by_name(pair, settings, verdict, text, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base, adapter = pair
    change(adapter, **settings)
    found = checked(base, adapter)
    assert found.verdict == verdict
    assert text in found.text


# -- adapters that are refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
            "peft_type 'IA3'.*merge_and_unload",
        ),
        (lambda: peft.VeraConfig(target_modules=["q_proj"]), "'VERA'.*merge_and_unload"),
        (lambda: peft.LoHaConfig(target_modules=["q_proj"]), "peft_type 'LOHA'.*merge_and_unload"),
        (lambda: peft.OFTConfig(target_modules=["q_proj"], r=0, oft_block_size=4), "'OFT'.*merge_and_unload"),
        (lambda: peft.IA3Config(task_type="SEQ_CLS"), "AutoPeftModelForSequenceClassification as M"),
        (lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "changes no weight"),
    ],
)
def test_other_kinds_are_refused_with_the_way_out(pair, config, message):
    base, adapter = pair
    shutil.rmtree(adapter)
    peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(base), config()).save_pretrained(adapter)
    with pytest.raises(CheckpointError, match=message):
        Adapter.open(adapter, Checkpoint.open(base))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora_unet_down_blocks_0_attn1_to_q.lora_down.weight", "LyCORIS and Kohya"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a", "LyCORIS and Kohya"),
        ("lycoris_layers_0_self_attn_q_proj.lokr_w1", "LyCORIS and Kohya"),
        ("base_model.model.q_proj.hada_w1_a", "Give the directory that holds it and its adapter_config"),
        ("base_model.model.q_proj.lora_A.weight", "Give the directory that holds it and its adapter_config"),
    ],
)
def test_files_of_other_programs_adapters(tmp_path, name, message):
    save_file({name: torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=message):
        opened_as(tmp_path / "lora.safetensors")


def renamed(adapter, name_of, **settings):
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name_of(name): tensor for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | settings))


def as_kohya(name):
    module, _, factor = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
    return f"lora_unet_{module.replace('.', '_')}.{ {'lora_A': 'lora_down', 'lora_B': 'lora_up'}[factor] }.weight"


@pytest.mark.parametrize("kind", ["LORA", "LOHA"])
def test_names_of_other_programs_beside_peft_s_config(pair, kind):
    """PEFT loads no tensor of these names and gives back the base, so it is not advised."""
    base, adapter = pair
    renamed(adapter, as_kohya, peft_type=kind)
    with pytest.raises(CheckpointError, match=r"Kohya's programs name.*with the program that made it") as caught:
        Adapter.open(adapter, Checkpoint.open(base))
    assert "merge_and_unload" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "PEFT would not load it"),
        ({"peft_type": None}, "PEFT would not load it"),
        ({"alora_invocation_tokens": [1]}, "PEFT cannot merge it"),
        ({"layer_replication": [[0, 1]]}, "PEFT cannot merge it"),
        ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "lora_ga"}, "path_initial_model_for_weight_conversion"),
    ],
)
def test_peft_is_advised_only_where_it_merges_the_adapter(pair, settings, message):
    base, adapter = pair
    renamed(adapter, lambda name: name.removeprefix("base_model.model."), **settings)
    with pytest.raises(CheckpointError, match=message) as caught:
        Adapter.open(adapter, Checkpoint.open(base))
    assert "merge_and_unload" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("known", ["task", "class", "nothing"])
def test_the_advised_command_merges_the_adapter(pair, monkeypatch, known):
    base, adapter = pair
    shutil.rmtree(adapter)
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    config.task_type = "CAUSAL_LM" if known == "task" else None
    wrapped = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, tensor in wrapped.named_parameters():
            tensor.add_(torch.randn_like(tensor) if "ia3" in name else 0)
    wrapped.save_pretrained(adapter)
    if known == "nothing":
        renamed(adapter, str, auto_mapping=None)
    with pytest.raises(CheckpointError, match="python -c") as caught:
        Adapter.open(adapter, Checkpoint.open(base))
    monkeypatch.chdir(adapter.parent)
    exec(str(caught.value).split('python -c "')[1].rpartition('"')[0])
    found = load_file(adapter.parent / f"{adapter.name}-merged" / "model.safetensors")
    expected = wrapped.merge_and_unload().state_dict()
    plain = load_file(base / "model.safetensors")
    assert any(not torch.equal(found[name], plain[name]) for name in found)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name])


# -- as models of a merge ------------------------------------------------------------------------------------------


class OfPeft(ModelSuite):
    """The suite of every model, over an adapter of PEFT's."""

    family: ClassVar[str] = "llama"
    options: ClassVar[dict[str, object]] = {}

    @pytest.fixture
    def folder(self, tmp_path):
        kind = base_of(self.family, tmp_path / "base", tie_word_embeddings=False)
        trained(kind, tmp_path / "base", tmp_path / "a", **self.options)
        return tmp_path

    @pytest.fixture
    def base(self, folder):
        return Checkpoint.open(folder / "base")

    @pytest.fixture
    def model(self, folder, base):
        return Adapter.open(folder / "a", base)


class TestDora(OfPeft):
    options: ClassVar = {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}


@pytest.mark.slow
class TestTrainedTokens(OfPeft):
    options: ClassVar = {"target_modules": ["q_proj"], "trainable_token_indices": [0, 9, 8, 63]}


class TestExperts(OfPeft):
    family = "qwen3_moe"
    options: ClassVar = {"target_modules": ["q_proj"], "target_parameters": STACKS}


@pytest.mark.slow
class TestStacks(OfPeft):
    family = "gpt_oss"
    options: ClassVar = {"target_modules": ["q_proj"], "target_parameters": STACKS}


@pytest.mark.slow
class TestElements(OfPeft):
    family = "nomic_bert"
    options: ClassVar = {"target_modules": "all-linear"}


L = ["q_proj", "v_proj"]
TIED = {
    "both saved": {"target_modules": L, "modules_to_save": ["lm_head", "embed_tokens"]},
    "head saved": {"target_modules": L, "modules_to_save": ["lm_head"]},
    "embeddings saved": {"target_modules": L, "modules_to_save": ["embed_tokens"]},
    "embeddings changed": {"target_modules": [*L, "embed_tokens"]},
    "head changed": {"target_modules": [*L, "lm_head"]},
}


class TestTiedBase:
    @pytest.mark.parametrize("case", TIED)
    def test_an_adapter_that_unties_computes_as_peft_does(self, case, tmp_path):
        """PEFT computes with the adapter beside the base; merged in place, it would change a tied head, too."""
        kind = base_of("llama", tmp_path / "base", tie_word_embeddings=True)
        paths = [tmp_path / name for name in ("one", "two")]
        for seed, path in enumerate(paths):
            trained(kind, tmp_path / "base", path, seed, **(TIED[case] if seed else {"target_modules": L}))
        sources = Sources.open(paths, tmp_path / "base", "task_arithmetic")
        resident = Resident(sources, "auto", torch.device("cpu"), stack_bytes=0)
        tokens = torch.arange(3, 12).reshape(1, -1)
        for path in paths:
            beside = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), path).eval()
            with torch.no_grad():
                expected, found = beside(tokens).logits, resident.expert(path.name)(tokens).logits
            torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
        assert "lm_head.weight" in sources.layout.parameters
        genome = Genome.uniform(sources.layout.size, [0.4, 0.7])
        exported = export_directory(sources, genome, tmp_path / "export", "", {})
        (shown,) = resident.show([genome])
        with torch.no_grad():
            assert torch.equal(kind.from_pretrained(exported).eval()(tokens).logits, shown(tokens).logits)

    def test_changes_that_peft_ties_are_refused(self, tmp_path):
        kind = base_of("llama", tmp_path / "base", tie_word_embeddings=True)
        options = {"target_modules": [*L, "embed_tokens"], "ensure_weight_tying": True}
        trained(kind, tmp_path / "base", tmp_path / "one", **options)
        with pytest.raises(CheckpointError, match="together they are no tied model"):
            Sources.open([tmp_path / "one"], tmp_path / "base", "task_arithmetic")

    @pytest.mark.parametrize("case", ["head changed", "embeddings changed", "both saved"])
    def test_a_merge_of_such_adapters_is_served_beside_the_base(self, case, tmp_path):
        kind = base_of("llama", tmp_path / "base", tie_word_embeddings=True)
        paths = [tmp_path / name for name in ("one", "two")]
        for seed, path in enumerate(paths):
            trained(kind, tmp_path / "base", path, seed, **TIED[case])
        sources = Sources.open(paths, tmp_path / "base", "task_arithmetic")
        genome = Genome.uniform(sources.layout.size, [0.4, 0.7])
        merged = merged_adapter(sources, genome)
        assert any("Serve it beside its base, which is tied" in note for note in merged.notes)
        export_adapter(merged, tmp_path / "served", tmp_path / "none", "", {})
        beside = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "served").eval()
        (shown,) = Resident(sources, "auto", torch.device("cpu"), stack_bytes=0).show([genome])
        tokens = torch.arange(3, 12).reshape(1, -1)
        with torch.no_grad():
            torch.testing.assert_close(shown(tokens).logits, beside(tokens).logits, atol=3e-6, rtol=1e-5)
