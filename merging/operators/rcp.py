"""RCP-Merging: a domain model's changes where a reasoning model does not rest (Yang et al. 2025, arXiv:2508.03140).

Of two experts one is the reasoning model R, the other the domain model D. With gradients g of an example's loss at the
model that is named, each element counts by itself:

    F   = mean over R's examples of (g_R theta_R)^2          (what R rests on, as in the authors' code)
    v_i = g_D theta_D + lambda F (theta_R - theta_D)^2       (for example i of D)
    m   = (the number of examples with v_i <= 0) > (the number of the others) + threshold
    theta = theta_R + m (theta_D - theta_0)

So ``v_R = tau_R`` and ``v_D = m tau_D``, and c = 1 is the published merge. As in the paper, examples have labels. Over
labels that a model draws from its own predictions the mean gradient is zero, so the sign of g_D would be random. Of an
element that no example reaches, such as the embedding of a token that is in none, all v_i are 0: its change is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ecotone.merging.operators.whole import FromData, Known, Layer, Report, Wanted
from ecotone.populations.errors import InputError


@dataclass(frozen=True)
class Rcp(FromData):
    """``theta = base + c_R tau_R + c_D m tau_D``; c = 1 is the published merge. It takes two experts.

    The calibration tasks of both experts have labels (``loss: cross_entropy``). Or they are texts, and the model is a
    causal language model: then each token is the label of those before it. Examples are differentiated one by one.

    Args:
        reasoning: The name of the expert that is kept whole, the reasoning model. None is the first.
        strength: The weight lambda of what the reasoning model rests on. The larger it is, the fewer changes of the
            domain model are taken.
        threshold: How many votes more than half an element needs, counted as votes for it less votes against it.
    """

    reasoning: str | None = None
    strength: Annotated[float, Field(ge=0)] = 1000.0
    threshold: Annotated[int, Field(ge=0)] = 0

    name = "rcp"
    statistics: ClassVar[tuple[Wanted, ...]] = ("votes",)
    elementwise = True
    unites = False
    needs_labels = True

    def columns(self, experts: Sequence[str]) -> tuple[str, ...]:
        """The two experts.

        Raises:
            InputError: There are more or fewer, or none has the name of the reasoning model.
        """
        if len(experts) != 2:
            raise InputError(
                f"merge.operator: rcp merges a reasoning model and a domain model, found {len(experts)} experts.",
                "Give two experts, or use kfac or fisher.",
            )
        self.kept(experts)
        return tuple(experts)

    def kept(self, experts: Sequence[str]) -> int:
        """The place of the reasoning model among two experts.

        Raises:
            InputError: None has its name.
        """
        if self.reasoning is not None and self.reasoning not in experts:
            raise InputError(
                f"merge.reasoning: expected one of {', '.join(experts)}, found {self.reasoning!r}.",
                "It names the expert that is kept whole.",
            )
        return 0 if self.reasoning is None else list(experts).index(self.reasoning)

    def layer(
        self, at: Layer, base: Tensor, experts: Sequence[Tensor], known: Known, report: Report
    ) -> Sequence[Tensor]:
        """Both task vectors, the domain model's where its examples outvote the reasoning model.

        ``known.votes`` has two tensors: votes for the domain model's task vector less votes against it, and nothing
        that counts in the place of the reasoning model.
        """
        (domain,) = (k for k, votes in enumerate(known.votes) if votes.numel())
        taken = known.votes[domain] > self.threshold
        report.numbers["taken"] = float(taken.double().mean())
        vectors = [expert - base for expert in experts]
        vectors[domain] = torch.where(taken, vectors[domain], 0.0)
        return vectors
