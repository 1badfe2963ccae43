"""Configs of the models of a merge, compared field by field.

Two models may have the same tensors and compute different things with them: the base of their rotary embeddings, the
epsilon of a norm, the activation or the number of heads leave no trace in shapes. A merge has one config, so a
difference in such a field is refused unless the option ``config`` says whose config it is:

    same    a field that changes the computation may not differ (the rest is told)
    base    everything is computed with the base's config
    first   everything is computed with the first expert's
    each    an expert alone is computed with its own; merges with the base's (without a base, the first expert's)

The rule is cautious: a field counts unless it is known not to change what a model computes in evaluation. Fields that a
file leaves out have the defaults of transformers' classes, where transformers is installed and knows the family. What
``generation_config.json`` and the processors of images and sound say counts, too, as far as results depend on it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ecotone.merging.models.model import Model
from ecotone.populations.errors import CheckpointError, InputError
from ecotone.populations.parsing import foreign_or_none

Choice: TypeAlias = Literal["same", "base", "first", "each"]
Fields: TypeAlias = dict[str, Any]
"""By dotted name, the value of every field of nested mappings."""

GENERATION = "generation_config.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")

_SHOWN = 5
_LISTED = 8

_REASONS = {
    "names, versions, types and files": """
        _name_or_path name_or_path _commit_hash transformers_version architectures torch_dtype dtype auto_map
        custom_pipelines finetuning_task task_specific_params tokenizer_class processor_class unsloth_version
        unsloth_fixed model_name _diffusers_version""",
    "how it is run": """
        use_cache attn_implementation _attn_implementation _attn_implementation_internal _attn_implementation_autoset
        _experts_implementation torchscript return_dict use_return_dict output_attentions output_hidden_states
        output_router_logits output_scores output_past use_flash_attn use_bfloat16 gradient_checkpointing
        use_gradient_checkpointing pretraining_tp chunk_size_feed_forward keys_to_ignore_at_inference use_mamba_kernels
        return_dict_in_generate cache_implementation""",
    "training: initial values, losses, masks and noise that are drawn": """
        initializer_range init_std initializer_factor init_xavier_std problem_type router_aux_loss_coef
        router_z_loss_coef aux_loss_coef aux_loss_alpha seq_aux label_smoothing ctc_loss_reduction ctc_zero_infinity
        apply_spec_augment mask_time_prob mask_time_length mask_time_min_masks mask_feature_prob mask_feature_length
        mask_feature_min_masks""",
    "texts of classes; sizes, which are compared where tensors are": """
        id2label label2id num_labels vocab_size""",
}
_NEUTRAL = frozenset(name for names in _REASONS.values() for name in names.split())
_OF_DRAWING = """
    do_sample temperature top_p top_k min_p typical_p top_h epsilon_cutoff eta_cutoff max_length min_length
    max_new_tokens early_stopping num_return_sequences remove_invalid_values _from_model_config"""
_DRAWING = frozenset(_OF_DRAWING.split())
"""Fields of generation that no objective uses: texts are greedy, and as long as objectives say."""
_DROPOUT = re.compile(r"(dropout|_pdrop|dropout_p|dropout_prob|dropout_rate|layerdrop|drop_path|drop_path_rate|drop)$")
_ACTIVE = ("token_dropout", "moe_token_dropout")  # ESM and NLLB-MoE scale by them in evaluation, too
_TIES = ("tie_word_embeddings", "tie_encoder_decoder")
_STATELESS_ROPE = frozenset((None, "default", "linear", "llama3", "mrope"))
"""Kinds of rotary embeddings that are the same whatever the longest input is said to be."""

_NEUTRAL_IN_GENERATION = frozenset(("bos_token_id", "pad_token_id", "chat_format", "stop_words_ids"))
_GENERATION_DEFAULTS: Mapping[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "renormalize_logits": False,
}
_IDS = ("eos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
_OF_PROCESSORS = """
    image_processor_type feature_extractor_type video_processor_type processor_class auto_map transformers_version
    _valid_processor_keys valid_kwargs data_format input_data_format device return_tensors return_metadata use_fast
    backend disable_grouping chat_template _processor_class tokenizer_class"""
_NEUTRAL_IN_PROCESSORS = frozenset(_OF_PROCESSORS.split())


@dataclass(frozen=True)
class Difference:
    """A field that is not the same in all models.

    Args:
        field: Its dotted name, after the file's or the processor's where it is not of ``config.json``.
        values: By model's name, its value; None where it is not set.
        matters: Whether results depend on it.
    """

    field: str
    values: Mapping[str, Any]
    matters: bool

    def __str__(self) -> str:
        """``rope_theta is 10000.0 in 'base' and 500000.0 in 'a', 'b'``."""
        groups: list[tuple[Any, list[str]]] = []
        for name, value in self.values.items():
            members = next((names for known, names in groups if known == value), None)
            if members is None:
                groups.append((value, [repr(name)]))
            else:
                members.append(repr(name))
        return f"{self.field} is " + " and ".join(f"{_shown(value)} in {', '.join(names)}" for value, names in groups)


def check(models: Sequence[Model], base: Model | None, choice: Choice) -> None:
    """Refuse models whose configs differ in what they compute, unless a choice says whose config a merge has.

    Args:
        models: All models of a merge, the base among them.
        base: The base, if there is one.
        choice: Whose config it is.

    Raises:
        InputError: ``base`` without a base, or an unknown choice.
        CheckpointError: The choice is ``same`` and they differ; fields and values are named.
    """
    if choice not in ("same", "base", "first", "each"):
        raise InputError(f"config: expected same, base, first or each, found {choice!r}.")
    if choice == "base" and base is None:
        raise InputError(
            "config: 'base' needs a base model, found none.", "Use 'first' or 'each', or give the base (models.config)."
        )
    if choice == "each":
        _check_heads(models)
    if choice != "same":
        return
    found = [difference for difference in compare(models) if difference.matters]
    if found:
        few = "; ".join(map(str, found[:_SHOWN]))
        more = f"; and {len(found) - _SHOWN} more fields" if len(found) > _SHOWN else ""
        raise CheckpointError(
            f"The configs of the models differ in what is computed: {few}{more}.", _remedy(models, base)
        )


def _check_heads(models: Sequence[Model]) -> None:
    """Refuse to compute experts with configs of their own where one has a head that the merges' class lacks."""
    for difference in compare(models):
        if difference.field == "architectures" and difference.matters:
            raise CheckpointError(
                f"config: 'each' computes models of one class, found others: {difference}.",
                "Give models with one head, or choose 'base' or 'first' (models.config), whose class computes all.",
            )


