"""Components of tensors by their names, judged by the modules that transformers makes of every family."""

import re

import pytest
import torch
import transformers
from families import FAMILIES
from transformers.core_model_loading import revert_weight_conversion

from ecotone.merging.models.names import fitted
from ecotone.populations.components import COMPONENTS, components

KNOWN = {
    "model.layers.0.mlp.gate_proj.weight": "mlp",
    "model.layers.0.self_attn.q_norm.weight": "norms",
    "model.layers.0.self_attn.rotary_emb.inv_freq": "embeddings",
    "model.layers.1.mlp.gate.weight": "router",
    "model.layers.1.mlp.gate.e_score_correction_bias": "router",
    "model.layers.1.mlp.experts.3.gate_proj.weight": "experts",
    "model.layers.1.mlp.shared_expert.up_proj.weight": "experts",
    "model.layers.1.mlp.shared_expert_gate.weight": "router",
    "model.layers.2.block_sparse_moe.gate.weight": "router",
    "model.layers.2.block_sparse_moe.experts.0.w1.weight": "experts",
    "model.layers.2.mlp.router.bias": "router",
    "model.layers.2.mamba.A_log": "mixer",
    "model.layers.2.linear_attn.in_proj_qkvz.weight": "mixer",
    "model.layers.2.linear_attn.norm.weight": "norms",
    "model.layers.3.mixer.q_proj.weight": "attention",
    "model.layers.4.mixer.in_proj.weight": "mixer",
    "model.layers.5.mixer.up_proj.weight": "mlp",
    "model.layers.6.ls1.gamma": "norms",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "attention",
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": "mlp",
    "bert.encoder.layer.0.attention.output.dense.weight": "attention",
    "bert.encoder.layer.0.attention.output.LayerNorm.gamma": "norms",
    "bert.encoder.layer.0.output.dense.weight": "mlp",
    "bert.pooler.dense.weight": "head",
    "cls.predictions.transform.dense.weight": "head",
    "lm_head.weight": "head",
    "embed_out.weight": "head",
    "classifier.dense.weight": "head",
    "score.weight": "head",
    "v_head.summary.bias": "head",
    "model.embed_tokens.weight": "embeddings",
    "transformer.wpe.weight": "embeddings",
    "h.0.ln_1.weight": "norms",
    "h.0.attn.c_attn.weight": "attention",
    "model.visual.blocks.0.attn.qkv.weight": "vision",
    "model.visual.blocks.0.norm1.weight": "vision",
    "visual.merger.mlp.0.weight": "projector",
    "audio_tower.layers.0.fc1.weight": "vision",
    "multi_modal_projector.linear_1.weight": "projector",
    "logit_scale": "other",
    "0.weight": "other",
}


def test_known_names() -> None:
    assert dict(zip(KNOWN, components(list(KNOWN)), strict=True)) == KNOWN


def test_a_gate_without_experts_beside_it_is_no_router() -> None:
    assert components(["layers.0.mlp.gate.weight", "layers.0.mlp.up.weight"]) == ("mlp", "mlp")


def test_a_tower_by_itself_is_a_model_like_others() -> None:
    names = ["vision_model.encoder.layers.0.self_attn.q_proj.weight", "vision_model.encoder.layers.0.mlp.fc1.weight"]
    assert components(names) == ("attention", "mlp")
    assert components([*names, "text_model.encoder.layers.0.mlp.fc1.weight"]) == ("vision", "vision", "mlp")


def test_names_that_other_libraries_give() -> None:
    """Meta's own Llama, timm's vision transformer, torchvision's ResNet."""
    names = {
        "layers.0.attention.wq.weight": "attention",
        "layers.0.feed_forward.w1.weight": "mlp",
        "layers.0.attention_norm.weight": "norms",
        "tok_embeddings.weight": "embeddings",
        "output.weight": "head",
        "blocks.0.attn.qkv.weight": "attention",
        "blocks.0.mlp.fc1.weight": "mlp",
        "blocks.0.norm1.weight": "norms",
        "patch_embed.proj.weight": "embeddings",
        "cls_token": "embeddings",
        "pos_embed": "embeddings",
        "head.weight": "head",
        "layer1.0.conv1.weight": "mixer",
        "layer1.0.bn1.running_mean": "norms",
        "fc.weight": "head",
    }
    assert dict(zip(names, components(list(names)), strict=True)) == names


