"""What a worker needs to know to measure candidates: frozen, picklable, made once and sent to every worker."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ecotone.merging.placement import Wish
from ecotone.populations.trial import Goal


@dataclass(frozen=True)
class CallSpec:
    """A function and its keyword arguments.

    Args:
        call: ``package.module:function``.
        arguments: Keyword arguments, plain values.
    """

    call: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ObjectiveSpec:
    """An objective in a recipe's words.

    Args:
        goal: Its name and direction.
        type: ``accuracy`` of a classifier over ``data``, mean ``entropy`` of its predictions there, ``call`` for a
            Python function, or one of the measures of language models (``ecotone.fitness.objectives.LANGUAGE``).
        data: For ``accuracy`` and ``entropy``: the function that returns (inputs, labels), or for entropy the inputs.
        call: For ``call``: the function that scores a model.
        batch: Examples in one forward pass; bounds the memory for activations.
        head: For ``accuracy`` and ``entropy``: the function that returns the task's classification head, a callable
            from (outputs, inputs) to (n, C) logits; None when the model's outputs are the logits.
        settings: For measures of language models: those of the type.
        tokenizer: For these: the tokenizer's directory.
    """

    goal: Goal
    type: str = "accuracy"
    data: CallSpec | None = None
    call: CallSpec | None = None
    batch: int = 512
    head: CallSpec | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None


LIMITS = {
    "accuracy": (0.0, 1.0),
    "entropy": (0.0, math.inf),
    "multiple_choice": (0.0, 1.0),
    "exact_match": (0.0, 1.0),
    "tokens_generated": (0.0, math.inf),
}
"""By type, where scores are means over examples: the least and the most that an example can score."""


@dataclass(frozen=True)
class Distillation:
    """Which expert a merge is drawn to on a task, and by what.

    Args:
        expert: The expert's name.
        temperature: T, what logits are divided by.
        hidden: Weight of the mean squared error of hidden layers; 0 leaves them out.
        layers: Hidden layers: names of modules, or positions in a Hugging Face model's ``hidden_states``. None is the
            last of these, and for other models the outputs that the task's head takes.
    """

    expert: str
    temperature: float = 1.0
    hidden: float = 1.0
    layers: tuple[int | str, ...] | None = None


@dataclass(frozen=True)
class CalibrationSpec:
    """A task whose loss is differentiated by the coefficients of a merge.

    Args:
        name: The task's name.
        data: The function that returns inputs, or (inputs, labels); inputs are a tensor or array (N, ...), or a mapping
            of such, as Hugging Face models take.
        loss: ``entropy`` of the predictions (AdaMerging, no labels needed), ``cross_entropy`` with the labels, or
            ``distillation`` from an expert (Expert Merging, no labels needed).
        head: The function that returns the task's classification head, a callable from (outputs, inputs) to (n, C)
            logits; None when the model's outputs are the logits.
        batch: Examples in one batch.
        seed: Seed of the order in which examples come.
        distillation: From whom and how, with that loss.
    """

    name: str
    data: CallSpec
    loss: Literal["entropy", "cross_entropy", "distillation"] = "entropy"
    head: CallSpec | None = None
    batch: int = 16
    seed: int = 0
    distillation: Distillation | None = None


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker is made of.

    Args:
        experts: Checkpoint paths of the fine-tuned models.
        base: Checkpoint path of the model they were tuned from, where the operator needs it.
        operator: Name of the merge operator.
        settings: The operator's settings, by name.
        names: Names of the experts; None takes them from their files.
        vocabulary: What to do with models whose vocabularies have other sizes (``ecotone.merging.models.vocabulary``).
        architecture: A function that returns the ``torch.nn.Module`` to fill; ``auto`` for a Hugging Face
            directory; None when objectives take a dict of tensors.
        search: Objectives that guide the search.
        held_out: Objectives kept from it.
        divided: Whether trials may ask for some of the examples of the search's objectives (``Divisible``).
        calibration: Tasks of gradient trials.
        checkpointing: Compute activations again on the way back instead of keeping them (Hugging Face models only):
            less memory and more time for a gradient trial.
        device: ``auto`` (a GPU where there is one), ``cpu`` or ``cuda``.
        dtype: Name of the resident model's dtype (``bfloat16``). None is the checkpoints' own, whatever type the
            architecture is made in (float32 when they mix types), so that what is scored is what can be exported.
        threads: CPU threads of one worker. Results may depend on it in the last bit, so it belongs to the recipe.
        dense: Put the sources themselves into the space, for evolution from scratch.
        sys_path: Folders put last on the worker's Python path, for the user's own modules.
        sources: Where the models that are mixed are kept (``ecotone.merging.placement``); no score depends on it.
        batch: The most candidates scored together, which bounds the memory they take; None if it is not known.
        neighbours: How many workers, this one among them, may share main memory: ``auto`` leaves the others theirs.
        device_share: The share of a GPU's memory that ``auto`` may plan with.
    """

    experts: tuple[str, ...]
    base: str | None = None
    operator: str = "linear"
    settings: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] | None = None
    vocabulary: Literal["same", "base", "union"] = "same"
    architecture: CallSpec | Literal["auto"] | None = None
    search: tuple[ObjectiveSpec, ...] = ()
    held_out: tuple[ObjectiveSpec, ...] = ()
    divided: bool = False
    calibration: tuple[CalibrationSpec, ...] = ()
    checkpointing: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: str | None = None
    threads: int = 1
    dense: bool = False
    sys_path: tuple[str, ...] = ()
    sources: Wish = "auto"
    batch: int | None = None
    neighbours: int = 1
    device_share: float = 1.0
