"""Where a search runs: its pool of workers, and its waiting times."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from ecotone.populations.secrets import take
from ecotone.settings import Part


class Runtime(Part):
    """Where a search runs. No setting here changes results under ``order: strict``.

    Attributes:
        pool: Where merges are scored: ``ray`` takes worker processes on this machine or a cluster, ``serial`` takes
            this process.
        workers: Ray workers to ask for.
        address: The address of a running Ray cluster (``auto``, ``host:port`` or ``ray://...``). None starts a cluster
            on this machine, or uses the cluster that this process is connected to. Ecotone shuts down at the end only a
            cluster that it started.
        cpus_per_worker: Logical CPUs that Ray reserves for each worker.
        gpus_per_worker: Logical GPUs that Ray reserves for each worker; a fraction lets workers share one. A worker
            without a GPU uses none, so the device ``auto`` is the CPU then.
        resources: Custom Ray resources that each worker holds, by name.
        start_timeout: Seconds to wait for a place while no worker has one, without the time to load models. None means
            120 on this machine and 3600 on a cluster, which may have to start machines first.
        attempts: Workers that may die while scoring a batch before its candidates are scored one by one; also, workers
            that may die while scoring one candidate before the candidate counts as failed.
        time_limit: Seconds that a Ray worker may take for a candidate; a batch may take this for each of its
            candidates. After that the worker is killed and replaced. The candidates of the batch are then scored one by
            one. A candidate that was alone has failed. With a limit below 30 s it is first scored once more at another
            node, because the first node may be gone. Time in which this process is stopped or busy does not count. If
            candidates come near to the limit, results depend on the speed of workers. None sets no limit.
        idle_timeout: Seconds after which an idle Ray worker is given back to the cluster, while other workers are busy
            and no work is left to hand out. The cluster may then remove the worker's node. Ecotone asks for the worker
            again when there is work for it. None keeps idle workers.
        sources: Where a worker keeps the models that it mixes: on the ``device``, in main memory (``host``; page-locked
            with a GPU), or ``mapped`` from their files. ``auto`` is the first of these three with enough free memory.
            On a CPU, where copies gain nothing, ``auto`` is ``mapped``, unless models are small and computing their
            tensors takes work.
        cache_bytes: The bytes of disk that the vectors of operators which prepare may take in ``$ECOTONE_CACHE``. When
            new ones are made, those that were not used for longest are removed beyond this, unless a process of the
            machine uses them. Runs make them again. ``ecotone cache`` lists them.
        grace: Seconds that a run waits for evaluations in progress when it is told to end.
        mirror_every: The least number of seconds between two uploads of the run directory, where it is a URL.
        lease: Seconds without renewal after which the manager of a run counts as dead, where the run directory is a
            URL.
        log: The level of the run's log. ``debug`` adds a line for every trial that is proposed or finished.
    """

    pool: Literal["serial", "ray"] = "ray"
    workers: int = Field(default=1, ge=1)
    address: str | None = None
    cpus_per_worker: float = Field(default=1.0, ge=0)
    gpus_per_worker: float = Field(default=0.0, ge=0)
    resources: dict[str, float] = Field(default_factory=dict)
    start_timeout: float | None = Field(default=None, gt=0)
    attempts: int = Field(default=3, ge=1)
    time_limit: float | None = Field(default=None, gt=0)
    idle_timeout: float | None = Field(default=None, gt=0)
    sources: Literal["auto", "device", "host", "mapped"] = "auto"
    cache_bytes: int = Field(default=200_000_000_000, ge=0)
    grace: float = Field(default=30.0, ge=0)
    mirror_every: float = Field(default=30.0, gt=0)
    lease: float = Field(default=60.0, gt=0)
    log: Literal["info", "debug"] = "info"

    @field_validator("address")
    @classmethod
    def _without_credentials(cls, value: str | None) -> str | None:
        """This process keeps them; the recipe does not."""
        return None if value is None else take(value)

    @model_validator(mode="after")
    def _can_be_limited(self) -> Runtime:
        if self.time_limit is not None and self.pool == "serial":
            raise ValueError("time_limit: the serial pool cannot stop a candidate; leave it out, or say pool: ray")
        return self
