"""Where a search runs: its pool of workers, and how long it waits for what."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ecotone.settings import Part


class Runtime(Part):
    """Where it runs. Nothing here changes results under ``order: strict``.

    Attributes:
        pool: ``ray`` for worker processes here or on a cluster, ``serial`` for this process.
        workers: How many Ray workers to ask for.
        address: A running Ray cluster (``auto``, ``host:port`` or ``ray://...``). None starts one on this machine, or
            uses the one that this process is connected to. Only a cluster that was started here is shut down at the
            end.
        cpus_per_worker: Logical CPUs that Ray reserves for each worker.
        gpus_per_worker: Logical GPUs that Ray reserves for each worker; a fraction lets workers share one. A worker
            without a GPU uses none, so the device ``auto`` is the CPU then.
        resources: Custom Ray resources that each worker holds, by name.
        start_timeout: Seconds to wait for a place when no worker has one; loading models is not counted. By default 120
            on this machine and 3600 on a cluster, where machines may have to be started first.
        attempts: How many workers may die of a batch before its candidates are tried alone, and how many of a candidate
            alone before it has failed.
        time_limit: Seconds that a candidate may take at a Ray worker; a batch has them for each of its candidates. Past
            it the worker is killed and replaced. The candidates of a batch are then tried alone once, and one alone is
            a failure (at another node, with a limit below 30 s, at the second attempt: the node may be gone). Time in
            which this process is stopped or busy does not count. With a limit that candidates come near to, results
            depend on how fast workers are. None sets no limit.
        idle_timeout: Seconds after which a Ray worker that has nothing to do, while others work and all work is handed
            out, is given back to the cluster, which may remove its node. It is asked for again when there is work for
            it. None keeps it.
        sources: Where a worker keeps the models that it mixes: on the ``device``, in main memory (``host``; with a GPU
            page-locked), or ``mapped`` from their files. ``auto`` is the first of these that free memory has room for.
            On a CPU, where copies gain nothing, it is ``mapped`` unless models are small and forming them takes work.
        grace: Seconds for which a run that is told to end waits for what is being evaluated.
        mirror_every: Least number of seconds between two copies of a run directory that is a URL.
        lease: Seconds without renewal after which the manager of a run directory that is a URL counts as dead.
        log: The level of the run's log; ``debug`` adds each trial that is asked and told.
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
    grace: float = Field(default=30.0, ge=0)
    mirror_every: float = Field(default=30.0, gt=0)
    lease: float = Field(default=60.0, gt=0)
    log: Literal["info", "debug"] = "info"

    @model_validator(mode="after")
    def _can_be_limited(self) -> Runtime:
        if self.time_limit is not None and self.pool == "serial":
            raise ValueError("time_limit: the serial pool cannot stop a candidate; leave it out, or say pool: ray")
        return self
