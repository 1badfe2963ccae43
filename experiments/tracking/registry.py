"""The trackers, by the name that recipes give them: one line each."""

from __future__ import annotations

from ecotone.experiments.tracking.protocol import TrackerSettings, check_declared
from ecotone.registry import Registry

TRACKERS: Registry[type[TrackerSettings]] = Registry(
    "tracker",
    "ecotone.trackers",
    {
        "mlflow": "ecotone.experiments.tracking.mlflow:MlflowSettings",
        "wandb": "ecotone.experiments.tracking.wandb:WandbSettings",
    },
    check_declared,
)
