"""Names on disk and in memory: extra tensors, old names, prefixes, split and stacked tensors; refusals in words."""

import re
from dataclasses import replace

import pytest
import torch
import transformers
from families import FAMILIES, PLAIN, check, materialised, opened
from safetensors.torch import load_file
from torch import nn
from transformers import conversion_mapping
from transformers.core_model_loading import Chunk, Transpose, WeightConverter

from ecotone.experiments.checks import _architecture
from ecotone.fitness.backends.resident import Resident
from ecotone.merging.export import export_directory
from ecotone.merging.models.names import Scattered, fitted
from ecotone.populations.errors import InputError


def outline(name):
    """The module of a family, without memory."""
    kind = getattr(transformers, FAMILIES[name].model)
    with torch.device("meta"):
        return kind(kind.config_class(**FAMILIES[name].arguments))


def stored(name, folder):
    """The shapes of the tensors that transformers saves."""
    kind = getattr(transformers, FAMILIES[name].model)
    kind(kind.config_class(**FAMILIES[name].arguments)).save_pretrained(folder)
    return {key: tuple(tensor.shape) for key, tensor in load_file(folder / "model.safetensors").items()}


def renamed(pattern, replacement):
    return lambda tensors: {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}


EXTRA = {
    "mtp": ("llama", {"mtp.fc.weight": (8, 4), "mtp.layers.0.norm.weight": (8,)}),
    "value head": ("llama", {"v_head.summary.weight": (1, 32), "v_head.summary.bias": (1,)}),
    "inv_freq": ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}),
    "cls": ("bert_classifier", {"cls.predictions.bias": (64,), "cls.seq_relationship.weight": (2, 32)}),
    "numbers": ("bert", {"bert.embeddings.position_ids": None}),
}


class TestTensorsThatTransformersIgnores:
    @pytest.mark.parametrize("kind", EXTRA)
    def test_they_are_merged_and_exported_like_the_others(self, kind, tmp_path):
        family, extra = EXTRA[kind]
        numbers = iter(range(100))

        def added(tensors):
            generator = torch.Generator().manual_seed(next(numbers))
            more = {
                name: torch.arange(32) if shape is None else torch.randn(shape, generator=generator)
                for name, shape in extra.items()
            }
            return tensors | more

        case = opened(family, tmp_path, added)
        found, exported = check(case, tmp_path)
        assert set(found.unused) == set(extra)
        expected, written = materialised(case), load_file(exported / "model.safetensors")
        for name in extra:
            assert torch.equal(written[name], expected[name])

    def test_validate_counts_them(self, tmp_path):
        case = opened("llama", tmp_path, lambda tensors: tensors | {"mtp.fc.weight": torch.ones(8, 4)})
        found = {finding.subject: finding.text for finding in _architecture(case.sources)}
        assert found["not loaded"] == (
            "1 tensor (mtp.fc.weight) that the architecture does not load: merged and exported like the others"
        )

    def test_a_module_of_ones_own_has_a_place_for_each(self):
        with pytest.raises(InputError, match=r"expected a tensor 'head.weight' of shape .*found none"):
            fitted(nn.Sequential(nn.Linear(4, 3)), {"0.weight": (3, 4), "0.bias": (3,), "head.weight": (2, 3)})


