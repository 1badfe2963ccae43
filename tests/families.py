"""Tiny models of transformers' families, and what a merge of any of them must show."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion

from ecotone import Recipe, launch
from ecotone.experiments.checks import _architecture, validate
from ecotone.experiments.exports import verify
from ecotone.fitness.backends.resident import Resident
from ecotone.merging.export import export_directory
from ecotone.merging.models import architectures
from ecotone.merging.models.names import names_of
from ecotone.merging.sources import Sources
from ecotone.populations.genome import Genome

CPU = torch.device("cpu")
VOCABULARY = 64


# -- inputs, by kind -------------------------------------------------------------------------------------------


def tokens(count=6):
    return torch.randint(8, VOCABULARY - 8, (2, count))


def text(config):
    return {"input_ids": tokens()}


def pairs_of_texts(config):
    return {"input_ids": tokens(), "decoder_input_ids": tokens(4)}


def image(config):
    size = config.image_size
    return {"pixel_values": torch.randn(2, config.num_channels, *((size, size) if isinstance(size, int) else size))}


def video(config):
    return {"pixel_values": torch.randn(1, config.num_frames, 3, config.image_size, config.image_size)}


def big_image(config):
    return {"pixel_values": torch.randn(1, 3, 64, 64)}


def image_and_text(config):
    size = config.vision_config.image_size
    return {"input_ids": tokens(), "pixel_values": torch.randn(2, 3, size, size)}


def patches_and_text(config):
    """An image of 4 by 4 patches, merged by 2 by 2, among tokens."""
    vision = config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    ids = tokens(8)[:1]
    ids[0, 2:6] = config.image_token_id
    if hasattr(config, "vision_start_token_id"):
        ids[0, 1], ids[0, 6] = config.vision_start_token_id, config.vision_end_token_id
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": torch.randn(16, width),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def tiles_in_text(config):
    """An image in a row of images, as one token."""
    ids = tokens(8)[:1]
    ids[0, 2] = config.image_token_id
    size = config.vision_config.image_size
    return {"input_ids": ids, "pixel_values": torch.randn(1, 1, 3, size, size)}


def sound_in_text(config):
    ids = tokens(8)[:1]
    ids[0, 2:6] = config.audio_token_index
    audio = config.audio_config
    length = 2 * audio.max_source_positions
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": torch.randn(1, audio.num_mel_bins, length),
        "feature_attention_mask": torch.ones(1, length).long(),
    }


def mel(config):
    return {"input_features": torch.randn(1, 40, config.encoder_config.num_mel_bins)}


def image_in_text(config):
    """An image of as many tokens as ``IMAGE_TOKENS``, among tokens."""
    ids = tokens(8)[:1]
    image_token = next(
        value for name in ("image_token_index", "image_token_id") if (value := getattr(config, name, None)) is not None
    )
    ids[0, 1 : 1 + IMAGE_TOKENS] = image_token
    size = config.vision_config.image_size
    size = size if isinstance(size, int) else size[0]
    types = (ids == image_token).long()
    extra: dict[str, Any] = {"token_type_ids": types} if config.model_type in ("gemma3", "paligemma") else {}
    if config.model_type == "mistral3":
        extra = {"image_sizes": torch.tensor([[size, size]])}
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, size, size), **extra}


def spectrum(config):
    features = torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": features, "decoder_input_ids": tokens(4)[:1]}


def frames(config):
    return {"input_features": torch.randn(1, 10, config.feature_projection_input_dim)}


def spectrogram(config):
    return {"input_values": torch.randn(1, config.max_length, config.num_mel_bins)}


def sound(config):
    return {"input_values": torch.randn(1, 400)}


IMAGE_TOKENS = 4

# -- the table -------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
PLAIN = {**SMALL, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": 0}
GROUPED = {**PLAIN, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {**GROUPED, "head_dim": 8}
EXPERTS = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    **GROUPED,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
PIXELS = {**SMALL, "image_size": 16, "patch_size": 8}
ONE = {**SMALL, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
CLIP_AND_LLAMA = {
    "text_config": {**GROUPED, "model_type": "llama"},
    "vision_config": {**ONE, "model_type": "clip_vision_model", "num_hidden_layers": 2},
    "image_token_index": 60,
}
WORDS = {**SMALL, "num_hidden_layers": 1, "vocab_size": VOCABULARY, "max_position_embeddings": 32}
SPEECH = {
    **SMALL,
    "num_hidden_layers": 1,
    "vocab_size": 32,
    "conv_dim": [8, 8],
    "conv_kernel": [3, 3],
    "conv_stride": [2, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
SHORT = {"d_model": 32, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CODER = {
    **SHORT,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 1,
}
T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
IMAGES = {"image_token_id": 60, "vision_start_token_id": 61, "vision_end_token_id": 62, "video_token_id": 63}
TOWER = {"depth": 1, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
WIDE_TOWER = {**TOWER, "out_hidden_size": 32, "intermediate_size": 24}
DEEP_TOWER = {**WIDE_TOWER, "num_position_embeddings": 16}


@dataclass(frozen=True)
class Family:
    """A class of transformers, arguments of its configuration, and its inputs."""

    model: str
    arguments: dict[str, Any]
    inputs: Callable[[Any], dict[str, Any]] = text


def causal(model, arguments=GROUPED, **more):
    return Family(f"{model}ForCausalLM", {**arguments, **more})


FAMILIES = {
    "llama": causal("Llama"),
    "mistral": causal("Mistral"),
    "ministral": causal("Ministral", HEADS),
    "qwen2": causal("Qwen2"),
    "qwen3": causal("Qwen3", HEADS),
    "gemma": causal("Gemma", HEADS),
    "gemma2": causal("Gemma2", HEADS),
    "gemma3_text": causal("Gemma3", HEADS),
    "phi": causal("Phi"),
    "phi3": causal("Phi3"),
    "gpt2": Family("GPT2LMHeadModel", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "opt": causal("OPT", PLAIN, ffn_dim=24, word_embed_proj_dim=32),
    "gpt_neo": causal("GPTNeo", PLAIN, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
    "gpt_neox": causal("GPTNeoX", PLAIN),
    "gpt_bigcode": causal("GPTBigCode", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gptj": causal("GPTJ", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "codegen": causal("CodeGen", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "bloom": causal("Bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": causal("Falcon", PLAIN),
    "mpt": causal("Mpt", {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 32}),
    "stablelm": causal("StableLm"),
    "starcoder2": causal("Starcoder2"),
    "cohere": causal("Cohere"),
    "cohere2": causal("Cohere2"),
    "olmo": causal("Olmo"),
    "olmo2": causal("Olmo2"),
    "smollm3": causal("SmolLM3"),
    "granite": causal("Granite"),
    "glm": causal("Glm", HEADS),
    "glm4": causal("Glm4", HEADS),
    "nemotron": causal("Nemotron"),
    "exaone4": causal("Exaone4", HEADS),
    "helium": causal("Helium", HEADS),
    "persimmon": causal("Persimmon", PLAIN),
    "xglm": causal("XGLM", SHORT, num_layers=2, attention_heads=4, ffn_dim=24, max_position_embeddings=32),
    "ernie4_5": causal("Ernie4_5", HEADS),
    "seed_oss": causal("SeedOss", HEADS),
    "hunyuan_v1_dense": causal("HunYuanDenseV1", HEADS),
    "apertus": causal("Apertus"),
    "mixtral": causal("Mixtral", LOCAL),
    "phimoe": causal("Phimoe", LOCAL),
    "granitemoe": causal("GraniteMoe", LOCAL),
    "granitemoeshared": causal("GraniteMoeShared", LOCAL, shared_intermediate_size=16),
    "gpt_oss": causal("GptOss", LOCAL, head_dim=8),
    "qwen2_moe": causal("Qwen2Moe", EXPERTS, shared_expert_intermediate_size=16),
    "qwen3_moe": causal("Qwen3Moe", EXPERTS, head_dim=8),
    "olmoe": causal("Olmoe", EXPERTS),
    "flex_olmo": causal("FlexOlmo", EXPERTS),
    "deepseek_v2": causal("DeepseekV2", {**ROUTED, **LATENT}),
    "deepseek_v3": causal("DeepseekV3", {**ROUTED, **LATENT}),
    "glm4_moe": causal("Glm4Moe", ROUTED, head_dim=8),
    "dots1": causal("Dots1", ROUTED, head_dim=8, n_shared_experts=1),
    "ernie4_5_moe": causal("Ernie4_5_Moe", GROUPED, moe_num_experts=4, moe_k=2, moe_intermediate_size=16),
    "jetmoe": causal("JetMoe", GROUPED, num_local_experts=4, num_experts_per_tok=2, kv_channels=8),
    "minimax": causal("MiniMax", LOCAL, head_dim=8, layer_types=["linear_attention", "full_attention"], block_size=4),
    "qwen3_next": causal("Qwen3Next", {**EXPERTS, **DELTA}, head_dim=8, shared_expert_intermediate_size=16),
    "qwen3_5": causal("Qwen3_5", {**GROUPED, **DELTA}, head_dim=8),
    "qwen3_5_moe": causal("Qwen3_5Moe", {**EXPERTS, **DELTA}, head_dim=8, shared_expert_intermediate_size=16),
    "mamba": causal("Mamba", {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "mamba2": causal(
        "Mamba2",
        {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        num_heads=4,
        head_dim=8,
        n_groups=1,
        chunk_size=4,
    ),
    "falcon_mamba": causal(
        "FalconMamba", {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    ),
    "jamba": causal(
        "Jamba",
        GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        use_mamba_kernels=False,
        mamba_d_state=4,
    ),
    "zamba2": causal(
        "Zamba2",
        GROUPED,
        layer_types=["mamba", "hybrid"],
        hybrid_layer_ids=[1],
        num_mem_blocks=1,
        n_mamba_heads=8,
        mamba_ngroups=1,
        mamba_d_state=4,
        use_mem_rope=True,
    ),
    "bamba": causal(
        "Bamba", GROUPED, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=4
    ),
    "falcon_h1": causal(
        "FalconH1", HEADS, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=4
    ),
    "granitemoehybrid": causal(
        "GraniteMoeHybrid",
        LOCAL,
        shared_intermediate_size=16,
        layer_types=["mamba", "attention"],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=4,
    ),
    "recurrent_gemma": causal("RecurrentGemma", HEADS, num_hidden_layers=3, lru_width=32, attention_window_size=8),
    "lfm2": causal("Lfm2", GROUPED, layer_types=["conv", "full_attention"]),
    "arcee": causal("Arcee"),
    "bitnet": causal("BitNet"),
    "diffllama": causal("DiffLlama"),
    "olmo3": causal("Olmo3"),
    "gemma4_text": causal("Gemma4", HEADS, vocab_size_per_layer_input=VOCABULARY),
    "hrm_text": causal("HrmText", HEADS),
    "llama4_text": causal("Llama4", HEADS, num_local_experts=4, intermediate_size_mlp=24, interleave_moe_layer_step=2),
    "minimax_m2": causal("MiniMaxM2", LOCAL, head_dim=8, rotary_dim=4),
    "hunyuan_v1_moe": causal("HunYuanMoEV1", EXPERTS, head_dim=8, moe_topk=[2, 2]),
    "exaone_moe": causal("ExaoneMoe", EXPERTS, n_group=1, topk_group=1, num_shared_experts=1, first_k_dense_replace=1),
    "afmoe": causal("Afmoe", EXPERTS, head_dim=8, num_dense_layers=1),
    "solar_open": causal("SolarOpen", ROUTED, head_dim=8),
    "glm4_moe_lite": causal("Glm4MoeLite", {**ROUTED, **LATENT}),
    "glm_moe_dsa": causal("GlmMoeDsa", {**ROUTED, **LATENT}),
    "deepseek_v32": causal("DeepseekV32", {**ROUTED, **LATENT}),
    "longcat_flash": causal(
        "LongcatFlash",
        {**GROUPED, **LATENT},
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        expert_ffn_hidden_size=16,
        ffn_hidden_size=24,
        num_layers=1,
    ),
    "lfm2_moe": causal("Lfm2Moe", EXPERTS, layer_types=["conv", "full_attention"], num_dense_layers=1),
    "nemotron_h": causal(
        "NemotronH",
        GROUPED,
        layers_block_type=["mamba", "attention"],
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=1,
        ssm_state_size=4,
    ),
    "nomic_bert": Family("NomicBertModel", PLAIN),
    "gte": Family("GteModel", PLAIN),
    "jina_embeddings_v3": Family("JinaEmbeddingsV3Model", PLAIN),
    "esm": Family("EsmForMaskedLM", {**PLAIN, "pad_token_id": 1, "mask_token_id": 5, "token_dropout": False}),
    "xlnet": Family("XLNetLMHeadModel", {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4}),
    "funnel": Family(
        "FunnelForMaskedLM", {"vocab_size": VOCABULARY, "d_model": 32, "n_head": 4, "d_head": 8, "block_sizes": [1, 1]}
    ),
    "fnet": Family("FNetForMaskedLM", PLAIN),
    "bert": Family("BertForMaskedLM", PLAIN),
    "bert_classifier": Family("BertForSequenceClassification", PLAIN),
    "roberta": Family("RobertaForMaskedLM", {**PLAIN, "pad_token_id": 1}),
    "xlstm": Family(
        "xLSTMForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "num_blocks": 2, "num_heads": 4, "use_cache": False},
    ),
    "gemma3n_text": causal(
        "Gemma3n",
        HEADS,
        num_kv_shared_layers=0,
        vocab_size_per_layer_input=VOCABULARY,
        activation_sparsity_pattern=[0.0, 0.0],
        hidden_size_per_layer_input=8,
        laurel_rank=4,
    ),
    "qwen4_exp": causal("Qwen4Exp", HEADS, use_cache=False),
    "rwkv": causal("Rwkv", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "use_cache": False}),
    "xlm_roberta": Family("XLMRobertaForTokenClassification", {**PLAIN, "pad_token_id": 1}),
    "camembert": Family("CamembertModel", {**PLAIN, "pad_token_id": 1}),
    "albert": Family("AlbertForMaskedLM", {**PLAIN, "embedding_size": 16}),
    "distilbert": Family(
        "DistilBertForMaskedLM", {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 24, "n_layers": 2, "n_heads": 4}
    ),
    "electra": Family("ElectraForPreTraining", {**PLAIN, "embedding_size": 16}),
    "mpnet": Family("MPNetModel", {**PLAIN, "pad_token_id": 1}),
    "deberta_v2": Family("DebertaV2ForMaskedLM", {**PLAIN, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "modernbert": Family("ModernBertForMaskedLM", PLAIN),
    "t5": Family("T5ForConditionalGeneration", T5, pairs_of_texts),
    "mt5": Family("MT5ForConditionalGeneration", {**T5, "tie_word_embeddings": False}, pairs_of_texts),
    "umt5": Family("UMT5ForConditionalGeneration", T5, pairs_of_texts),
    "switch_transformers": Family(
        "SwitchTransformersForConditionalGeneration", {**T5, "num_experts": 4, "num_layers": 2}, pairs_of_texts
    ),
    "bart": Family("BartForConditionalGeneration", CODER, pairs_of_texts),
    "mbart": Family("MBartForConditionalGeneration", CODER, pairs_of_texts),
    "marian": Family("MarianMTModel", CODER, pairs_of_texts),
    "pegasus": Family("PegasusForConditionalGeneration", CODER, pairs_of_texts),
    "m2m_100": Family("M2M100ForConditionalGeneration", CODER, pairs_of_texts),
    "whisper": Family(
        "WhisperForConditionalGeneration", {**CODER, "num_mel_bins": 8, "max_source_positions": 8}, spectrum
    ),
    "longt5": Family("LongT5ForConditionalGeneration", T5, pairs_of_texts),
    "t5gemma": Family("T5GemmaForConditionalGeneration", {"encoder": HEADS, "decoder": HEADS}, pairs_of_texts),
    "nllb_moe": Family(
        "NllbMoeForConditionalGeneration",
        {**CODER, "num_experts": 4, "encoder_sparse_step": 1, "decoder_sparse_step": 1},
        pairs_of_texts,
    ),
    "wav2vec2_bert": Family(
        "Wav2Vec2BertModel", {**SMALL, "num_hidden_layers": 1, "feature_projection_input_dim": 8}, frames
    ),
    "ast": Family("ASTForAudioClassification", {**SMALL, "max_length": 32, "num_mel_bins": 16}, spectrogram),
    "wav2vec2": Family("Wav2Vec2ForCTC", SPEECH, sound),
    "hubert": Family("HubertModel", SPEECH, sound),
    "wavlm": Family("WavLMModel", SPEECH, sound),
    "vit": Family("ViTForImageClassification", PIXELS, image),
    "dinov3": Family("DINOv3ViTModel", PIXELS, image),
    "sapiens2": Family("Sapiens2Model", PIXELS, image),
    "data2vec_vision": Family("Data2VecVisionForImageClassification", PIXELS, image),
    "videomae": Family("VideoMAEModel", {**PIXELS, "num_frames": 2, "tubelet_size": 2}, video),
    "deit": Family("DeiTForImageClassification", PIXELS, image),
    "beit": Family("BeitForImageClassification", PIXELS, image),
    "dinov2": Family("Dinov2Model", {**PIXELS, "mlp_ratio": 1}, image),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", {**PIXELS, "mlp_ratio": 1}, image),
    "vit_mae": Family("ViTMAEModel", {**PIXELS, "mask_ratio": 0.0}, image),
    "vit_msn": Family("ViTMSNModel", PIXELS, image),
    "swin": Family("SwinForImageClassification", SWIN, image),
    "swinv2": Family("Swinv2ForImageClassification", SWIN, image),
    "convnext": Family(
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32},
        image,
    ),
    "resnet": Family(
        "ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}, big_image
    ),
    "segformer": Family(
        "SegformerForImageClassification",
        {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2]},
        big_image,
    ),
    "clip": Family("CLIPModel", {"text_config": WORDS, "vision_config": ONE, "projection_dim": 16}, image_and_text),
    "clip_vision": Family("CLIPVisionModel", ONE, image),
    "clip_text": Family("CLIPTextModel", WORDS),
    "siglip": Family("SiglipModel", {"text_config": WORDS, "vision_config": ONE}, image_and_text),
    "siglip_vision": Family("SiglipVisionModel", ONE, image),
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration",
        {"text_config": {**GROUPED, **MROPE}, "vision_config": {**TOWER, "embed_dim": 32}, **IMAGES},
        patches_and_text,
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        {"text_config": {**GROUPED, **MROPE}, "vision_config": {**WIDE_TOWER, "window_size": 16}, **IMAGES},
        patches_and_text,
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        {"text_config": {**HEADS, **MROPE}, "vision_config": {**DEEP_TOWER, "deepstack_visual_indexes": [0]}, **IMAGES},
        patches_and_text,
    ),
    "qwen3_vl_moe": Family(
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": {**EXPERTS, "head_dim": 8, **MROPE},
            "vision_config": {**DEEP_TOWER, "deepstack_visual_indexes": [0]},
            **IMAGES,
        },
        patches_and_text,
    ),
    "qwen3_5_vl": Family(
        "Qwen3_5ForConditionalGeneration",
        {"text_config": {**HEADS, **DELTA}, "vision_config": DEEP_TOWER, **IMAGES},
        patches_and_text,
    ),
    "qwen3_5_moe_vl": Family(
        "Qwen3_5MoeForConditionalGeneration",
        {
            "text_config": {**EXPERTS, **DELTA, "head_dim": 8, "shared_expert_intermediate_size": 16},
            "vision_config": DEEP_TOWER,
            **IMAGES,
        },
        patches_and_text,
    ),
    "glm4v": Family(
        "Glm4vForConditionalGeneration",
        {"text_config": {**HEADS, **MROPE}, "vision_config": {**WIDE_TOWER, "image_size": 16}, "image_token_id": 60},
        patches_and_text,
    ),
    "internvl": Family(
        "InternVLForConditionalGeneration",
        {
            "text_config": {**GROUPED, "model_type": "qwen2"},
            "vision_config": {**ONE, "image_size": [32, 32], "patch_size": [8, 8]},
            "image_token_id": 60,
        },
        image_in_text,
    ),
    "idefics3": Family(
        "Idefics3ForConditionalGeneration",
        {
            "text_config": {**GROUPED, "model_type": "llama"},
            "vision_config": ONE,
            "image_token_id": 60,
            "scale_factor": 2,
        },
        tiles_in_text,
    ),
    "qwen2_audio": Family(
        "Qwen2AudioForConditionalGeneration",
        {
            "text_config": {**GROUPED, "model_type": "qwen2"},
            "audio_config": {
                "model_type": "qwen2_audio_encoder",
                "num_mel_bins": 8,
                "d_model": 32,
                "encoder_layers": 1,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 24,
                "max_source_positions": 8,
            },
            "audio_token_index": 60,
        },
        sound_in_text,
    ),
    "parakeet": Family(
        "ParakeetForCTC",
        {
            "vocab_size": 32,
            "encoder_config": {
                **SMALL,
                "num_hidden_layers": 1,
                "num_mel_bins": 16,
                "subsampling_conv_channels": 8,
            },
        },
        mel,
    ),
    "vipllava": Family(
        "VipLlavaForConditionalGeneration",
        {**CLIP_AND_LLAMA, "vision_feature_layers": [-1, -2]},
        image_in_text,
    ),
    "gemma3": Family(
        "Gemma3ForConditionalGeneration",
        {"text_config": HEADS, "vision_config": ONE, "mm_tokens_per_image": IMAGE_TOKENS, "image_token_index": 60},
        image_in_text,
    ),
    "paligemma": Family(
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": {**HEADS, "model_type": "gemma"},
            "vision_config": {**ONE, "model_type": "siglip_vision_model"},
            "projection_dim": 32,
            "image_token_index": 60,
        },
        image_in_text,
    ),
    "llava": Family(
        "LlavaForConditionalGeneration",
        CLIP_AND_LLAMA,
        image_in_text,
    ),
    "mistral3": Family(
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {**HEADS, "model_type": "mistral"},
            "vision_config": {**ONE, "model_type": "pixtral", "head_dim": 8, "image_size": 32},
            "image_token_index": 60,
        },
        image_in_text,
    ),
}

# -- the objective of recipes ------------------------------------------------------------------------------------


def score(model: Any, family: str, seed: int = 1) -> float:
    """The mean cosine of all numbers that a model puts out for inputs drawn from a seed, from 0 to 1."""
    torch.manual_seed(seed)
    inputs = FAMILIES[family].inputs(model.config)
    torch.manual_seed(0)
    found = [one.double().cos().mean() for one in flat(model(**inputs)) if one.is_floating_point()]
    return float(torch.stack(found).mean()) / 2 + 0.5


def examples(kind: str, seed: int = 0) -> Any:
    """Inputs without labels for calibration: eight texts, or eight images."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "image":
        return {"pixel_values": torch.randn(8, 3, 16, 16, generator=generator)}
    return {"input_ids": torch.randint(8, VOCABULARY - 8, (8, 6), generator=generator)}


