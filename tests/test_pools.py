"""Every pool keeps the same promises, and says the same of the same candidates. Then real faults, on Ray.

Nothing here depends on how fast the machine is. Objectives wait for files and leave files, limits of time are told by a
clock that the test moves, and PATIENCE only ends a test that hangs.
"""

import logging
import math
import os
import platform
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from parts import call, objective
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from ecotone.extras import how_to_install
from ecotone.fitness.pools import Batch, SerialPool
from ecotone.fitness.runtime import Runtime
from ecotone.fitness.specs import WorkerSpec
from ecotone.populations.errors import CheckpointError, InputError, PoolError
from ecotone.populations.genome import Genome
from ecotone.populations.trial import Evaluation, Scores, Trial

HERE = str(Path(__file__).parent)
PATIENCE = 600.0  # seconds
pytestmark = pytest.mark.timeout(1800)
MODULE = """
import ctypes, os, pathlib, sys, threading, time, torch
from torch import nn

def net(): return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
def data(n=200):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 8, generator=generator), torch.randint(0, 3, (n,), generator=generator)

def value(model):
    value = float(model["w"][0])
    if value == -1: raise ValueError("minus one")
    if value == -2: return float("nan")
    return value, [value, 2 * value]
def slow(model, seconds=0.2):
    time.sleep(seconds)
    return float(model["w"][0])
def waits(model, marks):
    # Says that it has begun, and goes on once it may.
    folder = pathlib.Path(marks)
    (folder / f"began-{os.getpid()}").touch()
    while not (folder / "go").exists(): time.sleep(0.01)
    return float(model["w"][0])
def broken(model): raise RuntimeError("always")
def poison(model):
    value = float(model["w"][0])
    if value == 13: os._exit(1)
    time.sleep(0.01)
    return value
def dies(): os._exit(1)
def refuses(): raise ValueError("no data today")
def hangs(model, marks):
    value = float(model["w"][0])
    if value in (13, 14): (pathlib.Path(marks) / f"hangs-{os.getpid()}").touch()
    if value == 13: time.sleep(6000)
    if value == 14: ctypes.PyDLL(None).sleep(6000)  # and holds the interpreter's lock
    return value
def gpus(model):
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return (float(visible) if visible else -1.0), [os.getpid()]
def dawdles(folder):
    try: os.close(os.open(folder + "/first", os.O_CREAT | os.O_EXCL))
    except FileExistsError: time.sleep(6000)
    return data()
def swallows(model, marks):
    try: return waits(model, marks)
    except BaseException: return 0.0
def breaks(model):
    from ecotone.fitness.failures import WorkerBrokenError
    if float(model["w"][0]) == 13: raise WorkerBrokenError("the GPU cannot be used any more")
    return float(model["w"][0])
def opened(folder, good, dies):
    # Data that only some of those who ask, counted from 0, get; all but the first ask once they may.
    number, folder = 0, pathlib.Path(folder)
    while True:
        try: os.close(os.open(folder / f"asked-{number}", os.O_CREAT | os.O_EXCL))
        except FileExistsError: number += 1
        else: break
    while number and not (folder / "go").exists(): time.sleep(0.01)
    if number not in good:
        if dies: os._exit(1)
        raise ConnectionError("503, try again later")
    return data()
def asserts(model):
    value = float(model["w"][0])
    index = torch.tensor([9 if value == 13 else 0], device="cuda")
    return value + float(torch.zeros(3, device="cuda")[index].sum())
def no_space():
    from ecotone.fitness.worker import Worker
    Worker.space = lambda self: os._exit(1)
    return data()
class Stuck(BaseException):
    def __init__(self): super().__init__("no pickle"); self.lock = threading.Lock()
    def __str__(self): raise SystemExit
def raises_all(model):
    value = float(model["w"][0])
    if value == 3: raise KeyboardInterrupt("by code")
    if value == 4: raise GeneratorExit
    if value == 5: os.fork()
    if value == 6: raise Stuck
    if value == 7: raise ValueError("x" * 5_000_000)
    if value == 8: sys.exit(8)
    return value
def threads(model): return float(torch.get_num_threads())
def draws(model): return float(torch.rand(()))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two small nets, two vectors, and the module of architectures and objectives."""
    folder = tmp_path_factory.mktemp("pools")
    (folder / "pools_tested.py").write_text(MODULE)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        save_file(net.state_dict(), folder / f"{name}.safetensors")
        w = torch.zeros(6)
        w[seed] = 1.0
        save_file({"w": w}, folder / f"v{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def cluster():
    """One Ray for all tests of this file, with logical GPUs; pools find it initialised and must leave it so."""
    ray = pytest.importorskip("ray")
    for attempt in range(1, 4):
        try:
            ray.init(
                address="local",
                num_cpus=4,
                num_gpus=2,
                include_dashboard=False,
                object_store_memory=100 * 1024**2,
                log_to_driver=False,
                logging_level="ERROR",
                _system_config={"worker_register_timeout_seconds": int(PATIENCE)},
            )
            break
        except Exception:  # Ray gives its own processes half a minute, which is little on a busy machine
            ray.shutdown()
            if attempt == 3:
                raise
    yield ray
    ray.shutdown()


class Clock:
    """Time that passes only when a test says so, or by so many seconds whenever it is asked for."""

    def __init__(self, step=0.0):
        self.now, self.step = 0.0, step

    def __call__(self):
        self.now += self.step
        return self.now


def ray_pool(spec, workers, clock=time.monotonic, **options):
    from ecotone.fitness.ray.pool import RayPool

    return RayPool(spec, Runtime(workers=workers, **{"start_timeout": PATIENCE, **options}), clock)


def waiting(condition):
    """Yields until something has happened."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        yield


def wait_for(condition):
    for _ in waiting(condition):
        time.sleep(0.01)


def working(folder):
    """Process ids of those that have begun to score ``waits``."""
    return [int(path.name.removeprefix("began-")) for path in folder.glob("began-*")]


@pytest.fixture(params=["serial", "ray"])
def make_pool(request):
    """Makes a pool of a spec, and closes it afterwards."""
    made = []
    if request.param == "ray":
        request.getfixturevalue("cluster")

    def make(spec):
        made.append(SerialPool(spec) if request.param == "serial" else ray_pool(spec, 1))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def vectors(folder, path, **arguments):
    paths = (str(folder / "va.safetensors"), str(folder / "vb.safetensors"))
    scored = objective("f", "call", call=f"pools_tested:{path}", arguments=arguments)
    return WorkerSpec(paths, search=(scored,), device="cpu", sys_path=(str(folder),))


def nets(folder, **fields):
    paths = (str(folder / "a.safetensors"), str(folder / "b.safetensors"))
    fields.setdefault("search", (objective("acc", data=call("pools_tested:data")),))
    return WorkerSpec(paths, architecture=call("pools_tested:net"), device="cpu", sys_path=(str(folder),), **fields)


def waits(tmp_path, folder, call="waits"):
    return vectors(folder, call, marks=str(tmp_path))


def batch(number, *firsts):
    return Batch(number, tuple(Trial(10 * number + i, Genome.uniform(6, [f, 0.0])) for i, f in enumerate(firsts)))


def collect(pool, count):
    """By batch number, the evaluations of ``count`` batches."""
    found = {}
    for _ in waiting(lambda: len(found) >= count):
        for done, evaluations in pool.completed(timeout=1.0):
            assert done.number not in found
            assert len(evaluations) == len(done.trials)
            assert all(isinstance(e, Evaluation) for e in evaluations)
            found[done.number] = evaluations
    return found


def said(caplog, event):
    """The log's records of that event."""
    return [record for record in caplog.records if getattr(record, "event", "") == event]


# -- what every pool promises --------------------------------------------------------------------------------

ray_is_slow = pytest.mark.parametrize(
    "make_pool", ["serial", pytest.param("ray", marks=pytest.mark.slow)], indirect=True
)
"""For promises that another test asks of Ray's pool as well."""


def test_each_batch_comes_back_once_with_an_evaluation_a_trial_in_order(folder, make_pool):
    with make_pool(vectors(folder, "value")) as pool:
        space = pool.start()
        assert (space.size, space.sources) == (6, ("va", "vb"))
        assert pool.slots >= 1
        batches = [batch(n, *range(n, n + 1 + n % 3)) for n in range(9)]
        for each in batches:
            pool.submit(each)
        found = collect(pool, 9)
        for each in batches:
            assert [e.scores["f"] for e in found[each.number]] == [t.genome.coefficients[0, 0] for t in each.trials]
            assert [e.per_example["f"].tolist() for e in found[each.number]] == [
                [v, 2 * v] for v in (t.genome.coefficients[0, 0] for t in each.trials)
            ]
        assert pool.completed(timeout=None) == []


@ray_is_slow
def test_nothing_in_flight_returns_at_once(folder, make_pool):
    pool = make_pool(vectors(folder, "value"))
    pool.start()
    assert pool.completed() == []
    assert pool.completed(timeout=1e6) == []
    pool.submit(batch(0, 3.0))
    [(done, [evaluation])] = pool.completed()
    assert (done.number, evaluation.scores) == (0, {"f": 3.0})


def test_failed_candidates_say_why_and_harm_no_other(folder, make_pool):
    pool = make_pool(vectors(folder, "value"))
    pool.start()
    pool.submit(batch(0, 1, -1, 2, -2, 3))
    pool.submit(batch(1, 4))
    found = collect(pool, 2)
    assert [e.scores.get("f") for e in found[0]] == [1, None, 2, None, 3]
    assert found[0][1].failure.kind == "exception"
    assert found[0][1].failure.message == "objective 'f': ValueError: minus one"
    assert found[0][3].failure.kind == "not finite"
    assert found[1][0].ok


@ray_is_slow
def test_an_objective_that_always_raises_fails_every_candidate_and_not_the_pool(folder, make_pool):
    pool = make_pool(vectors(folder, "broken"))
    pool.start()
    pool.submit(batch(0, 1, 2, 3))
    assert {e.failure.message for e in collect(pool, 1)[0]} == {"objective 'f': RuntimeError: always"}


@ray_is_slow
def test_a_file_that_is_missing_is_refused_by_start(folder, make_pool):
    with pytest.raises(CheckpointError, match=r"missing\.safetensors"):
        make_pool(replace(nets(folder), experts=("missing.safetensors",))).start()


def test_what_the_worker_refuses_is_raised_by_start(folder, make_pool):
    pool = make_pool(nets(folder, search=(objective("acc", data=call("pools_tested:refuses")),)))
    words = "objective 'acc': data: pools_tested:refuses\\(\\) raised ValueError: no data today"
    with pytest.raises(InputError, match=words):
        pool.start()
    pool.close()


def test_a_pool_is_started_once_used_then_and_closed_twice(folder, make_pool):
    pool = make_pool(vectors(folder, "value"))
    with pytest.raises(PoolError, match="start"):
        pool.submit(batch(0, 1))
    pool.start()
    with pytest.raises(PoolError, match="started once"):
        pool.start()
    pool.submit(batch(0, 1))
    pool.close()
    pool.close()
    with pytest.raises(PoolError):
        pool.submit(batch(1, 1))
    assert pool.completed() == []


@pytest.mark.slow
def test_closing_does_not_wait_for_what_is_queued(tmp_path, folder, make_pool):
    """It would never end."""
    pool = make_pool(waits(tmp_path, folder))
    pool.start()
    for number in range(10):
        pool.submit(batch(number, 1, 2, 3))
    pool.close()
    assert pool.completed() == []


def test_results_and_space_outlive_the_pool(folder, make_pool):
    with make_pool(nets(folder, dense=True)) as pool:
        space = pool.start()
        pool.submit(Batch(0, tuple(Trial(i, g) for i, g in enumerate(genomes(300)))))
        found = collect(pool, 1)[0]
    assert np.isfinite(space.vectors).all()
    assert space.gram.prefix[-1].shape == (2, 2)
    assert sum(int(e.per_example["acc"].sum()) for e in found) > 0


# -- the same results everywhere -----------------------------------------------------------------------------


def genomes(count):
    rng = np.random.default_rng(5)
    mixed = [Genome(np.array([0, 50, 195]), rng.normal(size=(2, 2))) for _ in range(count)]
    return [Genome.dense(rng.normal(size=195), 2) if i % 2 else g for i, g in enumerate(mixed)]


def results(pool, size=8):
    """What the pool says of 48 candidates, in trial order, to the bit."""
    trials = [Trial(i, genome) for i, genome in enumerate(genomes(48))]
    with pool:
        pool.start()
        for number, start in enumerate(range(0, 48, size)):
            pool.submit(Batch(number, tuple(trials[start : start + size])))
        found = collect(pool, 48 // size)
    return [
        (e.scores["acc"].hex(), e.per_example["acc"].tobytes().hex(), e.scores["draws"])
        for number in sorted(found)
        for e in found[number]
    ]


def determined(folder):
    return nets(
        folder,
        search=(
            objective("acc", data=call("pools_tested:data")),
            objective("draws", "call", call="pools_tested:draws"),
        ),
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_workers_and_this_process_say_the_same(folder, cluster, workers):
    spec = determined(folder)
    expected = results(SerialPool(spec))
    assert len({score for score, _, _ in expected}) > 5
    assert results(ray_pool(spec, workers), size=3) == expected


def test_another_process_says_the_same(folder):
    expected = results(SerialPool(determined(folder)))
    script = f"""
        import sys
        sys.path.insert(0, {HERE!r})
        from pathlib import Path
        import test_pools as t
        print(t.results(t.SerialPool(t.determined(Path({str(folder)!r})))))
    """
    said = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == str(expected)


# -- the serial pool -----------------------------------------------------------------------------------------


def test_the_serial_pool_has_its_own_number_of_threads(folder):
    before = torch.get_num_threads()
    with SerialPool(replace(vectors(folder, "threads"), threads=before + 1)) as pool:
        pool.start()
        pool.submit(batch(0, 1))
        assert collect(pool, 1)[0][0].scores == {"f": before + 1}
    assert torch.get_num_threads() == before


def interrupted(tmp_path, folder, pool):
    """Exit code and output of a process that waits on a batch that never ends and gets Ctrl-C."""
    script = tmp_path / "interrupted.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {HERE!r})
        from pathlib import Path
        import test_pools as t
        spec = t.waits(Path({str(tmp_path)!r}), Path({str(folder)!r}))
        with {pool} as pool:
            pool.start()
            pool.submit(t.batch(0, *range(100)))
            try:
                pool.completed()
            finally:
                print("leaving", flush=True)
        """)
    )
    child = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: working(tmp_path) or child.poll() is not None)
    family = psutil.Process(child.pid).children(recursive=True)
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=PATIENCE)
    _, left = psutil.wait_procs(family, timeout=PATIENCE)
    assert not left
    return child.returncode, out, err


@pytest.mark.slow
def test_whatever_an_objective_raises_is_a_failure_and_its_worker_lives_on(folder, make_pool):
    """Also an interrupt that code raises, an exception without pickle or text, and a fork that comes back."""
    pool = make_pool(vectors(folder, "raises_all"))
    with pool:
        pool.start()
        before = pool.pids() if hasattr(pool, "pids") else []
        pool.submit(batch(0, 2, 3, 4, 5, 6, 7, 8, 9))
        evaluations = collect(pool, 1)[0]
        assert (pool.pids() if hasattr(pool, "pids") else []) == before
    assert [one.scores.get("f") for one in evaluations] == [2.0, None, None, 5.0, None, None, None, 9.0]
    messages = [one.failure.message for one in evaluations if one.failure]
    assert messages[0] == "objective 'f': KeyboardInterrupt: by code"
    assert messages[1] == "objective 'f': GeneratorExit"
    assert messages[2] == "objective 'f': Stuck: (no text: its __str__ raised SystemExit)"
    assert messages[3].startswith("objective 'f': ValueError: xxx")
    assert messages[4] == "objective 'f': SystemExit: 8"
    assert all(one.failure.kind == "exception" and len(one.failure.text) < 30_000 for one in evaluations if one.failure)


def test_the_serial_pool_can_be_interrupted(tmp_path, folder):
    code, out, err = interrupted(tmp_path, folder, "t.SerialPool(spec)")
    assert out == "leaving\n"
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert code != 0


def test_a_timeout_returns_nothing_while_workers_work(tmp_path, folder, cluster):
    with ray_pool(waits(tmp_path, folder), 1) as pool:
        pool.start()
        assert pool.completed(timeout=1e6) == []
        pool.submit(batch(0, 3.0))
        assert pool.completed(timeout=0.05) == []
        assert pool.completed(timeout=0.0) == []
        (tmp_path / "go").touch()
        [(done, [evaluation])] = pool.completed()
        assert (done.number, evaluation.scores) == (0, {"f": 3.0})


# -- Ray: faults ---------------------------------------------------------------------------------------------


def test_killed_workers_change_nothing(folder, cluster, caplog):
    caplog.set_level(logging.DEBUG, "ecotone")
    pool = ray_pool(vectors(folder, "slow", seconds=0.02), 2)
    with pool:
        pool.start()
        for number in range(20):
            pool.submit(batch(number, number, number + 0.5, number + 0.25))
        found = {b.number: e for b, e in pool.completed()}
        victims = pool.pids()
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        found |= collect(pool, 20 - len(found))
        others = set(pool.pids()) - set(victims)
        assert len(others) >= 1
    events = [(r.event, r.worker) for r in caplog.records if getattr(r, "event", "") in ("worker_ready", "worker_died")]
    assert {worker for event, worker in events if event == "worker_died"} == set(victims)
    assert {worker for event, worker in events if event == "worker_ready"} == {*victims, *others}
    assert {r.node for r in caplog.records if hasattr(r, "node")} == {cluster.get_runtime_context().get_node_id()}
    for number in range(20):
        assert [e.scores["f"] for e in found[number]] == [number, number + 0.5, number + 0.25]


@pytest.mark.slow
@pytest.mark.parametrize("attempts", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_only_the_poison_candidate_fails(folder, cluster, attempts):
    pool = ray_pool(vectors(folder, "poison"), 2, attempts=attempts)
    with pool:
        pool.start()
        pool.submit(batch(0, 1, 2))
        pool.submit(batch(1, 3, 13, 4, 5))
        for number in range(2, 8):
            pool.submit(batch(number, number, number))
        found = collect(pool, 8)
    assert [e.scores.get("f") for e in found[1]] == [3, None, 4, 5]
    assert found[1][1].failure.kind == "worker died"
    assert f"died each of {attempts} times" in found[1][1].failure.message
    assert found[1][1].failure.details
    others = [e for number, evaluations in found.items() if number != 1 for e in evaluations]
    assert all(e.ok for e in others)
    assert [e.scores["f"] for e in found[7]] == [7, 7]


@pytest.mark.slow
def test_a_pool_leaves_a_ray_alone_that_it_did_not_start(folder, cluster):
    with ray_pool(vectors(folder, "value"), 1) as pool:
        pool.start()
        [pid] = pool.pids()
    assert cluster.is_initialized()
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


@pytest.mark.slow
def test_a_worker_that_has_no_place_is_told_of_and_refused_in_words(folder, cluster, caplog):
    hungry = {"resources": {"unicorn": 1.0}, "gpus_per_worker": 0.5, "start_timeout": 60}
    with pytest.raises(PoolError, match="no worker had a place within 60 s") as refused:
        ray_pool(vectors(folder, "value"), 1, Clock(step=10.0), **hungry).start()
    assert "asks for 1 CPU, 0.5 GPU, 1 unicorn" in str(refused.value)
    assert "nodes have 4 CPU, 2 GPU, 0 unicorn" in str(refused.value)
    [told] = said(caplog, "waiting")
    assert told.getMessage().endswith("nodes have 4 CPU, 2 GPU, 0 unicorn. Waiting up to 60 s.")


def waited(crew, clock, seconds):
    """Look every second, so many times."""
    for _ in range(seconds):
        clock.now += 1.0
        crew.check_places()


def test_a_place_is_waited_for_and_told_of_and_opening_takes_what_it_takes(caplog):
    from ecotone.fitness.ray.cluster import PlaceWait
    from ecotone.fitness.ray.crew import Crew
    from ecotone.fitness.ray.members import Member

    clock = Clock()
    cluster = SimpleNamespace(silent=False, arrived=lambda call: False, no_place=lambda what: f"{what}.")
    crew = Crew(1, None, cluster, None, None, PlaceWait(cluster, 100.0, clock), clock)
    crew.members = [Member(None, "placed", "opened", 0.0)]
    waited(crew, clock, 99)
    told = [(record.getMessage(), record.seconds) for record in said(caplog, "waiting")]
    assert told == [("no worker has a place yet. Waiting up to 100 s.", at) for at in (10.0, 70.0)]
    cluster.arrived = lambda call: call == "placed"
    waited(crew, clock, 1000)
    cluster.arrived = lambda call: False
    waited(crew, clock, 100)
    cluster.silent = True
    waited(crew, clock, 1000)
    cluster.silent = False
    with pytest.raises(PoolError, match="no worker had a place within 100 s"):
        crew.check_places()


def test_pauses_grow_until_a_worker_is_opened():
    from ecotone.fitness.ray.crew import Retries

    def pause():
        """Seconds until the next one is due."""
        retries.add_after_failure()
        began = clock.now
        while not retries.take_due():
            assert len(retries) == 1
            clock.now += 1.0
        return clock.now - began

    clock = Clock()
    retries = Retries(clock)
    assert [pause() for _ in range(8)] == [2, 4, 8, 16, 32, 60, 60, 60]
    retries.opened()
    assert pause() == 2


@pytest.mark.slow
def test_a_pool_works_with_the_workers_that_have_a_place(folder, cluster):
    with ray_pool(vectors(folder, "value"), 3, cpus_per_worker=2.0) as pool:
        pool.start()
        for number in range(6):
            pool.submit(batch(number, number))
        assert len(collect(pool, 6)) == 6
        assert 1 <= len(pool.pids()) <= 2


@pytest.mark.slow
def test_workers_that_die_while_they_open_are_given_up(folder, cluster):
    spec = nets(folder, search=(objective("acc", data=call("pools_tested:dies")),))
    with pytest.raises(PoolError, match="2 workers in a row died while they opened the models"):
        ray_pool(spec, 1, attempts=2).start()


def ready(pool, count):
    """Wait until so many workers are."""
    for _ in waiting(lambda: len(pool.pids()) >= count):
        pool.submit(batch(0, 1))
        pool.completed()


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "share"), [(2, 1.0), (4, 0.5)])
def test_each_worker_gets_its_share_of_a_logical_gpu(folder, cluster, workers, share):
    with ray_pool(vectors(folder, "gpus"), workers, gpus_per_worker=share, cpus_per_worker=0.5) as pool:
        pool.start()
        ready(pool, workers)
        for number in range(1, 1 + 2 * workers):
            pool.submit(batch(number, 1))
        found = [e for [e] in collect(pool, 2 * workers).values()]
    seen = {int(e.per_example["f"][0]): e.scores["f"] for e in found}
    assert sorted(seen.values()) == sorted([0.0, 1.0] * (workers // 2))


@pytest.mark.slow
def test_the_search_goes_on_while_a_worker_is_slow_to_open(tmp_path, folder, cluster):
    data = call("pools_tested:dawdles", {"folder": str(tmp_path)})
    with ray_pool(nets(folder, search=(objective("acc", data=data),)), 2) as pool:
        pool.start()
        for number in range(6):
            pool.submit(Batch(number, (Trial(number, genomes(1)[0]),)))
        assert all(e[0].ok for e in collect(pool, 6).values())
        assert len(pool.pids()) == 1


@pytest.mark.parametrize("dies", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_worker_that_cannot_be_opened_is_tried_again_while_others_work(tmp_path, folder, cluster, caplog, dies):
    clock = Clock()
    data = call("pools_tested:opened", {"folder": str(tmp_path), "good": [0, 3], "dies": dies})
    with ray_pool(nets(folder, search=(objective("acc", data=data),)), 2, clock) as pool:
        pool.start()
        (tmp_path / "go").touch()
        for number, _ in enumerate(waiting(lambda: len(pool.pids()) == 2)):
            clock.now += 1.0
            pool.submit(Batch(number, (Trial(number, genomes(1)[0]),)))
            assert [e.ok for [e] in collect(pool, 1).values()] == [True]
    failed = [record.getMessage() for record in said(caplog, "worker_failed")]
    assert len(failed) == 2
    assert all(("died" if dies else "503, try again later") in message for message in failed)
    assert len(list(tmp_path.glob("asked-*"))) == 4


@pytest.mark.slow
def test_workers_that_die_while_they_read_the_models_are_given_up(folder, cluster):
    spec = nets(folder, search=(objective("acc", data=call("pools_tested:no_space")),))
    with pytest.raises(PoolError, match="2 workers died while they read the models"):
        ray_pool(spec, 1, attempts=2).start()


def test_what_is_finished_is_returned_before_the_pool_fails(folder, cluster, monkeypatch):
    with ray_pool(vectors(folder, "value"), 1) as pool:
        pool.start()
        look = pool._watch

        def watch():
            look()
            if pool._jobs.finished:
                raise PoolError("the head is gone")

        monkeypatch.setattr(pool, "_watch", watch)
        pool.submit(batch(0, 1))
        pool.submit(batch(1, 2, 3))
        found = {}
        for done, evaluations in pool.completed():
            found[done.number] = [e.scores["f"] for e in evaluations]
        assert found[0] == [1]
        with pytest.raises(PoolError, match="the head is gone"):
            pool.completed()


@pytest.mark.slow
def test_a_worker_whose_gpu_is_broken_is_replaced_and_its_candidate_found(folder, cluster):
    with ray_pool(vectors(folder, "breaks"), 1, attempts=1) as pool:
        pool.start()
        for number, firsts in enumerate([(1, 13, 2), (3,), (4,)]):
            pool.submit(batch(number, *firsts))
        found = collect(pool, 3)
    assert [e.scores.get("f") for e in found[0]] == [1, None, 2]
    assert found[0][1].failure.kind == "worker died"
    assert "the GPU cannot be used any more" in found[0][1].failure.message
    assert [found[n][0].scores["f"] for n in (1, 2)] == [3, 4]
    with SerialPool(vectors(folder, "breaks")) as pool:
        pool.start()
        pool.submit(batch(0, 13))
        with pytest.raises(PoolError, match="cannot be used any more"):
            pool.completed()


@pytest.mark.gpu
def test_a_kernel_that_asserts_harms_no_other_candidate(folder, cluster):
    """It breaks the context for good; without another process every later candidate would fail."""
    spec = replace(vectors(folder, "asserts"), device="cuda")
    with ray_pool(spec, 1, attempts=1, gpus_per_worker=1) as pool:
        pool.start()
        for number, first in enumerate((1, 13, 3, 4)):
            pool.submit(batch(number, first))
        found = collect(pool, 4)
    assert [found[n][0].scores.get("f") for n in range(4)] == [1, None, 3, 4]
    assert "the GPU cannot be used any more" in found[1][0].failure.message


@pytest.mark.slow
def test_a_batch_does_not_wait_behind_a_slow_one_while_a_worker_is_idle(tmp_path, folder, cluster):
    with ray_pool(vectors(folder, "hangs", marks=str(tmp_path)), 2) as pool:
        pool.start()
        ready(pool, 2)
        for number, first in ((1, 13), (2, 2), (3, 3), (4, 4)):
            pool.submit(batch(number, first))
        assert set(collect(pool, 3)) == {2, 3, 4}


def test_a_worker_that_does_not_find_what_the_search_has_names_node_and_path(folder, cluster, monkeypatch):
    monkeypatch.chdir(folder)  # not where workers are
    spec = replace(vectors(folder, "value"), experts=("va.safetensors", str(folder / "vb.safetensors")))
    node = re.escape(platform.node())
    with pytest.raises(CheckpointError, match=f"^va.safetensors: node {node} has no such file or directory"):
        ray_pool(spec, 1).start()


@pytest.mark.slow
def test_idle_workers_are_given_back_and_asked_for_again(tmp_path, folder, cluster):
    def at_work(pool):
        """Their process ids, once work for two has two."""
        for _ in waiting(lambda: len(pool.pids()) == 2):
            pool.submit(batch(0, 1))
            pool.submit(batch(1, 2))
            assert {number: e.scores["f"] for number, [e] in collect(pool, 2).items()} == {0: 1, 1: 2}
        return set(pool.pids())

    clock, go = Clock(), tmp_path / "go"
    with ray_pool(waits(tmp_path, folder), 2, clock, idle_timeout=10.0) as pool:
        go.touch()
        pool.start()
        before = at_work(pool)
        go.unlink()
        pool.submit(batch(2, 1, 2, 3))
        for _ in waiting(lambda: len(pool.pids()) == 1):
            clock.now += 1.0
            assert pool.completed(timeout=0.0) == []
        [kept] = pool.pids()
        go.touch()
        assert collect(pool, 1)[2][2].ok
        after = at_work(pool)
        assert before & after == {kept}


# -- Ray: deadlines ------------------------------------------------------------------------------------------


def collect_in_time(pool, clock, markers, count):
    """As ``collect``; time passes only while each worker that has work hangs at the job it has had for longest."""

    def hangs(member):
        firsts = {trial.genome.coefficients[0, 0] for trial in member.jobs[0].trials}
        return bool(firsts & {13, 14}) and (markers / f"hangs-{member.pid}").exists()

    found = {}
    for _ in waiting(lambda: len(found) >= count):
        at_work = [member for member in pool._crew.members if member.queue]
        if at_work and all(hangs(member) for member in at_work):
            clock.now += 1.0
        found.update({done.number: evaluations for done, evaluations in pool.completed(timeout=0.05)})
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "hanging"), [(1, 13), (2, 13), (2, 14)])
def test_only_the_candidate_past_its_time_limit_fails(tmp_path, folder, cluster, caplog, workers, hanging):
    caplog.set_level(logging.DEBUG, "ecotone")
    clock = Clock()
    with ray_pool(vectors(folder, "hangs", marks=str(tmp_path)), workers, clock, time_limit=1.0) as pool:
        pool.start()
        pool.submit(batch(0, 1, hanging))
        for number in range(1, 4):
            pool.submit(batch(number, number))
        pool.submit(batch(4, hanging))
        found = collect_in_time(pool, clock, tmp_path, 5)
    assert found[0][0].scores == {"f": 1}
    assert [found[n][0].scores["f"] for n in (1, 2, 3)] == [1, 2, 3]
    for failed in (found[0][1], found[4][0]):
        assert failed.failure.kind == "timed out"
        assert "more than 1 s (runtime.time_limit)" in failed.failure.message
    assert sorted(record.trials for record in said(caplog, "trial_timed_out")) == [[0, 1], [1], [40]]


@pytest.mark.slow
def test_at_another_node_a_short_limit_is_exceeded_twice(tmp_path, folder, cluster, caplog, monkeypatch):
    """Within half a minute Ray may not know that the node is gone."""
    clock = Clock()
    with ray_pool(vectors(folder, "hangs", marks=str(tmp_path)), 1, clock, time_limit=1.0) as pool:
        pool.start()
        monkeypatch.setattr(pool._cluster, "home", "another node")
        pool.submit(batch(0, 13))
        [failed] = collect_in_time(pool, clock, tmp_path, 1)[0]
    assert failed.failure.kind == "timed out"
    assert [record.trials for record in said(caplog, "trial_timed_out")] == [[0], [0]]


def test_time_in_which_nobody_looked_is_not_held_against_workers():
    from ecotone.fitness.ray.members import Member
    from ecotone.fitness.ray.schedule import Schedule

    clock, member = Clock(), Member(None, None, None, since=0.0)
    schedule = Schedule(SimpleNamespace(members=[member]), None, None, Runtime(time_limit=1.0), clock)
    clock.now = 1.0
    schedule.looked(waited=1.0)
    assert member.since == 0.0
    clock.now = 101.0
    schedule.looked(waited=1.0)
    assert member.since == 99.0


@pytest.mark.slow
@pytest.mark.parametrize("stopped", ["all", "driver"])
def test_a_search_that_is_stopped_for_longer_than_the_limit_blames_nobody(tmp_path, folder, stopped):
    """SIGSTOP, as a container that is paused or a machine that sleeps."""
    pytest.importorskip("ray")
    script = tmp_path / "stopped.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {HERE!r})
        from pathlib import Path
        import test_pools as t
        with t.ray_pool(t.vectors(Path({str(folder)!r}), "slow", seconds=1.0), 1, time_limit=10.0) as pool:
            pool.start()
            for number in range(6):
                pool.submit(t.batch(number, number))
            found = t.collect(pool, 1)
            print(*pool.pids(), flush=True)
            found |= t.collect(pool, 5)
            print(*[e.scores["f"] for _, [e] in sorted(found.items())], flush=True)
        """)
    )
    child = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    [worker] = child.stdout.readline().split()
    family = [child.pid, int(worker)] if stopped == "all" else [child.pid]
    for pid in family:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(13.0)
    for pid in reversed(family):
        os.kill(pid, signal.SIGCONT)
    out, _ = child.communicate(timeout=PATIENCE)
    assert out.split() == [f"{number}.0" for number in range(6)]


@pytest.mark.slow
def test_a_worker_told_to_stop_hands_its_batch_on_and_blames_nobody(tmp_path, folder, cluster):
    with ray_pool(waits(tmp_path, folder), 1, attempts=1) as pool:
        pool.start()
        pool.submit(batch(0, 1))
        for _ in range(2):
            [pid] = pool.pids()
            wait_for(lambda pid=pid: pid in working(tmp_path))
            os.kill(pid, signal.SIGTERM)
            for _ in waiting(lambda pid=pid: pid not in pool.pids() and pool.pids()):
                assert pool.completed(timeout=0.1) == []
        (tmp_path / "go").touch()
        assert [e.scores for e in collect(pool, 1)[0]] == [{"f": 1}]


def test_a_score_that_was_cut_short_by_the_order_to_stop_is_not_taken(tmp_path, folder, cluster):
    """An objective with a bare ``except`` swallows it."""
    with ray_pool(waits(tmp_path, folder, "swallows"), 1, attempts=1) as pool:
        pool.start()
        [pid] = pool.pids()
        pool.submit(batch(0, 7))
        wait_for(lambda: working(tmp_path))
        os.kill(pid, signal.SIGTERM)
        for _ in waiting(lambda: pid not in pool.pids()):
            assert pool.completed(timeout=0.1) == []
        (tmp_path / "go").touch()
        assert [e.scores for e in collect(pool, 1)[0]] == [{"f": 7}]


# -- Ray: what it refuses and tells ------------------------------------------------------------------


def test_without_ray_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PoolError, match="Ray is not installed") as refused:
        ray_pool(vectors(folder, "value"), 1).start()
    assert refused.value.remedy == f"`{how_to_install('ray')}`, or --set runtime.pool=serial."