class TestOtherNames:
    def test_gamma_and_beta_are_weight_and_bias(self, tmp_path):
        def old(tensors):
            tensors = renamed(r"LayerNorm\.weight$", "LayerNorm.gamma")(tensors)
            return renamed(r"LayerNorm\.bias$", "LayerNorm.beta")(tensors)

        case = opened("bert", tmp_path, old)
        found, exported = check(case, tmp_path)
        assert found.places["bert.embeddings.LayerNorm.gamma"].target == "bert.embeddings.LayerNorm.weight"
        assert "bert.embeddings.LayerNorm.gamma" in load_file(exported / "model.safetensors")

    def test_the_base_models_prefix_may_lack(self, tmp_path):
        case = opened("gpt2", tmp_path, renamed(r"^transformer\.", ""), lambda name: f"transformer.{name}")
        found, exported = check(case, tmp_path)
        assert found.places["wte.weight"].target == "transformer.wte.weight"
        assert "wte.weight" in load_file(exported / "model.safetensors")

    def test_the_base_models_prefix_may_be_too_many(self, tmp_path):
        shapes = stored("wav2vec2", tmp_path)
        kind = transformers.Wav2Vec2Model
        with torch.device("meta"):
            found = fitted(kind(kind.config_class(**FAMILIES["wav2vec2"].arguments)), shapes)
        place = found.places["wav2vec2.encoder.layer_norm.weight"]
        assert (place.target, place.whole) == ("encoder.layer_norm.weight", True)
        assert found.unused == ("lm_head.bias", "lm_head.weight")

    @pytest.mark.parametrize(
        ("family", "name", "like"),
        [
            ("bert", "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
            ("gpt2", "lm_head.weight", "transformer.wte.weight"),
        ],
    )
    def test_a_tied_tensor_may_be_stored_twice(self, family, name, like, tmp_path):
        found, _ = check(opened(family, tmp_path, lambda tensors: tensors | {name: tensors[like].clone()}), tmp_path)
        assert found.places[name].target == name

    @pytest.mark.parametrize(
        ("family", "name", "like"),
        [
            ("roberta", "lm_head.decoder.bias", "lm_head.bias"),
            ("bert", "cls.predictions.decoder.bias", "cls.predictions.bias"),
        ],
    )
    def test_tensors_that_are_equal_in_the_base_alone_are_not_tied(self, family, name, like, tmp_path):
        """transformers ties the base's when it loads them, and leaves an export's apart."""
        numbers = iter(range(3))
        change = lambda tensors: tensors | {name: tensors[like] + 0.1 * next(numbers)}  # noqa: E731
        found, _ = check(opened(family, tmp_path, change), tmp_path)
        assert found.places[name].target == name


class TestStackedTensors:
    def test_many_experts_are_stacked_in_the_order_of_their_numbers(self, tmp_path, monkeypatch):
        many = replace(FAMILIES["qwen3_moe"], arguments={**FAMILIES["qwen3_moe"].arguments, "num_experts": 12})
        monkeypatch.setitem(FAMILIES, "qwen3_moe", many)
        found, _ = check(opened("qwen3_moe", tmp_path), tmp_path)
        first, tenth = (found.places[f"model.layers.0.mlp.experts.{i}.down_proj.weight"] for i in (1, 10))
        assert first.target == tenth.target == "model.layers.0.mlp.experts.down_proj"
        assert tenth.offset == 10 * first.offset

    @pytest.mark.skipif(transformers.__version__.startswith("5.0."), reason="saves them one by one as it has them")
    def test_checkpoints_may_hold_them_stacked(self, tmp_path):
        def stacked(tensors):
            rest = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
            for layer in range(2):
                experts = f"model.layers.{layer}.mlp.experts"
                each = [
                    [tensors[f"{experts}.{i}.{kind}_proj.weight"] for i in range(4)] for kind in ("gate", "up", "down")
                ]
                gate, up, down = map(torch.stack, each)
                rest |= {f"{experts}.gate_up_proj": torch.cat([gate, up], 1), f"{experts}.down_proj": down}
            return rest

        found, _ = check(opened("qwen3_moe", tmp_path, stacked), tmp_path)
        assert found.places["model.layers.0.mlp.experts.gate_up_proj"].whole

    @pytest.mark.parametrize("name", ["qwen3_moe", "nomic_bert"])
    def test_a_module_of_another_type_is_rounded_once(self, name, tmp_path):
        case = opened(name, tmp_path)
        model = Resident(case.sources, "auto", torch.device("cpu"), torch.bfloat16)
        (module,) = model.show([case.genome])
        exported = export_directory(case.sources, case.genome, tmp_path / "export", "", {}, "bfloat16")
        plain = type(module).from_pretrained(exported, dtype=torch.bfloat16).state_dict()
        assert all(torch.equal(tensor, plain[key]) for key, tensor in module.state_dict().items())


class TestSplitTensors:
    @pytest.mark.parametrize("name", ["nomic_bert", "gte", "jina_embeddings_v3"])
    def test_a_tensor_may_lie_in_several_of_the_modules(self, name, tmp_path):
        found, _ = check(opened(name, tmp_path), tmp_path)
        assert found.scattered
        assert all(len(one.targets) > 1 for one in found.scattered.values())

    def test_values_and_gradients_of_a_split_and_transposed_tensor(self, monkeypatch):
        """Like a fused projection that is stored transposed."""
        with torch.device("meta"):
            module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**PLAIN, num_key_value_heads=4))
        shapes = {name: tuple(one.shape) for name, one in module.state_dict().items()}
        parts = [f"self_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj")]
        targets = [f"model.layers.0.{part}" for part in parts]
        shapes = {name: shape for name, shape in shapes.items() if name not in targets}
        shapes["model.layers.0.self_attn.qkv.weight"] = (32, 96)
        converter = WeightConverter("self_attn.qkv.weight", parts, operations=[Transpose(0, 1), Chunk(dim=0)])
        monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [converter])

        (one,) = fitted(module, shapes).scattered.values()
        assert isinstance(one, Scattered)
        state = {name: torch.zeros(32, 32) for name in targets}
        fused = torch.randn(32, 96)
        one.put(fused, state)
        assert torch.equal(torch.cat(list(state.values())).T, fused)
        assert torch.equal(one.take(state, fused), fused)