def last_logits(outputs: Any, inputs: Any) -> torch.Tensor:
    """A head of calibration: the logits of a text's last token, or of an image."""
    return outputs.logits[:, -1] if outputs.logits.ndim == 3 else outputs.logits


def head() -> Callable[[Any, Any], torch.Tensor]:
    return last_logits


# -- the harness -----------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A family's models in folders, and what is fed to them."""

    sources: Sources
    genome: Genome
    inputs: dict[str, Any]
    saved_as: Callable[[str], str]
    """The name by which transformers saves what it loads as a tensor of this name."""

    def outputs(self, model):
        torch.manual_seed(0)
        return [one for one in flat(model(**self.inputs)) if one.is_floating_point()]

    def loss(self, model):
        """A sum of all outputs with fixed random weights."""
        parts = [one for one in self.outputs(model) if one.requires_grad]
        generator = torch.Generator().manual_seed(5)
        return sum((one * torch.randn(one.shape, generator=generator)).sum() / math.sqrt(one.numel()) for one in parts)


def flat(found):
    """The tensors of an output, whatever they are nested in."""
    if isinstance(found, torch.Tensor):
        return [found]
    values = found.values() if isinstance(found, dict) else found if isinstance(found, (list, tuple)) else ()
    return [tensor for value in values for tensor in flat(value)]