def no_own(expert: Model) -> InputError:
    """The error of an expert that is to be computed with its own config by a module that is not made of configs."""
    return InputError(
        f"config: 'each' makes a module of each expert's config, as architecture 'auto' does; found another "
        f"architecture, and {expert.name!r} has a config that computes something else.",
        "Use architecture: auto, or choose 'base' or 'first' (models.config).",
    )


def _remedy(models: Sequence[Model], base: Model | None) -> str:
    first = next(model.name for model in models if model is not base)
    ways = [] if base is None else ["'base' computes everything with the base's config"]
    ways.append(f"'first' with that of {first!r}" if ways else f"'first' computes everything with that of {first!r}")
    whose = "the base's" if base is not None else f"that of {first!r}"
    ways.append(f"'each' computes an expert alone with its own and merges with {whose}")
    return f"Choose with the option models.config: {', '.join(ways)}."


def compare(models: Sequence[Model]) -> list[Difference]:
    """The fields in which the configs of models differ, in the files' order. Models without a config are left out.

    Args:
        models: Any number of models; plain weights have no config.
    """
    owners = [model for model in models if model.config is not None]
    if len(owners) < 2:
        return []
    names = _labels(owners)
    plain = [dict(model.config or {}) for model in owners]
    found = _of_configs(names, plain)
    if any(difference.matters for difference in found):
        found = _of_configs(names, _filled(plain))
    if len({frozenset(model.tensors) for model in owners}) > 1:
        found = [replace(one, matters=one.matters or _of_classes(one)) for one in found]
    return [*found, *_of_generation(owners), *_of_processors(owners)]


def _of_classes(difference: Difference) -> bool:
    """Whether models are of other classes: then one has a head that another lacks, if their tensors differ, too."""
    return difference.field == "architectures" and all(difference.values.values())