def test_metrics_that_cannot_be_made_or_set_are_left_out(monkeypatch):
    pytest.importorskip("ray")
    from ecotone.fitness.ray.meters import Meters

    def check(meters):
        meters.make()
        meters.state(1, 0.5, 0)
        meters.count(Evaluation({"f": 1.0}, seconds=2.0, details={"merge_seconds": 0.5}))
        meters.count(Evaluation.failed("exception", "why"))

    with monkeypatch.context() as patched:
        patched.setattr("ray.util.metrics.Gauge.set", None)
        check(Meters())
    monkeypatch.setattr("ray.util.metrics.Histogram", None)
    check(Meters())


@pytest.mark.slow
def test_metrics_can_be_scraped(folder):
    """In a process of its own: Ray reads the port when it starts."""
    pytest.importorskip("ray")
    script = f"""
        import os, socket, sys, time, urllib.request
        sys.path.insert(0, {HERE!r})
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        from pathlib import Path
        import ray, test_pools as t
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _metrics_export_port=port)
        with t.ray_pool(t.vectors(Path({str(folder)!r}), "value"), 1) as pool:
            pool.start()
            for number in range(10):
                pool.submit(t.batch(number, number, -1))
            t.collect(pool, 10)
            wanted = ("ecotone_evaluations_total", "ecotone_workers", "ecotone_evaluation_seconds_count")
            lines = []
            for _ in t.waiting(lambda: all(any(name in line for line in lines) for name in wanted)):
                pool.completed(timeout=0)
                time.sleep(1)
                text = urllib.request.urlopen(f"http://127.0.0.1:{{port}}/metrics").read().decode()
                lines = [line for line in text.splitlines() if line.startswith("ray_ecotone_")]
        print("\\n".join(lines))
    """
    said = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    values = {}
    for line in said.stdout.splitlines():
        name, value = line.removeprefix("ray_ecotone_").rsplit(" ", 1)
        kind = re.search('kind="([^"]*)"', name)
        values[name.partition("{")[0], kind and kind.group(1)] = float(value)
    assert values["evaluations_total", None] == 20
    assert values["failures_total", "exception"] == 10
    assert values["evaluation_seconds_count", None] == values["merge_seconds_count", None] == 10
    assert values["workers", None] == 1