# -- every family ------------------------------------------------------------------------------------------------

ODD = {
    "clip": {"logit_scale"},
    "siglip": {"logit_scale", "logit_bias"},
    "zamba2": {"model.layers.N.linear.weight"},
    "hrm_text": {"model.z_L_init"},
}
OWN_STREAMS = {"gemma3n_text": r"altup|laurel", "qwen4_exp": "hyper_connection"}

CLASSES = (  # what the class of a module says of its own parameters, where it says something
    ("norms", r"(RMSNorm|LayerNorm|BatchNorm\d?d?|GroupNorm|LayerScale)$"),
    ("embeddings", r"^Embedding$|WordEmbedding$|PositionalEmbedding$"),
    ("router", r"(Router|TopKRouter|TopkRouter|TopKGate)$"),
    ("experts", r"Experts$"),
)
AROUND = (  # and of everything within it, where nothing inside says more
    ("attention", r"(Self|Flash|Sdpa)?Attention$"),
    ("mlp", r"(MLP|FeedForward)$"),
    ("mixer", r"(Mamba2?Mixer|GatedDeltaNet|ShortConv|RecurrentBlock)$"),
)
AGREE = {  # what a name may say although the class says otherwise
    ("attention", "norms"),
    ("mlp", "norms"),
    ("mixer", "norms"),
    ("embeddings", "attention"),  # tables of relative positions
    ("attention", "embeddings"),
    ("attention", "head"),  # pooling by attention
    ("mlp", "head"),
    ("embeddings", "head"),
    ("mlp", "experts"),  # shared experts, and experts as modules of their own
    ("mlp", "router"),
    ("attention", "experts"),
    ("attention", "router"),
    ("attention", "mixer"),
    ("mlp", "mixer"),
    ("mixer", "attention"),
    ("norms", "other"),
    ("norms", "embeddings"),  # a norm that has a number for its name, before convolutions that shrink an image
}


def outline(name):
    family = FAMILIES[name]
    kind = getattr(transformers, family.model)
    with torch.device("meta"):
        return kind(kind.config_class(**family.arguments))


def stored(module):
    """The names of the tensors that transformers saves, and the module's tensor that each goes into."""
    saved = revert_weight_conversion(module, module.state_dict())
    return {name: tuple(tensor.shape) for name, tensor in saved.items()}


def by_class(module, target):
    """What the module tree says of one of its tensors; None for nothing."""
    parts = target.split(".")[:-1]
    owners = [type(module.get_submodule(".".join(parts[:depth]))).__name__ for depth in range(len(parts), 0, -1)]
    for component, pattern in CLASSES:
        if owners and re.search(pattern, owners[0]):
            return component
    return next(
        (component for owner in owners for component, pattern in AROUND if re.search(pattern, owner)),
        None,
    )


def check(name):
    module = outline(name)
    shapes = stored(module)
    names = fitted(module, shapes)
    found = dict(zip(shapes, components(list(shapes)), strict=True))
    others = {re.sub(r"\d+", "N", key) for key, component in found.items() if component == "other"}
    if name in OWN_STREAMS:
        assert all(re.search(OWN_STREAMS[name], key) for key in others)
    else:
        assert others == ODD.get(name, set())
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    outputs = {f"{path}.weight" for path, one in module.named_modules() if head is not None and one is head}
    for key, component in found.items():
        place = names.places.get(key)
        if place is None or component in ("vision", "projector", "other"):
            continue
        if place.target in outputs:
            assert component == "head", key
            continue
        told = by_class(module, place.target)
        assert told in (None, component) or (told, component) in AGREE, (key, told, component)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("llama", "qwen3_moe") else pytest.mark.slow) for name in FAMILIES]
)
def test_names_say_what_the_module_says(name: str) -> None:
    check(name)


def test_every_component_is_in_some_family() -> None:
    names = ("llama", "qwen3_moe", "mamba", "qwen2_5_vl", "clip")
    assert {one for name in names for one in components(list(stored(outline(name))))} == set(COMPONENTS)