class TestRefusals:
    def test_two_tensors_that_are_loaded_as_one(self, tmp_path):
        shapes = stored("bert", tmp_path)
        twice = shapes | {"bert.embeddings.LayerNorm.gamma": (32,)}
        with pytest.raises(InputError, match=r"LayerNorm\.gamma and .*LayerNorm\.weight .* are both loaded as"):
            fitted(outline("bert"), twice)

    def test_with_a_prefix_and_without(self, tmp_path):
        shapes = stored("gpt2", tmp_path)
        with pytest.raises(InputError, match=r"transformer\.wte\.weight and wte\.weight .* are both loaded as"):
            fitted(outline("gpt2"), shapes | {"wte.weight": shapes["transformer.wte.weight"]})

    def test_another_shape(self, tmp_path):
        shapes = stored("llama", tmp_path) | {"model.norm.weight": (48,)}
        with pytest.raises(InputError, match=r"model\.norm\.weight: expected shape \(48,\).*found \(32,\)"):
            fitted(outline("llama"), shapes)

    def test_a_tensor_that_the_checkpoints_lack(self, tmp_path):
        shapes = stored("llama", tmp_path)
        del shapes["model.layers.1.mlp.up_proj.weight"]
        with pytest.raises(InputError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' .* is in no checkpoint"):
            fitted(outline("llama"), shapes)

    def test_an_expert_of_another_shape(self, tmp_path):
        shapes = stored("qwen3_moe", tmp_path) | {"model.layers.0.mlp.experts.1.up_proj.weight": (8, 32)}
        with pytest.raises(InputError, match=r"transformers cannot convert model\.layers\.0\.mlp\.experts.*Error"):
            fitted(outline("qwen3_moe"), shapes)

    def test_an_expert_too_few(self, tmp_path):
        shapes = stored("qwen3_moe", tmp_path)
        shapes = {name: shape for name, shape in shapes.items() if "layers.1.mlp.experts.3." not in name}
        with pytest.raises(InputError, match=r"are a tensor .*experts.* of shape \(3, .*expected one of shape \(4, "):
            fitted(outline("qwen3_moe"), shapes)

    def test_half_an_expert(self, tmp_path):
        shapes = stored("mixtral", tmp_path)
        name = next(name for name in shapes if name.endswith("experts.2.w3.weight"))
        del shapes[name]
        with pytest.raises(InputError, match="transformers cannot convert"):
            fitted(outline("mixtral"), shapes)

    def test_a_conversion_that_changes_numbers(self, monkeypatch, tmp_path):
        class Doubled(Transpose):
            def convert(self, tensors, *args, **kwargs):
                made = super().convert(tensors, *args, **kwargs)
                return {name: 2 * (one[0] if isinstance(one, list) else one) for name, one in made.items()}

        shapes = stored("llama", tmp_path)
        converter = WeightConverter("self_attn.o_proj.weight", "self_attn.o_proj.weight", operations=[Doubled(0, 1)])
        monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [converter])
        with pytest.raises(InputError, match="expected a conversion that moves the numbers"):
            fitted(outline("llama"), shapes)
