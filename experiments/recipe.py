"""The recipe: everything a search is made of, in one YAML file or in Python.

Unknown keys are refused with the nearest known one. The recipe's ``signature`` covers what changes results;
where and with how many workers it runs, how long, and how it is tracked do not.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import (
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from ecotone.experiments.merge import Merge
from ecotone.experiments.reading import at_home, check_plain, yaml_file
from ecotone.experiments.ready import recipe_file
from ecotone.experiments.tracking.settings import TrackingSettings
from ecotone.experiments.words import explained, newer
from ecotone.fitness.backends import registry
from ecotone.fitness.backends.registry import BACKENDS, AnyScoring
from ecotone.fitness.registry import AnyCalibration, AnyObjective
from ecotone.fitness.runtime import Runtime
from ecotone.merging.models.hub import is_repository
from ecotone.populations import credentials, secrets
from ecotone.populations.errors import InputError, first_line
from ecotone.populations.parsing import DEEPEST
from ecotone.populations.yaml_texts import Steps, Written, YamlError, load
from ecotone.search.chain import ChainSettings
from ecotone.search.kinds import SearchSettings
from ecotone.search.registry import SEARCHES, AnySearch
from ecotone.settings import PREPARED, Call, Part, with_files

RESUMABLE = ("runtime", "tracking", "budget")  # what a resumed run may be given anew: it changes no recorded trial
_WRITER = re.compile(r"# Written by Ecotone (\S+)\.\n")
_LOCATED = ("models", "objectives", "calibration")  # fields with paths that the preparation step may write
_HALVES = re.compile("[\ud800-\udfff]")  # of characters: no file can hold one
USUAL = "m2n2"  # the algorithm of a recipe that names none


def _usual_config(base: object) -> Literal["base", "first"]:
    return "first" if base is None else "base"


class Models(Part):
    """The models to merge.

    Attributes:
        experts: The models to merge: safetensors files, Hugging Face directories or LoRA adapters (which need
            ``base``), with paths relative to the recipe's folder, or repositories of the hub (``organisation/name``,
            ``organisation/name@revision``). A path that begins with ``prepared:`` is relative to the folder that the
            preparation step wrote.
        base: The model that the experts were fine-tuned from. Operators on task vectors and LoRA adapters need it.
        tokenizer: The Hugging Face directory of the tokenizer, for objectives of language models. None means the base,
            or else the first expert.
        vocabulary: The treatment of models whose vocabularies differ in size: refuse them (``same``), cut them to the
            vocabulary of ``base``, or extend them to the ``union``.
        unused: The treatment of tensors that the architecture ``auto`` does not load, such as layers for multi-token
            prediction. ``merge`` merges them if all models have them, and else takes them from ``base`` or the first
            expert that has them. ``base`` always takes them from there. ``drop`` leaves them out of exports.
        config: The model whose config merges have, where configs differ in fields that change the computation: refuse
            them (``same``), take that of the ``base`` or of the ``first`` expert for everything, or score an expert
            alone with its own and merges with the base's (or else the first expert's; ``each``).
        names: The names of the experts in results, one for each expert. None means the names of their files,
            directories or repositories.
        architecture: How a torch module is made of merged weights: ``auto`` for Hugging Face directories, or a call
            that returns a ``torch.nn.Module`` whose state-dict names match the files. None gives objectives plain
            tensors.
    """

    experts: tuple[str, ...] = Field(min_length=1)
    base: str | None = None
    tokenizer: str | None = None
    vocabulary: Literal["same", "base", "union"] = "same"
    unused: Literal["merge", "base", "drop"] = "merge"
    config: Literal["same", "base", "first", "each"] = "same"
    names: tuple[str, ...] | None = None
    architecture: Call | Literal["auto"] | None = None

    @property
    def usual_config(self) -> Literal["base", "first"]:
        """The choice of ``config`` that computes what ``same`` does wherever ``same`` refuses nothing."""
        return _usual_config(self.base)

    @model_validator(mode="after")
    def _is_known(self) -> Models:
        if self.unused != "merge" and self.architecture != "auto":
            raise ValueError(
                f"unused: expected architecture: auto with {self.unused}, as only then it is known what is loaded"
            )
        return self

    @model_validator(mode="after")
    def _names_fit(self) -> Models:
        if self.config == "base" and self.base is None:
            raise ValueError("config: 'base' needs a base model, found none; use first or each, or give the base")
        if self.names is not None and len(self.names) != len(self.experts):
            raise ValueError(f"names: expected {len(self.experts)}, one an expert, found {len(self.names)}")
        named = [*((f"experts[{place}]", path) for place, path in enumerate(self.experts)), ("base", self.base)]
        for field, path in [*named, ("tokenizer", self.tokenizer)]:
            at_home(path or "", f"models.{field}")
        return self


class Objectives(Part):
    """The objectives that guide the search, and the objectives that judge its results.

    Attributes:
        search: The objectives that guide the search. Only the algorithm ``one_shot`` goes without.
        held_out: The objectives that score the front and the models on data that the search has not seen.
    """

    search: tuple[AnyObjective, ...]
    held_out: tuple[AnyObjective, ...] = ()

    @model_validator(mode="after")
    def _unique(self) -> Objectives:
        for group, objectives in (("search", self.search), ("held_out", self.held_out)):
            names = [objective.name for objective in objectives]
            if len(set(names)) < len(names):
                raise ValueError(f"{group}: expected objectives of different names, found {names}")
        return self


def _one_or_stages(value: Any) -> str:
    return "stages" if isinstance(value, list | tuple | ChainSettings) else "one"


Searches: TypeAlias = Annotated[
    Annotated[AnySearch, Tag("one")] | Annotated[ChainSettings, Tag("stages")], Discriminator(_one_or_stages)
]


class Budget(Part):
    """When to stop: after so many evaluations, so many seconds, or whichever comes first.

    Attributes:
        evaluations: Merges that the search may score. A merge that is scored on a part of the examples counts for that
            part.
        seconds: Seconds that the search may take, summed over all stretches of a resumed run.
    """

    evaluations: int | None = Field(default=None, ge=1)
    seconds: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _some(self) -> Budget:
        if self.evaluations is None and self.seconds is None:
            raise ValueError("expected evaluations, seconds or both, found neither")
        return self


def _suited(merge: Mapping[str, Any], search: Mapping[str, Any]) -> dict[str, float]:
    """The fields of a search, as a recipe writes it, that suit the operator; none where one of them is given."""
    from ecotone.merging import operators

    try:
        operator = operators.get(*Merge.model_validate(merge).combined)
        settings = SEARCHES.get(search.get("algorithm", USUAL), "search.algorithm")
    except (InputError, ValidationError):  # it is told better where the field is read
        return {}
    fields = settings.suited(operator)
    return {} if fields.keys() & search.keys() else fields


class Recipe(Part):
    """A search, whole: models, merge operator, objectives, algorithm, scoring, budget, seed, runtime, tracking.

    Attributes:
        name: The name of the run directory and of the run in trackers: letters, digits, dots, dashes and underscores.
        models: The models to merge.
        objectives: How merges are scored.
        budget: When the search stops: after so many evaluations, so many seconds, or whichever comes first.
        prepare: A function that makes models or data before the search. It gets an empty folder and writes into it.
            Paths elsewhere in the recipe that begin with ``prepared:`` are relative to that folder. It runs once for
            the same function, arguments and source.
        merge: The merge operator and its settings.
        calibration: The tasks on which searches by gradient learn coefficients.
        search: The algorithm that proposes merges, or a list of them: stages. Each stage begins with the merges that
            the stage before it found.
        scoring: How workers score candidates.
        seed: The seed of everything that is drawn. The same seed gives the same search.
        runtime: Where the search runs: its workers, its time limits and its log.
        tracking: The trackers that the run is mirrored to.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    models: Models
    objectives: Objectives
    budget: Budget
    prepare: Call | None = None
    merge: Merge = Field(default_factory=Merge)
    calibration: tuple[AnyCalibration, ...] = ()
    search: Searches = Field(default_factory=lambda: SEARCHES.get(USUAL, "search").model_validate({"algorithm": USUAL}))
    scoring: AnyScoring = Field(default_factory=lambda: BACKENDS.get(registry.USUAL, "scoring").model_validate({}))
    seed: int = Field(default=0, ge=0)
    runtime: Runtime = Runtime()
    tracking: TrackingSettings = TrackingSettings()
    _folder: Path | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _suit_the_operator(cls, value: Any) -> Any:
        """Write the bounds and first values that suit an operator into searches that give none.

        So they are recorded, and a run goes on with them whatever later versions think.
        """
        merge = value.get("merge") if isinstance(value, Mapping) else None
        search = value.get("search", {}) if isinstance(value, Mapping) else None
        if isinstance(merge, Mapping) and isinstance(search, Mapping | list | tuple):
            parts = [search] if isinstance(search, Mapping) else list(search)
            parts = [{**_suited(merge, part), **part} if isinstance(part, Mapping) else part for part in parts]
            return {**value, "search": parts[0] if isinstance(search, Mapping) else parts}
        return value

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> Recipe:
        for part in self.searches:
            self._check_objectives(part)
            self._check_ranges(part)
            self._check_rank(part)
        if self.objectives.held_out and not self.objectives.search:
            raise ValueError("objectives.search: expected objectives beside those of held_out, found none")
        self._check_calibration(spare=bool((info.context or {}).get("spare_tasks")))
        self._check_shares()
        for field, value in self.model_dump(warnings=False).items():
            for text in _texts(value):
                if not text.isascii() and _HALVES.search(text):
                    raise ValueError(f"{field}: expected text that UTF-8 can hold, found {text!r}")
                if self.prepare is None and field in _LOCATED and text.startswith(PREPARED):
                    raise ValueError(f"{field}: paths begin with {PREPARED!r} but the recipe has no `prepare` step")
        return self

    @property
    def folder(self) -> Path | None:
        """The folder of the file it was read from; None if it was not read from a file."""
        return self._folder

    @property
    def searches(self) -> tuple[SearchSettings, ...]:
        """The search, or the searches of its stages."""
        search = self.search
        return tuple(stage.search for stage in search.stages) if isinstance(search, ChainSettings) else (search,)

    @property
    def chain(self) -> ChainSettings | None:
        """The search where it is a list of stages; else None."""
        return self.search if isinstance(self.search, ChainSettings) else None

    def _check_objectives(self, part: SearchSettings) -> None:
        needs, minimised = part.needs(), [o.name for o in self.objectives.search if o.direction == "minimize"]
        if needs.maximised and minimised:
            raise ValueError(
                f"objectives.search: {part.algorithm} takes scores to maximise, found direction minimize for "
                f"{minimised}; give a score in which more is better, such as exp(-loss), or of texts their likelihood"
            )
        if (count := len(self.objectives.search)) == 0 and needs.objectives:
            raise ValueError(
                "objectives.search: expected a list of 1 or more, found 0. Only the algorithm one_shot goes without"
            )
        if count < needs.objectives:
            raise ValueError(
                f"objectives.search: {part.algorithm} looks for a front of two objectives or more, found "
                f"{count}; for one use algorithm cma_es, or optuna with sampler tpe or gp"
            )

    def _check_ranges(self, part: SearchSettings) -> None:
        if self.merge.ranges and not part.searches_settings:
            raise ValueError(
                f"merge.{next(iter({**self.merge.choices, **self.merge.ranges}))}: {part.algorithm} searches "
                f"coefficients alone, found {'choices' if self.merge.choices else 'bounds'}; "
                "give one value, or use random, cma_es, map, bayesian_map, nsga2 or optuna"
            )

    def _check_rank(self, part: SearchSettings) -> None:
        if self.merge.rank is None:
            return
        if part.needs().gradients or part.needs().vectors:
            how = "follows gradients" if part.needs().gradients else "changes weights one by one"
            raise ValueError(
                f"merge.rank: {part.algorithm} {how}, which merges that are cut to a rank do not allow; leave rank "
                "out, or use a search over coefficients"
            )
        if self.models.vocabulary != "same":
            raise ValueError("merge.rank: expected models.vocabulary same with it, as adapters of one base have")

    def _check_shares(self) -> None:
        chain, whole = self.chain, self.budget.evaluations
        if chain is None or whole is None:
            return
        shares, rest = chain.shared_out, chain.stages[-1].evaluations is None
        if shares > whole or (rest and shares == whole):
            raise ValueError(
                f"budget.evaluations: expected {'more than' if rest else 'at least'} {shares}, which the stages of the "
                f"search share out, found {whole}"
            )

    def _check_calibration(self, spare: bool) -> None:
        names = [task.name for task in self.calibration]
        if len(set(names)) < len(names):
            raise ValueError(f"calibration: expected tasks of different names, found {names}")
        learning = [part for part in self.searches if part.needs().gradients]
        if learning and not names:
            raise ValueError(f"calibration: {learning[0].algorithm} learns on tasks given there, found none")
        reads = self.merge.reads_data
        if reads and not names:
            raise ValueError(
                f"calibration: the operator {self.merge.operator} reads inputs of each expert's own task, found none; "
                "add a task named after each expert, without labels, or use an operator without data (ties, iso_c)"
            )
        if reads and self.models.architecture is None:
            raise ValueError(
                f"models.architecture: the operator {self.merge.operator} gathers statistics of layers, found none; "
                "use auto or a function that returns the module"
            )
        if names and not learning and not spare and not reads:
            raise ValueError(
                f"calibration: {self.search.algorithm} does not use it (algorithm adamerging does, and so do operators "
                f"like kfac and regmean), found {names}"
            )
        if learning and not self.scoring.gradients():
            raise ValueError(
                f"scoring.backend: {learning[0].algorithm} follows gradients, found {self.scoring.backend}, which has "
                "none; use resident"
            )
        if learning and self.models.architecture is None:
            raise ValueError(
                "models.architecture: expected a function that returns the torch module which calibration "
                "differentiates, found none; name it, or say auto for Hugging Face directories"
            )
        from ecotone.merging import operators  # imports torch

        operator = operators.get(self.merge.operator)
        for part in self.searches:
            part.check(operator.name, operator.needs_base, self.calibration)

    @classmethod
    def from_yaml(
        cls, path: str | Path, settings: Mapping[str, Any] | None = None, *, spare_tasks: bool = False
    ) -> Recipe:
        """Read a recipe file.

        Where there is no such file, ``path`` may name a ready recipe, as ``digits-specialists``.
        Paths of models are made absolute: they are relative to the file's folder, where its own functions are, too.

        Args:
            path: The file.
            settings: Fields to replace, by dotted name, as ``--set`` does.
            spare_tasks: Take calibration tasks that the search does not use, as statistics are gathered over them.

        Raises:
            InputError: The file is missing or not YAML, a key is unknown, or a value does not fit.
        """
        file = recipe_file(path)
        text, found = yaml_file(file)
        record = found.value
        if not isinstance(record, dict):
            kind = "nothing: the file is empty" if found.empty else type(record).__name__
            raise InputError(f"{file}: expected a mapping of recipe fields, found {kind}.")
        check_plain(record, str(file))
        writer = _WRITER.match(text)
        written_by = "" if writer is None else writer[1]
        changed = apply_settings(record, settings or {})
        recipe = cls._of(changed, written_by, _kept(found.scalars, settings or {}), spare_tasks=spare_tasks)
        return recipe._beside(file.parent.resolve())

    @classmethod
    def from_record(
        cls,
        record: Mapping[str, Any],
        folder: Path | None = None,
        written_by: str = "",
        *,
        spare_tasks: bool = False,
    ) -> Recipe:
        """Check a nested mapping.

        Args:
            record: The recipe.
            folder: The folder that paths of models are relative to; None for the working directory.
            written_by: The version of Ecotone that wrote the record; empty when it is not known.
            spare_tasks: As for ``from_yaml``.

        Raises:
            InputError: A key is unknown, or a value does not fit.
        """
        recipe = cls._of(record, written_by, spare_tasks=spare_tasks)
        return recipe._in_place() if folder is None else recipe._beside(folder)

    @classmethod
    def read_back(
        cls, record: Mapping[str, Any], written_by: str, settings: Mapping[str, Any] = MappingProxyType({})
    ) -> Recipe:
        """The recipe that a run or an export has on record. Trackers that cannot be used here stop nothing.

        Args:
            record: The recipe, as ``record`` returned it.
            written_by: The version of Ecotone that wrote the record; empty when it is not known.
            settings: Fields to replace, by dotted name.

        Raises:
            InputError: A key is unknown, or a value does not fit.
        """
        record = credentials.restored(record)
        tracking = record.get("tracking") if isinstance(record, Mapping) else None
        known = tracking if isinstance(tracking, Mapping) else {}
        models = record.get("models") if isinstance(record, Mapping) else None
        if isinstance(models, Mapping) and "config" not in models:  # written before configs were compared
            record = {**record, "models": {**models, "config": _usual_config(models.get("base"))}}
        return cls._of(apply_settings(record, settings), written_by, recorded=known)._in_place()

    @classmethod
    def _of(
        cls,
        record: Mapping[str, Any],
        written_by: str = "",
        scalars: Mapping[Steps, Written] = MappingProxyType({}),
        **context: Any,
    ) -> Recipe:
        """A record, checked.

        Args:
            record: The recipe.
            written_by: The version of Ecotone that wrote it; empty when it is not known.
            scalars: How numbers and the like were written, by the steps that lead to them.
            context: Of validators: ``spare_tasks``, and in ``recorded`` what the run's own recipe says of trackers,
                where it is read back.
        """
        try:
            return cls.model_validate(credentials.restored(record), context=context)
        except ValidationError as error:
            raise InputError(explained(error, cls, scalars), newer(written_by)) from error

    def _beside(self, folder: Path) -> Recipe:
        """The recipe of a file in a folder, which relative paths begin at."""
        found = self._absolute(folder)
        found._folder = folder
        return found

    def _in_place(self) -> Recipe:
        return with_files(self, lambda path: str(at_home(path).absolute()))

    def record(self) -> dict[str, Any]:
        """The whole recipe as nested plain values, without the secrets of URLs; ``from_record`` takes it back."""
        found: dict[str, Any] = secrets.take_all(self.model_dump(mode="json"))
        return found

    def text(self) -> str:
        """The whole recipe as a YAML file, which says the version of Ecotone; ``from_yaml`` takes it back."""
        record = self.record()
        record["calibration"] = [  # records tell more of a task than its own fields
            {field: value for field, value in told.items() if field in type(task).model_fields}
            for told, task in zip(record["calibration"], self.calibration, strict=True)
        ]
        return f"# Written by Ecotone {version('ecotone')}.\n{yaml.safe_dump(record, sort_keys=False)}"

    @property
    def signature(self) -> str:
        """16 hexadecimal digits of all that changes results: not name, budget, runtime, tracking and credentials."""
        kept = secrets.plain(self.model_dump(mode="json", exclude={"name", "budget", "runtime", "tracking"}))
        if self.models.config in ("same", self.models.usual_config):  # they give one result, or none
            del kept["models"]["config"]
        return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=8).hexdigest()

    def _absolute(self, folder: Path) -> Recipe:
        def resolved(path: str) -> str:
            return path if path.startswith(PREPARED) else str(folder / at_home(path))

        def model(path: str) -> str:
            """Of a repository of the hub its name, unless the recipe's folder holds one of its organisation's name."""
            local = not is_repository(path) or (folder / path).parent.exists()
            return resolved(path) if local else path

        models = self.models.model_copy(
            update={
                "experts": tuple(model(path) for path in self.models.experts),
                "base": None if self.models.base is None else model(self.models.base),
                "tokenizer": None if self.models.tokenizer is None else model(self.models.tokenizer),
            }
        )
        objectives = Objectives.model_construct(
            search=tuple(objective.with_paths(resolved) for objective in self.objectives.search),
            held_out=tuple(objective.with_paths(resolved) for objective in self.objectives.held_out),
        )
        changed = {"models": models, "objectives": objectives, "merge": self.merge.with_paths(resolved)}
        return with_files(self.model_copy(update=changed), resolved)


