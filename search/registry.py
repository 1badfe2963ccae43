"""The search algorithms, by name: one line each."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from ecotone.registry import Registry
from ecotone.search.kinds import SearchSettings, check_declared
from ecotone.settings import Chosen

SEARCHES: Registry[type[SearchSettings]] = Registry(
    "search algorithm",
    "ecotone.searches",
    {
        "m2n2": "ecotone.search.m2n2:M2N2Settings",
        "random": "ecotone.search.random_search:RandomSettings",
        "cma_es": "ecotone.search.cma_es:CmaEsSettings",
        "sep_cma_es": "ecotone.search.cma_es:CmaEsSettings",
        "map": "ecotone.search.map:MapSettings",
        "bayesian_map": "ecotone.search.bayesian_map:BayesianMapSettings",
        "nested_map": "ecotone.search.nested_map:NestedMapSettings",
        "nsga2": "ecotone.search.nsga:NsgaSettings",
        "nsga3": "ecotone.search.nsga:NsgaSettings",
        "optuna": "ecotone.search.optuna_search:OptunaSettings",
        "adamerging": "ecotone.search.adamerging:AdaMergingSettings",
        "expert_merging": "ecotone.search.expert_merging:ExpertMergingSettings",
        "one_shot": "ecotone.search.one_shot:OneShotSettings",
    },
    check_declared,
)

AnySearch: TypeAlias = Annotated[SearchSettings, Chosen(SEARCHES, "algorithm", default="m2n2")]
"""Of a recipe's field: the settings of the algorithm that it names."""
