"""Preparing for models of transformers: blocks that are run alone, adapters, and matrices that are no layers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ecotone.fitness.gradients.calibration import EntropyLossSettings
from ecotone.fitness.preparing import depth
from ecotone.fitness.preparing.prepare import basis_of
from ecotone.fitness.specs import WorkerSpec
from ecotone.merging.basis import Bases
from ecotone.settings import Call

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GEMMA = {
    "head_dim": 8,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
KINDS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, **GEMMA}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 50, "n_embd": 32, "n_layer": 3, "n_head": 4}),
    "bert": ("BertModel", "BertConfig", SIZES),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4}),
}
NAMES = ("one", "two")


def texts(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 11, (12,), generator=generator)
    mask = torch.arange(10)[None] < lengths[:, None]
    return {"input_ids": torch.randint(0, 50, (12, 10), generator=generator), "attention_mask": mask.long()}


class First(torch.nn.Module):
    def forward(self, outputs, inputs):
        return outputs.last_hidden_state[:, 0, :5]


def first():
    return First()


def made(folder: Path, kind: str) -> WorkerSpec:
    model_name, config_name, fields = KINDS[kind]
    config = getattr(transformers, config_name)(**fields)
    states = []
    for number, name in enumerate(("base", *NAMES)):
        torch.manual_seed(number)
        model = getattr(transformers, model_name)(config)
        states.append(model.state_dict())
        if number:
            mixed = {key: states[0][key] + 0.1 * (value - states[0][key]) for key, value in states[number].items()}
            model.load_state_dict(mixed)
        else:
            states[0] = {key: value.clone() for key, value in states[0].items()}
        model.save_pretrained(folder / name)
    head = Call(call=f"{__file__}:first") if kind == "bert" else None
    tasks = [
        EntropyLossSettings(name=name, data=Call(call=f"{__file__}:texts", arguments={"seed": seed}), head=head)
        for seed, name in enumerate(NAMES)
    ]
    experts = tuple(str(folder / name) for name in NAMES)
    return WorkerSpec(experts, str(folder / "base"), "kfac", architecture="auto", calibration=tuple(tasks))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_run_alone_with_the_same_bits(tmp_path, monkeypatch, kind):
    spec = made(tmp_path, kind)
    ran = []
    by_blocks = depth.Depth._by_blocks

    def watched(self, *given, **named):
        ran.append(given[0])
        return by_blocks(self, *given, **named)

    monkeypatch.setattr(depth.Depth, "_by_blocks", watched)
    for operator, settings in (("kfac", {"ridge": 0.01}), ("regmean", {}), ("regmean_pp", {})):
        chosen = replace(spec, operator=operator, settings=settings)
        ran.clear()
        alone = basis_of(chosen)
        assert len(ran) == 1
        Bases().remove(alone.key)
        with monkeypatch.context() as patched:
            patched.setattr(depth, "before_blocks", lambda *_: None)
            assert basis_of(chosen).record["files"] == alone.record["files"]
        assert alone.record["layers"]


def test_experts_of_a_mixture_are_matrices_or_the_mean(tmp_path):
    spec = made(tmp_path, "mixtral")
    without = basis_of(replace(spec, operator="iso_c")).record
    assert len([name for name in without["layers"] if ".experts." in name]) == 3 * 4 * 3
    with_data = basis_of(spec).record
    assert not [name for name in with_data["layers"] if ".experts." in name]
    assert "matrices that are no linear layers have the mean of their task vectors" in with_data["warnings"]


def test_adapters_give_the_vectors_of_the_merged_checkpoints(tmp_path):
    peft = pytest.importorskip("peft")
    spec = made(tmp_path, "llama")
    for number, name in enumerate(NAMES):
        torch.manual_seed(number)
        settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        adapter = peft.get_peft_model(base, settings)
        adapter.save_pretrained(tmp_path / f"{name}-adapter")
        adapter.merge_and_unload().save_pretrained(tmp_path / f"{name}-whole")

    def vectors(sort, operator):
        experts = tuple(str(tmp_path / f"{name}-{sort}") for name in NAMES)
        return basis_of(replace(spec, experts=experts, names=NAMES, operator=operator, calibration=spec.calibration))

    for operator in ("tsv_m", "knots", "kfac"):
        pairs = zip(vectors("adapter", operator).models(), vectors("whole", operator).models(), strict=True)
        for one, other in pairs:
            for name in one.tensors:
                torch.testing.assert_close(one.tensor(name), other.tensor(name), rtol=1e-4, atol=1e-6)