def described(differences: Sequence[Difference], choice: Choice, whose: str) -> str:
    """One sentence for ``validate``.

    Args:
        differences: What ``compare`` found.
        choice: The choice that was made.
        whose: The name of the model whose config merges have.
    """
    counted = [difference for difference in differences if difference.matters]
    told = ", ".join(_few([difference.field for difference in differences if not difference.matters]))
    rest = f"; differences in {told} change no computation" if told else ""
    if not counted:
        return f"the same but for {told}" if told else "the same"
    scored = f"merges have that of {whose!r}" + (", an expert alone its own" if choice == "each" else "")
    return f"{scored} ({choice}): {'; '.join(_few(list(map(str, counted))))}{rest}"


def _labels(models: Sequence[Model]) -> list[str]:
    """The models' names, with the path where two have one name."""
    names = [model.name for model in models]
    return [
        name if names.count(name) == 1 else f"{name} ({model.path})" for name, model in zip(names, models, strict=True)
    ]


def _few(texts: Sequence[str]) -> list[str]:
    return [*texts[:_LISTED], *([f"{len(texts) - _LISTED} more"] if len(texts) > _LISTED else [])]


def _shown(value: Any) -> str:
    text = "unset" if value is None else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- config.json -----------------------------------------------------------------------------------------