@pytest.mark.parametrize(("size", "count", "arguments"), [(0, 3, 1), (30_000, 4, 5), (30_000, 40, 1)])
def test_trials_travel_with_the_call_unless_they_are_large(size, count, arguments):
    """Pieces below the 100 kB that Ray sends with a call, or one argument for its object store."""
    from ecotone.fitness.ray.actor import packed, unpacked

    rng = np.random.default_rng(0)
    sent = tuple(
        Trial(
            i,
            Genome.dense(rng.normal(size=size), 2) if size else Genome.uniform(9, [0.5, 0.5]),
            (1, 2),
            Scores("held_out"),
        )
        for i in range(count)
    )
    parts = packed(sent)
    assert len(parts) == arguments
    assert all(len(part) < 100_000 for part in parts)
    assert list(unpacked(parts)) == list(sent)


@pytest.mark.parametrize(
    ("field", "value"),
    [("workers", 0), ("attempts", 0), ("gpus_per_worker", -1), ("time_limit", 0), ("idle_timeout", math.nan)],
)
def test_numbers_out_of_range(field, value):
    with pytest.raises(ValidationError) as refused:
        Runtime(**{field: value})
    assert [error["loc"] for error in refused.value.errors()] == [(field,)]


def test_cuda_without_a_gpu_each_is_refused(folder):
    pytest.importorskip("ray")
    with pytest.raises(InputError, match="gpus_per_worker: expected more than 0 for device cuda"):
        ray_pool(replace(vectors(folder, "value"), device="cuda"), 1)