def check_recipe(recipe: Any) -> None:
    """Refuse what Python code gave in place of a recipe.

    Raises:
        InputError: It is no ``Recipe``.
    """
    if not isinstance(recipe, Recipe):
        raise InputError(
            f"recipe: expected a Recipe, found {type(recipe).__name__}.",
            "Recipe.from_record makes one of a mapping, Recipe.from_yaml one of a file.",
        )


def algorithm_of(record: Mapping[str, Any]) -> str:
    """The algorithm of a recorded recipe. The algorithms of stages are joined by plus signs."""
    search = record.get("search", {})
    return "+".join(str(one.get("algorithm")) for one in (search if isinstance(search, list) else [search]))


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value, at any depth, keys of mappings included."""
    if isinstance(value, Mapping):
        yield from _texts([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, str):
        yield value


def apply_settings(record: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of ``record`` with fields replaced: ``{"search.alpha": 0, "objectives.search.0.name": "a"}``."""
    check_plain(record, "recipe")  # JSON would turn other keys into text
    copy: dict[str, Any] = json.loads(json.dumps(record))
    for key, value in settings.items():
        steps = key.split(".")
        if len(steps) > DEEPEST:
            raise InputError(f"--set {key[:40]}...: expected at most {DEEPEST} steps, found {len(steps)}.")
        place: Any = copy
        for step in steps[:-1]:
            place = _entered(place, step, key)
        if isinstance(place, list):
            place[_index(place, steps[-1], key)] = value
        else:
            place[steps[-1]] = value
    return copy


