"""How the files of a LoRA adapter say what it does to its base.

PEFT stores an adapter's tensors by the names of the modules that it has wrapped. Its ``adapter_config.json`` has the
scales. What PEFT merges otherwise than ``base + scale * B @ A`` is either formed in the same way
(``ecotone.merging.models.lora_changes``) or refused, with the command that merges it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ecotone.merging.models.checkpoint import ADAPTER, ADAPTER_CONFIG, json_object
from ecotone.merging.models.layout import Layout, has_token_rows
from ecotone.merging.models.lora_changes import (
    Added,
    Change,
    Changes,
    Elements,
    Kept,
    Normed,
    Part,
    Rows,
    Shifted,
    Update,
    Weights,
    parts_of,
)
from ecotone.merging.models.lora_names import Spot, Target, Targets
from ecotone.merging.models.model import Model
from ecotone.merging.models.names import Place, Scattered
from ecotone.merging.models.ties import OUTPUT_EMBEDDINGS, tied, tied_embedding
from ecotone.populations.errors import CheckpointError, can_be_pasted, nearest, shown

_FACTOR = re.compile(r"(.+)\.(lora_(?:embedding_)?[AB])(?:\.(?!weight$|bias$)[^.]+)?(?:\.(weight|bias))?")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.[^.]+)*")
_TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")
_FROZEN = re.compile(r"\.original_module\.|\.trainable_tokens_original(\.|$)|\.token_indices(\.|$)")
_NO_LORA = re.compile(r"\.lora_E$|\.lora_variant|\.hada_|\.ia3_|\.vera_")
_OTHER_KINDS = re.compile(rf"{_NO_LORA.pattern}|\.lokr_")
_OTHER_PROGRAMS = re.compile(
    r"^(lora_(unet|te\d?|prior)|lycoris)_|\.lora_(down|up|mid)\.|^(?!base_model\.).*\.(hada|lokr)_w[12]"
)
_CHANGED = (  # options with which an adapter is not base + scale * B @ A
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
)
_NOT_MERGED = ("use_qalora", "alora_invocation_tokens", "arrow_config", "layer_replication")  # by PEFT, either
_OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that change the base
_NOT_FOUND_AGAIN = ("corda", "lora_ga", "pissa_niter")  # the changed base, by PEFT when it loads the adapter
_ITS_PROGRAM = "Merge the adapter into its base with the program that made it, and give the result."
_PREFIX = "base_model."  # of all tensors that PEFT loads
_CLASSES = {  # of PEFT, by an adapter's task
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
_WITHOUT_WEIGHTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT")


class TiedBaseError(CheckpointError):
    """An adapter changes an output or an embedding that its base has as one tensor."""


def weights_of(place: Path) -> Path:
    """The file of an adapter's tensors.

    Raises:
        CheckpointError: There is none.
    """
    if (place / ADAPTER).is_file():
        return place / ADAPTER
    pickled = place / "adapter_model.bin"
    if pickled.is_file():
        return pickled  # refused as a pickle, with the way to convert it
    raise CheckpointError(
        f"{place}: expected {ADAPTER} beside {ADAPTER_CONFIG}, found none.", "Save the adapter again."
    )


def settings_of(place: Path, names: Iterable[str] = ()) -> dict[str, Any]:
    """The ``adapter_config.json`` of a directory.

    Args:
        place: The directory.
        names: Those of the adapter's tensors, by which an error tells whether PEFT can merge it.

    Raises:
        CheckpointError: It cannot be read, or is of an adapter that cannot be formed when it is read.
    """
    config = json_object(place / ADAPTER_CONFIG, "Download or save the adapter again.")
    names = list(names)
    _check_fields(place / ADAPTER_CONFIG, config)
    _refuse_other_programs(place, names)
    kind, start = config.get("peft_type"), str(config.get("init_lora_weights")).lower()
    if kind in _WITHOUT_WEIGHTS:
        raise CheckpointError(
            f"{place}: expected a LoRA adapter, but its {ADAPTER_CONFIG} says peft_type {kind!r}, which changes no "
            "weight: it adds to what the model reads, and cannot be merged.",
            "Give models or LoRA adapters.",
        )
    if kind != "LORA":
        raise refused(place, f"its {ADAPTER_CONFIG} says peft_type {kind!r}", config, names)
    for option in _CHANGED:
        if config.get(option):
            reason = f"its {ADAPTER_CONFIG} sets {option}"
            if option in _NOT_MERGED:
                raise _not_plain(place, reason, "PEFT cannot merge it, either. Give models or plain LoRA adapters.")
            raise refused(place, reason, config, names)
    if start.startswith(_OTHER_BASES):
        reason = f"its {ADAPTER_CONFIG} says init_lora_weights {start!r}, which changes the base"
        if start.startswith(_NOT_FOUND_AGAIN):
            raise _not_plain(
                place,
                reason,
                "PEFT does not find that base again when it loads the adapter. Save it as a plain one where it was "
                "trained: save_pretrained(..., path_initial_model_for_weight_conversion=...).",
            )
        raise refused(place, reason, config, names)
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e30


def _fits_as_pattern(pattern: Any) -> bool:
    """Whether a text is a regular expression that ends soon: it repeats little, and nothing that repeats itself."""
    if not isinstance(pattern, str) or len(pattern) > 1000 or re.search(r"\)[*+{]", pattern):
        return False
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return len(re.findall(r"(?<!\\)[*+{]", pattern)) <= 4


def _are_patterns(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_fits_as_pattern, value)) and all(map(_is_number, value.values()))


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _are_indices(value: Any) -> bool:
    lists = value.values() if isinstance(value, dict) else [value]
    return all(isinstance(one, list) and all(type(index) is int for index in one) for one in lists)


_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_number, "a number"),
    "lora_alpha": (_is_number, "a number"),
    "rank_pattern": (_are_patterns, "numbers by simple regular expressions"),
    "alpha_pattern": (_are_patterns, "numbers by simple regular expressions"),
    "target_parameters": (_are_texts, "a list of names"),
    "trainable_token_indices": (_are_indices, "a list of numbers, or such lists by name"),
    "base_model_name_or_path": (lambda value: isinstance(value, str), "text"),
}
"""What the fields that are read may hold, and the same in words; null stands for none."""


def _check_fields(file: Path, config: Mapping[str, Any]) -> None:
    for field, (fits, expected) in _FIELDS.items():
        value = config.get(field)
        if value is not None and not fits(value):
            raise CheckpointError(
                f"{file}: {field}: expected {expected}, found {shown(repr(value), 100)}.",
                "Download or save the adapter again.",
            )


def read(place: Path, base: Model, stored: Weights, settings: Mapping[str, Any]) -> Changes:
    """What an adapter does to its base, by tensor.

    Args:
        place: Its directory.
        base: Its base.
        stored: Its tensors.
        settings: Its ``adapter_config.json``.

    Raises:
        CheckpointError: It is no LoRA, or does not fit the base.
    """
    return _Reader(place, base, stored, settings).read()


def refused(place: Path, reason: str, settings: Mapping[str, Any], names: Iterable[str]) -> CheckpointError:
    """The error of an adapter that cannot be formed when it is read, with the command by which PEFT merges it.

    Args:
        place: Its directory.
        reason: Why it cannot.
        settings: Its ``adapter_config.json``.
        names: Those of its tensors. PEFT passes over all that do not begin as its own do.
    """
    if not isinstance(settings.get("peft_type"), str) or not all(name.startswith(_PREFIX) for name in names):
        said = f"PEFT would not load it (the names of the tensors that it loads begin with {_PREFIX!r})."
        return _not_plain(place, reason, f"{said} {_ITS_PROGRAM}")
    task, base = settings.get("task_type"), settings.get("base_model_name_or_path")
    kind = _CLASSES.get(str(task), "AutoPeftModelForCausalLM")
    if (task or settings.get("auto_mapping")) and base:
        load = f"from peft import {kind} as M; m = M.from_pretrained('{place}')"
    else:  # PEFT does not know the class of the base, or its place
        whole = kind.replace("AutoPeft", "Auto")
        whole = "AutoModel" if whole == "AutoModelForFeatureExtraction" else whole
        load = (
            f"from peft import PeftModel as P; from transformers import {whole} as M; "
            f"m = P.from_pretrained(M.from_pretrained('{base or 'its base'}'), '{place}')"
        )
    if not can_be_pasted(place, base):
        return _not_plain(place, reason, _ITS_PROGRAM)  # a shell or Python might read the name as more than a name
    command = f"{load}; m.merge_and_unload().save_pretrained('{place.name}-merged')"
    return _not_plain(place, reason, f'Merge it into its base and give the result: python -c "{command}"')


def _not_plain(place: Path, reason: str, remedy: str) -> CheckpointError:
    return CheckpointError(f"{place}: expected a plain LoRA adapter (base + scale * B @ A), but {reason}.", remedy)


def _refuse_other_programs(path: Path, names: Iterable[str]) -> None:
    """Refuse tensors that have the names of other programs: PEFT passes over them and gives back the base."""
    for name in names:
        if _OTHER_PROGRAMS.search(name):
            raise CheckpointError(
                f"{path}: expected a model or an adapter of PEFT's, found a tensor {name!r}, as LyCORIS and Kohya's "
                "programs name those of their adapters.",
                _ITS_PROGRAM,
            )


def refuse_other_adapters(path: Path, names: Iterable[str]) -> None:
    """Refuse tensors that are those of an adapter and that come without PEFT's configuration.

    Args:
        path: Where they come from.
        names: Their names.

    Raises:
        CheckpointError: They are.
    """
    names = list(names)
    _refuse_other_programs(path, names)
    for name in names:
        if _FACTOR.fullmatch(name) or (name.startswith(_PREFIX) and _OTHER_KINDS.search(name)):
            raise CheckpointError(
                f"{path}: expected a model, found an adapter's tensor {name!r}.",
                f"Give the directory that holds it and its {ADAPTER_CONFIG}, as an expert beside its base.",
            )


class _Reader:
    """Reads an adapter's headers and configuration, and checks them against its base."""

    def __init__(self, place: Path, base: Model, stored: Weights, settings: Mapping[str, Any]) -> None:
        self.place, self.base, self.stored, self.settings = place, base, stored, settings
        self.aliases = {**Layout.of(base).aliases, **self._outputs()}
        self.targets = Targets(base, self.aliases)
        self.kept: dict[str, Kept] = {}  # by tensor of the base, what the adapter stores in its place
        self.changes: dict[str, list[Change]] = {}
        self.rows: dict[str, str] = {}  # by tensor of the base, the key of its trained tokens

    def _outputs(self) -> dict[str, str]:
        """Outputs that the adapter names and a tied base does not store, and the embedding in their place."""
        kept = tied_embedding(self.base)
        if kept is None:
            return {}
        names = {_tensor_meant(key) for key in self.stored.tensors} - set(self.base.tensors)
        pairs = tied(self.base)
        return {name: pairs.get(name, kept) for name in names if name in pairs or name.endswith(OUTPUT_EMBEDDINGS)}

    def read(self) -> dict[str, tuple[Change, ...]]:
        """The adapter's changes by the name of the base's tensor."""
        modules: dict[str, dict[str, str]] = {}
        tokens: dict[str, str] = {}
        for key in self.stored.tensors:
            if _FROZEN.search(key):
                continue
            if match := _TOKENS.fullmatch(key):
                tokens[_plain(match[1])] = key
            elif match := _MAGNITUDE.fullmatch(key):
                self._part(modules, match[1], "magnitude", key)
            elif match := _FACTOR.fullmatch(key):
                self._part(modules, match[1], match[2] + (".bias" if match[3] == "bias" else ""), key)
            elif _NO_LORA.search(key):
                remedy = f"PEFT would pass over that tensor. {_ITS_PROGRAM}"
                raise _not_plain(self.place, f"its tensor {key!r} belongs to no plain LoRA", remedy)
            else:
                self._keep(key)
        for module, parts in modules.items():
            self._factors(module, parts)
        for module, key in tokens.items():
            self._tokens(module, key)
        self._check_ties()
        names = dict.fromkeys([*self.kept, *self.changes])
        return {
            name: (*([self.kept[name]] if name in self.kept else []), *self.changes.get(name, []))
            for name in names
            if name not in self.aliases
        }

    def _refused(self, reason: str) -> CheckpointError:
        return refused(self.place, reason, self.settings, self.stored.tensors)

    def _part(self, modules: dict[str, dict[str, str]], module: str, part: str, key: str) -> None:
        parts = modules.setdefault(_without_prefix(module), {})
        if part in parts:
            reason = f"it holds two adapters, {parts[part]!r} and {key!r}"
            raise _not_plain(self.place, reason, "PEFT would load one of them. Save each in a directory of its own.")
        parts[part] = key

    # -- tensors that are stored whole ---------------------------------------------------------------------

    def _keep(self, key: str) -> None:
        """Note a tensor that takes the place of the base's. PEFT loads the plain name where it has written two."""
        plain = _plain(key)
        if ".modules_to_save." in key and any(
            other != key and _plain(other) == plain and ".modules_to_save." not in other
            for other in self.stored.tensors
        ):
            return
        target = self._known(plain, key)
        found = self.stored.tensors[key].shape
        name = target.whole
        resized = name is not None and has_token_rows(self.base, name) and found[1:] == target.shape[1:]
        if found != target.shape and not resized:
            raise self._misshapen(key, found, target)
        for name, spot in target.spots.items():
            self._check_single(spot, key)
            self.kept[name] = Kept(key, target.name, spot)

    def _check_single(self, spot: Spot, key: str) -> None:
        if isinstance(spot, Scattered) and len(spot.targets) > 1:
            raise self._refused(f"its tensor {key!r} is only a part of the base's {spot.name!r}")

    # -- low-rank updates ----------------------------------------------------------------------------------

    def _factors(self, module: str, parts: Mapping[str, str]) -> None:
        embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
        first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        for lacking, given in ((first, second), (second, first)):
            if lacking not in parts:
                raise CheckpointError(
                    f"{self.stored.path}: module {module!r}: expected {lacking} beside "
                    f"{parts.get(given, next(iter(parts.values())))!r}, found none.",
                    "Save or download the adapter again.",
                )
        target, parameter, stack_is_transposed = self._target(module, parts[first])
        shape = self._resized(target)
        experts = shape[0] if parameter and len(shape) == 3 else 1
        pattern = target.name if parameter else _plain(module)
        transposed = embedding or (stack_is_transposed if experts > 1 else bool(self.settings.get("fan_in_fan_out")))
        rank = self._rank(pattern, parts[first], experts)
        scale = self._scale(pattern, rank)
        update = Update(module, target.name, parts[first], parts[second], scale, transposed, experts, parameter)
        self._check_product(update, rank, target, shape)
        self._check_magnitude(update, parts.get("magnitude"), target)
        for name, spot in target.spots.items():
            self.changes.setdefault(name, []).append(self._change(update, target, spot, parts.get("magnitude")))
        if f"{second}.bias" in parts:
            self._bias(module, parts[f"{second}.bias"], scale)

    def _change(self, update: Update, target: Target, spot: Spot, magnitude: str | None) -> Change:
        if magnitude is not None:
            return Normed(update, magnitude)
        if spot is None:
            return Added(update, tuple(Part(expert) for expert in range(update.experts)))
        parts = parts_of(spot, update.shape(self.stored)) if isinstance(spot, Place) else None
        return Elements(update, spot) if parts is None else Added(update, parts)

    def _target(self, module: str, key: str) -> tuple[Target, bool, bool]:
        """The tensor that a module's factors change; whether it was chosen as a parameter; whether it is (E, in, out).

        PEFT wraps a module once for each of its parameters, in their order; the first is the innermost.
        """
        plain = _plain(module)
        wanted = self.settings.get("target_parameters") or ()
        if wanted:
            names, transposed = self.targets.parameters(plain, wanted)
            place = len(names) - 1 - module.count(".base_layer")
            if 0 <= place < len(names):
                return self._known(names[place], key), True, transposed
        return self._known(f"{plain}.weight", key), False, False

    def _resized(self, target: Target) -> tuple[int, ...]:
        """The shape of a tensor, which the adapter may store with another number of rows."""
        kept = self.kept.get(target.whole or "")
        return target.shape if kept is None else self.stored.tensors[kept.key].shape

    def _check_product(self, update: Update, rank: int, target: Target, shape: tuple[int, ...]) -> None:
        a, b = self.stored.tensors[update.a].shape, self.stored.tensors[update.b].shape
        fits = len(a) > 1 and len(b) > 1 and b[1] == rank * update.experts and all(extent == 1 for extent in b[2:])
        product = (b[0], *a[1:]) if b else ()
        turned = product[::-1] if update.transposed else product
        if fits and (turned if update.experts == 1 else (update.experts, *turned)) == shape:
            return
        remedy = "Is it the base the adapter was trained on?"
        if fits and update.experts == 1 and (product if update.transposed else product[::-1]) == shape:
            remedy = f"Does fan_in_fan_out in {ADAPTER_CONFIG} say how the base stores its weights?"
        raise CheckpointError(
            f"{self.stored.path}: the adapter's factors of {target.name!r}, {a} and {b}, do not make the base's "
            f"shape {shape}.",
            remedy,
        )

    def _check_magnitude(self, update: Update, magnitude: str | None, target: Target) -> None:
        if magnitude is None:
            if self.settings.get("use_dora"):
                raise CheckpointError(
                    f"{self.stored.path}: module {update.module!r}: expected lora_magnitude_vector, as use_dora in "
                    f"{ADAPTER_CONFIG} says, found none.",
                    "Save or download the adapter again.",
                )
            return
        if not self.settings.get("use_dora"):
            raise _not_plain(
                self.place,
                f"its tensor {magnitude!r} belongs to no plain LoRA: use_dora is not set",
                f"PEFT would pass over it. If the adapter was trained with DoRA, set use_dora in {ADAPTER_CONFIG}.",
            )
        if target.whole is None:
            raise self._refused(f"it sets use_dora on {target.name!r}, which the base stores in several tensors")
        _, rows, columns = update.shape(self.stored)
        expected = columns if update.transposed else rows
        found = self.stored.tensors[magnitude]
        if found.size != expected:
            raise CheckpointError(
                f"{self.stored.path}: tensor {magnitude!r}: expected {expected} numbers, found shape {found.shape}.",
                "Save or download the adapter again.",
            )

    def _bias(self, module: str, key: str, scale: float) -> None:
        name = f"{_plain(module)}.bias"
        target = self.targets.named(name)
        if target is None:
            raise CheckpointError(
                f"{self.stored.path}: the adapter adds {key!r} to a bias, and the base {self.base.name!r} has no "
                f"{name!r}: PEFT cannot merge it, either.",
                "Train the adapter without lora_bias, or give models whose layers have biases.",
            )
        found = self.stored.tensors[key].shape
        if found != target.shape:
            raise self._misshapen(key, found, target)
        for name, spot in target.spots.items():
            self._check_single(spot, key)
            self.changes.setdefault(name, []).append(Shifted(key, scale, target.name, spot))

    # -- trained tokens ------------------------------------------------------------------------------------

    def _tokens(self, module: str, key: str) -> None:
        """Note the rows of an embedding, or of an output, that the adapter stores."""
        target = self._known(f"{module}.weight", key)
        chosen = self.settings.get("trainable_token_indices")
        if isinstance(chosen, Mapping):
            chosen = next((each for end, each in chosen.items() if f".{module}".endswith(f".{end}")), None)
        name, found, shape = target.whole, self.stored.tensors[key].shape, self._resized(target)
        listed = isinstance(chosen, list) and all(isinstance(one, int) and 0 <= one < shape[0] for one in chosen)
        if not listed or name is None or found != (len(set(chosen or ())), *shape[1:]):
            raise CheckpointError(
                f"{self.stored.path}: tensor {key!r} has shape {found}; expected a row of {target.name!r}, {shape}, "
                f"for each number of trainable_token_indices in {ADAPTER_CONFIG}, found {chosen}.",
                "Do the two files belong together, and to this base?",
            )
        if name in self.changes:
            raise self._refused(f"it changes {name!r} twice, by factors and by trained tokens")
        self.rows[name] = key
        self.changes[name] = [Rows(key, tuple(chosen or ()), target.name)]

    # -- ties ----------------------------------------------------------------------------------------------

    def _check_ties(self) -> None:
        """Refuse an adapter that unties weights that the base has tied. Trained tokens of an input are its output's."""
        embedding = tied_embedding(self.base)
        for kept in {*self.aliases.values(), *([embedding] if embedding else [])}:
            group = [kept, *(name for name, place in self.aliases.items() if place == kept)]
            changed = [name for name in group if name in self.changes]
            stored = [name for name in group if name in self.kept]
            if not changed and not stored:
                continue
            alike = len(stored) > 1 and stored[0] == kept and all(self._same(kept, name) for name in stored)
            tied = alike or bool(self.settings.get("ensure_weight_tying"))
            if not (self._same_rows(kept, changed) if changed else tied) or (changed and stored and not tied):
                names = " and ".join(repr(name) for name in changed or stored)
                raise TiedBaseError(
                    f"{self.place}: the adapter changes {names}, and the base {self.base.name!r} has {kept!r} tied to "
                    "its output: together they are no tied model.",
                    "Merge the adapter into an untied copy of the base (tie_word_embeddings: false), and untie all "
                    "models of the merge.",
                )
            if stored:
                self.kept.setdefault(kept, self.kept[stored[0]])

    def _same(self, kept: str, alias: str) -> bool:
        return self._equal(self.kept[kept].key, self.kept[alias].key)

    def _same_rows(self, kept: str, changed: list[str]) -> bool:
        """Whether all that is changed of tied tensors are the same rows of them, the first's at least."""
        if kept not in changed or not all(name in self.rows for name in changed):
            return False
        tokens = [one.tokens for name in changed for one in self.changes[name] if isinstance(one, Rows)]
        return len(set(tokens)) == 1 and all(self._equal(self.rows[kept], self.rows[name]) for name in changed)

    def _equal(self, key: str, other: str) -> bool:
        one, two = self.stored.tensor(key), self.stored.tensor(other)
        return one.dtype == two.dtype and torch.equal(one, two)

    # -- names, ranks and scales ---------------------------------------------------------------------------

    def _known(self, name: str, key: str) -> Target:
        """The tensor called ``name``, of the base or of the module that is made of it."""
        target = self.targets.named(name)
        if target is not None:
            return target
        failure = self.targets.failure
        raise CheckpointError(
            f"{self.stored.path}: the adapter's tensor {key!r} is meant for {name!r}, which the base "
            f"{self.base.name!r} ({self.base.path}) has not.",
            f"{nearest(name, tuple(self.base.tensors))} Is it the base the adapter was trained on?"
            + ("" if failure is None else f" (Its names could not be looked up in the module: {failure.message})"),
        )

    def _rank(self, module: str, key: str, experts: int) -> int:
        shape = self.stored.tensors[key].shape
        rank = shape[0] // experts if shape else 0
        expected = self._pattern("rank_pattern", module, self.settings.get("r"))
        if rank < 1:
            raise CheckpointError(
                f"{self.stored.path}: tensor {key!r}: expected a rank of at least 1, found the shape {shape}.",
                "Save the adapter again, gathered from all of its shards.",
            )
        if rank != expected or shape[0] % experts:
            raise CheckpointError(
                f"{self.stored.path}: tensor {key!r} has rank {rank}, {ADAPTER_CONFIG} says {expected}.",
                "Do the two files belong together?",
            )
        return rank

    def _scale(self, module: str, rank: int) -> float:
        alpha = self._pattern("alpha_pattern", module, self.settings.get("lora_alpha"))
        if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise CheckpointError(f"{self.place / ADAPTER_CONFIG}: lora_alpha: expected a number, found {alpha!r}.")
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def _pattern(self, field: str, module: str, default: object) -> object:
        """The value of the first pattern that fits the end of a module's name."""
        for pattern, value in (self.settings.get(field) or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        return default

    def _misshapen(self, key: str, found: tuple[int, ...], target: Target) -> CheckpointError:
        return CheckpointError(
            f"{self.stored.path}: tensor {key!r} has shape {found}, the base's {target.name!r} has {target.shape}.",
            "Is it the base the adapter was trained on?",
        )


def _tensor_meant(key: str) -> str:
    """The base's name of the weight that one of PEFT's tensors is meant for."""
    match = _FACTOR.fullmatch(key) or _TOKENS.fullmatch(key)
    return _plain(key) if match is None else f"{_plain(match[1])}.weight"


def _without_prefix(key: str) -> str:
    return key.removeprefix("base_model.model.")


def _plain(key: str) -> str:
    """A name of PEFT's without what PEFT adds."""
    added = r"\.modules_to_save(\.default)?(?=\.)|\.token_adapter(?=\.base_layer)|\.base_layer(?=\.|$)"
    return re.sub(added, "", _without_prefix(key))
