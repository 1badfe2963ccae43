"""The solvers of merges to begin with, by name: one line each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import Discriminator, Field, GetJsonSchemaHandler, Tag, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from ecotone.registry import Registry
from ecotone.search.starts.base import Solver, check_declared
from ecotone.settings import Chosen, Part

SOLVERS: Registry[type[Solver]] = Registry(
    "solver",
    "ecotone.starts",
    {
        "auto": "ecotone.search.starts.auto:AutoSettings",
        "one_shot": "ecotone.search.starts.plain:OneShotSettings",
        "average": "ecotone.search.starts.plain:AverageSettings",
        "mwa": "ecotone.search.starts.plain:MwaSettings",
        "lines": "ecotone.search.starts.lines:LinesSettings",
        "model_stock": "ecotone.search.starts.model_stock:ModelStockSettings",
        "multi_slerp": "ecotone.search.starts.spheres:MultiSlerpSettings",
        "karcher": "ecotone.search.starts.spheres:KarcherSettings",
        "nuslerp": "ecotone.search.starts.spheres:NuSlerpSettings",
    },
    check_declared,
)

AnySolver: TypeAlias = Annotated[Solver, Chosen(SOLVERS, "solve")]
"""Of a recipe's field: the solver that it names, with its settings."""


class Solvers(Part):
    """Several merges to begin with.

    Attributes:
        solve: The solvers, in order: names, or mappings with the settings of one (``{solve: lines, beta: 0.5}``).
    """

    solve: tuple[AnySolver, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _settings_stand_in_the_list(cls, value: Any) -> Any:
        beside = [key for key in value if key != "solve"] if isinstance(value, Mapping) else []
        if beside:
            raise ValueError(
                f"{beside[0]}: of several solvers settings stand in the list: [{{solve: lines, beta: 0.5}}]"
            )
        return value

    @field_validator("solve", mode="before")
    @classmethod
    def _of_names(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        return [{"solve": one} if isinstance(one, str) else one for one in value]

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The JSON Schema of what is written: names stand for solvers without settings."""
        whole = super().__get_pydantic_json_schema__(schema, handler)
        solve = handler.resolve_ref_schema(whole)["properties"]["solve"]
        solve["items"] = {"anyOf": [{"enum": list(SOLVERS.usable())}, solve["items"]]}
        return whole


def form(value: Any) -> str:
    """Whether a value stands for a ``number``, for ``one`` solver, or for ``several``."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    listed = isinstance(value, Mapping) and isinstance(value.get("solve"), list | tuple)
    return "several" if listed or isinstance(value, Solvers) else "one"


def _form(value: Any) -> str:
    return "several" if form(value) == "several" else "one"


Beginning: TypeAlias = Annotated[
    Annotated[AnySolver, Tag("one")] | Annotated[Solvers, Tag("several")], Discriminator(_form)
]
"""Of a recipe's field: one solver or several."""
NumberOrBeginning: TypeAlias = Annotated[
    Annotated[float, Tag("number")] | Annotated[AnySolver, Tag("one")] | Annotated[Solvers, Tag("several")],
    Discriminator(form),
]
"""Of a field of a search that may begin at a number, too."""


def listed(start: Any) -> tuple[Solver, ...]:
    """The solvers of a field's value; empty where it is none, or a number."""
    if isinstance(start, Solvers):
        return start.solve
    return (start,) if isinstance(start, Solver) else ()