def _kept(scalars: Mapping[Steps, Written], settings: Mapping[str, Any]) -> dict[Steps, Written]:
    """The scalars of a file that no setting replaced."""
    changed = [
        tuple(int(step) if step.isdecimal() and len(step) < 10 else step for step in key.split(".")) for key in settings
    ]
    return {steps: one for steps, one in scalars.items() if not any(steps[: len(key)] == key for key in changed)}


def parse_settings(pairs: list[str], option: str = "--set", example: str = "seed=3") -> dict[str, Any]:
    """``["seed=3", "budget.evaluations=100"]`` as a mapping; values are read as YAML.

    Args:
        pairs: The texts.
        option: The option of the command line that they are given with.
        example: A text that fits the option.

    Raises:
        InputError: A pair has no ``=``, or its value is not YAML.
    """
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError(f"{option}: expected key=value, found {pair!r}.", f"For example: {option} {example}")
        try:
            settings[key] = load(value)
        except YamlError as error:
            told = secrets.stripped(value)
            shown = repr(told) if len(value) < 100 else f"{told[:100]!r} ..."
            raise InputError(f"{option} {key}: cannot be read as a YAML value: {shown}.", first_line(error)) from error
        check_plain(settings[key], f"{option} {key}")
    return settings


def check_resumable(settings: Mapping[str, Any]) -> None:
    """Refuse settings that would change the meaning of a resumed run's recorded trials.

    Raises:
        InputError: A key is not of ``RESUMABLE``.
    """
    wrong = [key for key in settings if key.split(".")[0] not in RESUMABLE]
    if wrong:
        raise InputError(
            f"--set {wrong[0]}: a resumed run keeps what its recorded trials depend on.",
            f"Only fields of {', '.join(RESUMABLE)} may change; start a new run for anything else.",
        )


def _entered(place: Any, step: str, key: str) -> Any:
    if not isinstance(place, list) and place.get(step) is None:
        place[step] = {}
    found = place[_index(place, step, key)] if isinstance(place, list) else place[step]
    if not isinstance(found, dict | list):
        raise InputError(f"--set {key}: {step!r} is {secrets.without(found)!r}, it has no fields.")
    return found


def _index(place: list[Any], step: str, key: str) -> int:
    if not step.isdecimal() or len(step) > 9 or int(step) >= len(place):
        raise InputError(f"--set {key}: expected a position from 0 to {len(place) - 1}, found {step!r}.")
    return int(step)
