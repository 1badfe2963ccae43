"""All that a worker is made of: frozen, picklable, made once and sent to every worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ecotone.fitness.backends.base import ScoringSettings
from ecotone.fitness.backends.resident import ResidentSettings
from ecotone.fitness.kinds import CalibrationSettings, ObjectiveSettings
from ecotone.merging.models import configs
from ecotone.merging.models.matching import MERGED, Treatment
from ecotone.merging.models.vocabulary import Vocabulary
from ecotone.merging.placement import Wish
from ecotone.settings import Call


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
        treatment: The tensors that are not merged (``ecotone.merging.models.matching``).
        config: The model whose config merges have (``ecotone.merging.models.configs``).
        architecture: A function that returns the ``torch.nn.Module`` to fill; ``auto`` for a Hugging Face
            directory; None when objectives take a dict of tensors.
        search: Objectives that guide the search, their paths whole.
        held_out: Objectives kept from it.
        tokenizer: The tokenizer's folder or repository; None where no objective needs one.
        divided: Whether trials may ask for some of the examples of the search's objectives (``Divisible``).
        nonnegative: Whether the search takes no score below 0; only then is a score below 0 refused at the try-out.
        varied: Whether the search can do nothing with an objective that gives all merges one score; only then is it
            refused at the try-out.
        calibration: Tasks of gradient trials.
        seed: The seed of the order in which their examples come.
        backend: Makes what shows candidates to the objectives.
        device: ``auto`` (a GPU where there is one), ``cpu`` or ``cuda``.
        dtype: Name of the resident model's dtype (``bfloat16``). None is the checkpoints' own, whatever type the
            architecture is made in (float32 when they mix types), so that what is scored is what can be exported.
        rank: The rank that merges of adapters are cut to before they are scored; None for merges as they are.
        threads: CPU threads of one worker. Results may depend on it in the last bit, so it belongs to the recipe.
        try_out: Score the first expert before the space is given, so that an objective that cannot be computed is found
            before any of a budget is spent.
        dense: Put the sources themselves into the space, for evolution from scratch.
        sys_path: Folders put last on the worker's Python path, for the user's own modules.
        sources: The place where mixed models are kept (``ecotone.merging.placement``); no score depends on it.
        batch: The most candidates scored together, which bounds the memory they take; None if it is not known.
        neighbours: How many workers, this one among them, may share main memory: ``auto`` leaves the others theirs.
        device_share: The share of a GPU's memory that ``auto`` may plan with.
        cache_bytes: The bytes that prepared vectors in this machine's cache may take; None for no limit.
    """

    experts: tuple[str, ...]
    base: str | None = None
    operator: str = "linear"
    settings: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] | None = None
    vocabulary: Vocabulary = "same"
    treatment: Treatment = MERGED
    config: configs.Choice = "same"
    architecture: Call | Literal["auto"] | None = None
    search: tuple[ObjectiveSettings, ...] = ()
    held_out: tuple[ObjectiveSettings, ...] = ()
    tokenizer: str | None = None
    divided: bool = False
    nonnegative: bool = False
    varied: bool = False
    calibration: tuple[CalibrationSettings, ...] = ()
    seed: int = 0
    backend: ScoringSettings = field(default_factory=ResidentSettings)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: str | None = None
    rank: int | None = None
    threads: int = 1
    try_out: bool = False
    dense: bool = False
    sys_path: tuple[str, ...] = ()
    sources: Wish = "auto"
    batch: int | None = None
    neighbours: int = 1
    device_share: float = 1.0
    cache_bytes: int | None = None