def _of_configs(names: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> list[Difference]:
    records = [dict(_flat(config)) for config in configs]
    return [Difference(field, values, _matters(field, records)) for field, values in _differing(names, records)]


def _matters(field: str, records: Sequence[Fields]) -> bool:
    """Whether results depend on a field of ``config.json``, where it differs."""
    parts = field.split(".")
    last = parts[-1]
    if any(part in _NEUTRAL for part in parts) or (_DROPOUT.search(last) and last not in _ACTIVE):
        return False
    if field in _DRAWING:
        return field == "temperature" and not all(map(_is_decoder, records))  # TAPAS divides by it
    if last in _TIES:  # are compared where tensors are; T5 and its kin scale by them, too
        return any(record.get("is_encoder_decoder") for record in records)
    beside = field.removesuffix(last)
    if last == "max_position_embeddings":
        return not all(_rope_ignores_length(record, beside) for record in records)
    if last in ("sliding_window", "max_window_layers"):
        windows = all(record.get(f"{beside}use_sliding_window") is False for record in records)
        layers = last == "max_window_layers" and all(record.get(f"{beside}layer_types") for record in records)
        return not (windows or layers)
    if last == "pad_token_id" and any(record.get(field) is None for record in records):
        return not all(map(_is_decoder, records))
    return True


def _rope_ignores_length(record: Fields, beside: str) -> bool:
    """Whether positions are rotary ones that do not depend on the longest input."""
    rope = [name for name in record if name.startswith(f"{beside}rope_") or name == f"{beside}rotary_emb_base"]
    kinds = {_single(record[name]) for name in rope if name.rpartition(".")[2] in ("rope_type", "type")}
    return bool(rope) and kinds <= _STATELESS_ROPE


def _is_decoder(record: Fields) -> bool:
    """Whether it is a language model without an encoder of text: no result of one depends on its padding."""
    kinds = record.get("architectures")
    first = kinds[0] if isinstance(kinds, list) and kinds else ""
    return str(first).endswith(("ForCausalLM", "ForConditionalGeneration")) and not record.get("is_encoder_decoder")


def _filled(configs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The configs with the defaults of transformers' classes; as they are where it does not know all of them."""
    try:
        from transformers import CONFIG_MAPPING

        return [
            CONFIG_MAPPING[str(config["model_type"])].from_dict(deepcopy(dict(config))).to_dict() for config in configs
        ]
    except Exception:  # not installed, another family, or one whose class cannot read a field
        return list(configs)


# -- generation ------------------------------------------------------------------------------------------


def _of_generation(models: Sequence[Model]) -> list[Difference]:
    """Differences of what ends and changes a greedy text. A model without the file has the ids of its config."""
    owners = [model for model in models if model.config is not None]
    files = [_json(model.files / GENERATION) for model in owners]
    if not any(files):
        return []
    records = [
        {**_GENERATION_DEFAULTS, **(file or {name: (model.config or {}).get(name) for name in _IDS})}
        for model, file in zip(owners, files, strict=True)
    ]
    found = _differing(_labels(owners), [dict(_flat(one)) for one in records])
    neutral = _NEUTRAL | _DRAWING | _NEUTRAL_IN_GENERATION
    return [
        Difference(f"{GENERATION}: {field}", values, not any(part in neutral for part in field.split(".")))
        for field, values in found
    ]


def generate_alike(ours: Model, theirs: Model) -> bool:
    """Whether the generation configs of two models end and change a greedy text alike."""
    return not any(one.matters for one in _of_generation([ours, theirs]))


# -- processors ------------------------------------------------------------------------------------------


def _of_processors(models: Sequence[Model]) -> list[Difference]:
    """Differences of the processors of images, video and sound, among the models that have one."""
    folders = dict(zip(_labels(models), [model.files for model in models], strict=True))
    records = {name: _processors(folder) for name, folder in folders.items()}
    found: list[Difference] = []
    for part in dict.fromkeys(part for record in records.values() for part in record):
        owners = {name: record[part] for name, record in records.items() if part in record}
        differing = _differing(list(owners), [dict(_flat(one)) for one in owners.values()])
        if part == "image_processor" and any(_counts_in_processors(field) for field, _ in differing):
            loaded = _loaded_image_processors([folders[name] for name in owners])
            if loaded is not None:
                differing = _differing(list(owners), [dict(_flat(one)) for one in loaded])
        found += [Difference(f"{part}: {field}", values, _counts_in_processors(field)) for field, values in differing]
    return found


def _counts_in_processors(field: str) -> bool:
    return not any(part in _NEUTRAL_IN_PROCESSORS for part in field.split("."))


def _processors(folder: Path) -> dict[str, dict[str, Any]]:
    """By kind of processor, its fields, whichever file they are in."""
    found: dict[str, dict[str, Any]] = {}
    plain, whole, video = (_json(folder / name) for name in PROCESSORS)
    if plain:
        sound = "feature_extractor_type" in plain and "image_processor_type" not in plain
        found["feature_extractor" if sound and "image_mean" not in plain else "image_processor"] = plain
    if video:
        found["video_processor"] = video
    rest = {}
    for name, value in whole.items():
        if name.endswith(("image_processor", "feature_extractor", "video_processor")) and isinstance(value, dict):
            found.setdefault(name, value)
        else:
            rest[name] = value
    return found | ({"processor": rest} if rest else {})


def _loaded_image_processors(folders: Sequence[Path]) -> list[Mapping[str, Any]] | None:
    """The fields of image processors, defaults included, as transformers loads them; None where it cannot."""
    try:
        from transformers import AutoImageProcessor

        return [AutoImageProcessor.from_pretrained(folder, local_files_only=True).to_dict() for folder in folders]
    except Exception:  # not installed, no package for images, or a class that it does not know
        return None


# -- fields ----------------------------------------------------------------------------------------------


def _differing(names: Sequence[str], records: Sequence[Fields]) -> list[tuple[str, dict[str, Any]]]:
    """Fields that differ, each with its value in every model; a field that is not there is None."""
    fields = dict.fromkeys(field for record in records for field in record)
    values = {field: [record.get(field) for record in records] for field in fields}
    return [
        (field, dict(zip(names, each, strict=True)))
        for field, each in values.items()
        if any(not _equal(field, each[0], other) for other in each[1:])
    ]


def _equal(field: str, ours: Any, theirs: Any) -> bool:
    if field.rpartition(".")[2] == "eos_token_id":  # one id, or several in any order
        return _ids(ours) == _ids(theirs)
    return bool(ours == theirs)


def _ids(value: Any) -> set[Any]:
    return {_single(one) for one in value} if isinstance(value, list) else {_single(value)}


def _single(value: Any) -> Any:
    """A value that can be in a set: lists and mappings, which no such field holds, as text."""
    return value if isinstance(value, str | int | float | None) else repr(value)


def _flat(record: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of nested mappings, by dotted name."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none that can be read: its loader refuses it."""
    try:
        return foreign_or_none(path)
    except OSError:
        return {}
