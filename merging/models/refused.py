"""Checkpoints whose weights cannot be merged as they are: quantised ones, and parts of a model sharded by ZeRO-3.

Which kind of quantisation it is, is read from ``config.json``, or else from the names that each kind gives its tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ecotone.merging.models.model import Model, TensorInfo
from ecotone.populations.errors import CheckpointError, can_be_pasted

MERGEABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FIELDS = ("quantization_config", "compression_config")
_TITLES = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8 (FBGEMM)",
    "compressed-tensors": "compressed-tensors",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
    "torchao": "torchao",
    "hqq": "HQQ",
    "auto-round": "AutoRound",
    "gguf": "GGUF",
}
_WAYS_BACK = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config", "compressed-tensors": "CompressedTensorsConfig"}
_OWN = "Give the checkpoint that it was made from, in bfloat16, float16 or float32"


def check(checkpoint: Model) -> None:
    """Refuse a checkpoint that has no weights to merge.

    Raises:
        CheckpointError: The weights are quantised; the message says how, and how to undo it. Or they were saved while
            each process held a part of them.
    """
    kind, evidence = _quantised(checkpoint)
    if kind:
        title = _TITLES.get(kind, kind)
        raise CheckpointError(
            f"{checkpoint.path}: expected weights of floating-point numbers, found quantised ones: {title} "
            f"({evidence}).",
            _remedy(checkpoint, kind),
        )
    _refuse_ungathered(checkpoint)


def _quantised(checkpoint: Model) -> tuple[str, str]:
    """The kind of quantisation and what shows it; empty where there is none."""
    for place, config in _configs(checkpoint.config or {}):
        kind = str(config.get("quant_method") or config.get("quant_algo") or "a kind that it does not name")
        bits = config.get("bits", config.get("w_bit"))
        if kind == "bitsandbytes":
            bits = 8 if config.get("load_in_8bit") else 4
        return kind, f"{bits} bits; {place} of config.json" if bits else f"{place} of config.json"
    return _by_names(checkpoint.tensors)


def _configs(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Parts of a configuration that say how weights are quantised, and their places."""
    for field in _FIELDS:
        if config.get(field):
            yield prefix + field, config[field] if isinstance(config[field], dict) else {}
    for name, part in config.items():
        if isinstance(part, dict) and name not in _FIELDS:
            yield from _configs(part, f"{prefix}{name}.")


def _by_names(tensors: Mapping[str, TensorInfo]) -> tuple[str, str]:
    """From the names that a kind gives its tensors, and from their types."""
    parts: dict[str, set[str]] = {}
    for name in tensors:
        layer, _, last = name.rpartition(".")
        parts.setdefault(layer, set()).add(last)
    for name, info in tensors.items():
        layer, _, last = name.rpartition(".")
        kind, evidence = _kind_of(last, info, parts[layer]), f"tensor {name!r}"
        if kind:
            return kind, f"{evidence} of type {str(info.dtype).removeprefix('torch.')}"
    return "", ""


def _kind_of(name: str, info: TensorInfo, beside: set[str]) -> str:
    """The kind of quantisation that a layer's tensor shows, or an empty string.

    Args:
        name: The last component of its name.
        info: Its type and shape.
        beside: The last components of the names of the layer's tensors.
    """
    if info.dtype.is_floating_point and info.dtype not in MERGEABLE:
        return "fp8"
    if name == "absmax" or name.startswith("bitsandbytes__") or (name == "SCB" and "weight" in beside):
        return "bitsandbytes"
    if info.dtype.is_floating_point or info.dtype.is_complex:
        return ""
    if name == "qweight":
        return "gptq" if "g_idx" in beside else "awq"
    if name == "weight_packed":
        return "compressed-tensors"
    if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in beside:
        return "mxfp4"
    scaled = any("scale" in other for other in beside)
    return "integers and scales" if name == "weight" and len(info.shape) > 1 and scaled else ""


def _remedy(checkpoint: Model, kind: str) -> str:
    path, to = str(checkpoint.path), f"{checkpoint.path.name}-bfloat16"
    names = (checkpoint.config or {}).get("architectures")
    name = names[0] if isinstance(names, list) and names else "AutoModelForCausalLM"
    load = f"import transformers as t; m = t.{name}.from_pretrained('{path}', dtype='bfloat16'"
    if not checkpoint.is_hugging_face or not str(name).isidentifier() or not can_be_pasted(path):
        return f"{_OWN}."
    if not any(info.dtype not in MERGEABLE for info in checkpoint.tensors.values() if info.size):
        return (
            "All of its tensors are of floating-point numbers: if the weights were dequantised, remove the field from "
            "config.json."
        )
    save = f"m.save_pretrained('{to}', save_original_format=False)"  # transformers would quantise them again
    if kind == "bitsandbytes":
        command = f"{load}); m = m.dequantize(); {save}"
        return f'{_OWN}; or dequantise it (pip install bitsandbytes accelerate): python -c "{command}"'
    if kind in _WAYS_BACK:
        command = f"{load}, quantization_config=t.{_WAYS_BACK[kind]}(dequantize=True)); {save}"
        more = "compressed-tensors accelerate" if kind == "compressed-tensors" else "accelerate"
        return f'{_OWN}; or dequantise it (pip install {more}): python -c "{command}"'
    if kind in ("gptq", "awq"):
        command = f"from gptqmodel.utils.model_dequant import dequantize_model as d; d('{path}', '{to}')"
        return f'{_OWN}; or dequantise it (pip install gptqmodel): python -c "{command}"'
    return f"{_OWN}."


def _refuse_ungathered(checkpoint: Model) -> None:
    """Refuse empty weights of a Hugging Face model. Other state dicts may hold empty tensors on purpose."""
    if not checkpoint.is_hugging_face:
        return
    empty = [
        name
        for name, info in checkpoint.tensors.items()
        if info.shape == (0,) and info.dtype.is_floating_point and name.endswith("weight")
    ]
    if empty:
        raise CheckpointError(f"{checkpoint.path}: {ungathered(empty[0], len(empty))}.", GATHER)


def ungathered(name: str, count: int) -> str:
    """Words on empty tensors of which others hold numbers."""
    more = f" (the first of {count} such)" if count > 1 else ""
    return (
        f"tensor {name!r} is empty{more}. DeepSpeed's ZeRO-3 saves such tensors where the parts of the processes are "
        "not gathered"
    )


GATHER = (
    "Save with stage3_gather_16bit_weights_on_model_save: true in DeepSpeed's configuration, or gather its checkpoint: "
    "python zero_to_fp32.py . model --safe_serialization"
)
