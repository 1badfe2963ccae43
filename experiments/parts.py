"""Parts of a recipe: what all have in common, Python functions, and objectives."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """A part of a recipe: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Call(Part):
    """A Python function, ``package.module:function``, and its keyword arguments.

    An argument (of an architecture, an objective or its data) that begins with ``prepared:`` is a path, relative to
    what the preparation step wrote.
    """

    call: str = Field(description="package.module:function")
    arguments: dict[str, Any] = Field(default_factory=dict)


# -- objectives of any model ---------------------------------------------------------------------------------


class Accuracy(Part):
    """The share of examples whose highest output is the label; ``data`` returns ``(inputs, labels)``.

    Attributes:
        data: Inputs are a tensor or an array (N, ...), or a mapping of such, as Hugging Face models take.
        head: Returns the task's classification head where the merged model is only the encoder: a callable from
            (outputs, inputs) to logits. It is never merged.
        batch: Examples in one forward pass.
    """

    name: str
    type: Literal["accuracy"] = "accuracy"
    direction: Literal["maximize"] = "maximize"
    data: Call
    head: Call | None = None
    batch: int | None = Field(default=None, ge=1, description="examples a forward pass; None lets Ecotone choose")


class Entropy(Part):
    """Mean entropy of a classifier's predictions, in nats; it needs no labels.

    Attributes:
        data: Returns the inputs, or (inputs, labels), as in ``accuracy``.
        head: As in ``accuracy``.
        batch: Examples in one forward pass.
    """

    name: str
    type: Literal["entropy"]
    direction: Literal["minimize"] = "minimize"
    data: Call
    head: Call | None = None
    batch: int | None = Field(default=None, ge=1, description="examples a forward pass; None lets Ecotone choose")


class PythonObjective(Part):
    """A function of the merged model that returns a number, or a number and per-example scores.

    An argument that begins with ``prepared:`` is a path, relative to what the preparation step wrote.
    """

    name: str
    type: Literal["call"]
    direction: Literal["maximize", "minimize"] = "maximize"
    call: str = Field(description="package.module:function")
    arguments: dict[str, Any] = Field(default_factory=dict)


Objective: TypeAlias = Annotated[Accuracy | Entropy | PythonObjective, Field(discriminator="type")]