@pytest.mark.slow
def test_a_cluster_of_its_own_listens_on_loopback_and_ends_on_ctrl_c(tmp_path, folder):
    pytest.importorskip("ray")
    code, out, err = interrupted(tmp_path, folder, "t.ray_pool(spec, 1)")
    assert out == "leaving\n"
    assert "KeyboardInterrupt" in err
    assert code != 0


@pytest.mark.slow
def test_a_cluster_of_its_own_refuses_at_once_what_it_has_no_place_for(tmp_path, folder):
    pytest.importorskip("ray")
    script = f"""
        import sys, time
        sys.path.insert(0, {HERE!r})
        from pathlib import Path
        import psutil, test_pools as t
        spec = t.vectors(Path({str(folder)!r}), "value")
        try:
            t.ray_pool(spec, 1, gpus_per_worker=64).start()
        except t.PoolError as error:
            print(error)
        with t.ray_pool(spec, 1) as pool:
            pool.start()
            family = [psutil.Process(), *psutil.Process().children(recursive=True)]
            listening = {{c.laddr.ip for p in family for c in p.net_connections("tcp") if c.status == "LISTEN"}}
            print(sorted(ip.removeprefix("::ffff:") for ip in listening)[0::len(listening)])
    """
    said = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    refusal, listening = said.stdout.strip().splitlines()
    assert "no worker can be placed: each asks for 1 CPU, 64 GPU" in refusal
    assert listening == "['127.0.0.1']"