Change: TypeAlias = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def saved(family, folder, change: Change | None = None):
    """A random base and two experts in three folders; ``change`` gives the tensors that their files hold."""
    kind = getattr(transformers, family.model, None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {family.model}")
    torch.manual_seed(0)
    model = kind(kind.config_class(**family.arguments)).eval()
    paths = [folder / name for name in ("base", "a", "b")]
    for seed, path in enumerate(paths):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_((0.05 if seed else 0.2) * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(path)
        if change is not None:
            file = path / "model.safetensors"
            save_file(change(load_file(file)), file, {"format": "pt"})
    return model.config, paths


def opened(name, folder, change: Change | None = None, saved_as: Callable[[str], str] = str):
    """A merge of two experts in three segments."""
    family = FAMILIES[name]
    config, (base, *experts) = saved(family, folder, change)
    sources = Sources.open(experts, base, "task_arithmetic")
    size = sources.layout.size
    genome = Genome([0, size // 3, size // 2, size], [[0.3, 0.6], [0.9, -0.2], [0.1, 0.4]])
    torch.manual_seed(1)
    return Case(sources, genome, family.inputs(config), saved_as)


OLD_NAMES = {
    "LayerNorm.weight": "LayerNorm.gamma",
    "LayerNorm.bias": "LayerNorm.beta",
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}


def of_either(tensors, name, case):
    """What transformers saved of the tensor ``name``, or of one that is tied to it.

    transformers 5.0 saves old names of what it has loaded under new ones.
    """
    twins = [alias for alias, kept in case.sources.layout.aliases.items() if kept == name]
    twins += [name.replace(new, old) for new, old in OLD_NAMES.items() if name.endswith(new)]
    return next(tensors[key] for key in map(case.saved_as, (name, *twins)) if key in tensors)


def aligned(model):
    """A copy with tensors where PyTorch places them: its kernels' last bits depend on that.

    And those of its convolutions on whether weights may learn.
    """
    model = deepcopy(model)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def materialised(case):
    out = {name: torch.empty(info.shape) for name, info in case.sources.layout.parameters.items()}
    case.sources.materialise([case.genome], [out])
    return out | case.sources.buffers()


def check(case, folder):
    """A merge fills the module as loading its export does, however it is shown; gradients are those of autograd.

    Returns:
        The correspondence of names, and the export.
    """
    layout = case.sources.layout
    resident, stacked = (Resident(case.sources, "auto", CPU, stack_bytes=count) for count in (0, 1 << 26))
    found = names_of(resident.model, layout)
    check_names(found, case)
    expected = {name: one for name, one in materialised(case).items() if name not in found.unused}
    for number, one in enumerate((resident, stacked)):
        (model,) = one.show([case.genome])
        model.save_pretrained(folder / f"saved{number}")
        stored = load_file(folder / f"saved{number}" / "model.safetensors")
        for key, tensor in expected.items():
            assert torch.equal(of_either(stored, key, case), tensor), key

    shown = case.outputs(aligned(resident.model))
    exported = export_directory(case.sources, case.genome, folder / "export", "", {})
    plain = aligned(type(resident.model).from_pretrained(exported).eval().requires_grad_(False))
    loaded = case.outputs(plain)
    assert len(shown) == len(loaded) > 0
    assert all(map(torch.equal, shown, loaded))
    assert all(bool(one.isfinite().all()) for one in shown)

    for expert in case.sources.experts:
        own = type(resident.model).from_pretrained(expert.path).state_dict()
        given = stacked.expert(expert.name).state_dict()
        assert own.keys() == given.keys()
        assert all(torch.equal(given[name], tensor) for name, tensor in own.items())

    wanted, scale = slopes_of(plain.requires_grad_(True), case)
    assert scale > 0
    for one in (resident, stacked):
        slopes = one.gradient(case.genome, lambda module: iter([case.loss(module)]))[1]
        np.testing.assert_allclose(slopes, wanted, rtol=1e-4, atol=1e-5 * scale)
    return found, exported


def check_names(found, case):
    """The module without its weights has the same places, and no tensor of the checkpoints is left out."""
    layout = case.sources.layout
    assert {"architecture"} <= {one.subject for one in _architecture(case.sources)} <= {"architecture", "not loaded"}
    outlined = names_of(architectures.outline(case.sources.origin), layout)
    assert (found.places, found.unused, found.missing) == (outlined.places, outlined.unused, outlined.missing)
    assert found.scattered.keys() == outlined.scattered.keys()
    named = {*found.places, *found.scattered, *found.unused, *layout.aliases.values()}
    assert {*layout.parameters, *layout.buffers} <= named


def slopes_of(model, case):
    """Of the loss by the coefficients: gradients as transformers saves weights, times the experts' changes."""
    case.loss(model).backward()
    state = model.state_dict(keep_vars=True)
    gradients = {name: torch.zeros_like(one) if one.grad is None else one.grad for name, one in state.items()}
    gradients = revert_weight_conversion(model, gradients)
    layout = case.sources.layout
    unused = names_of(model, layout).unused
    rows = [
        torch.zeros(info.shape) if name in unused else of_either(gradients, name, case)
        for name, info in layout.parameters.items()
    ]
    gradient = torch.cat([row.double().reshape(-1) for row in rows])
    base, *experts = [
        torch.cat([stored.tensor(key).double().reshape(-1) for key in layout.tensors])
        for stored in (case.sources.base, *case.sources.experts)
    ]
    products = [gradient * (expert - base) for expert in experts]
    borders = case.genome.boundaries.tolist()
    sums = [[float(one[low:high].sum()) for one in products] for low, high in pairwise(borders)]
    size = max(float(one.abs().sum()) for one in products)
    return np.array(sums), size


def objective(name, family, seed=1):
    """An objective of a recipe: ``score``."""
    arguments = {"family": family, "seed": seed}
    return {"name": name, "type": "call", "call": f"{Path(__file__)}:score", "arguments": arguments}


RANDOM = {"search": {"algorithm": "random", "granularity": "tensor"}, "budget": {"evaluations": 4}}


def run_through(name, folder, changes=MappingProxyType(RANDOM)):
    """Validate, run, export and verify a recipe over a family; what is valid runs.

    Returns:
        What ``validate`` says of the architecture, and the run.
    """
    paths = saved(FAMILIES[name], folder)[1]
    recipe = Recipe.from_record(
        {
            "name": name,
            "models": {"base": str(paths[0]), "experts": [str(path) for path in paths[1:]], "architecture": "auto"},
            "merge": {"operator": "task_arithmetic"},
            "objectives": {"search": [objective("outputs", name)]},
            "runtime": {"pool": "serial"},
            "tracking": {"mlflow": False},
            **changes,
        }
    )
    found = {finding.subject: finding.text for finding in validate(recipe)}
    run = launch(recipe, folder / "run")
    assert run.status()["failures"] == 0
    best = run.best()
    exported = run.export("best", folder / "merged")
    kind = getattr(transformers, FAMILIES[name].model)
    model, told = kind.from_pretrained(exported, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["mismatched_keys"]
    again = score(aligned(model.eval().requires_grad_(False)), name)
    assert math.isclose(again, best.scores["outputs"], abs_tol=1e-6)
    assert all(math.isclose(one.recorded, one.found, abs_tol=1e-6) for one in verify(exported))
    return found["architecture"], run
