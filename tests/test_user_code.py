"""Whatever user code raises, returns or leaves behind is a result of its candidate; a real Ctrl-C still ends a run."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parts import objective
from safetensors.torch import save_file

from ecotone import Recipe, launch, resume
from ecotone.fitness.failures import failed
from ecotone.fitness.guards import User
from ecotone.fitness.protocol import Score
from ecotone.fitness.scores import Expected, NotFiniteScoreError, checked, number
from ecotone.fitness.specs import WorkerSpec
from ecotone.fitness.surroundings import Signals, Surroundings
from ecotone.fitness.worker import Worker
from ecotone.populations.errors import EcotoneError, InputError, first_line, shortened, told
from ecotone.populations.genome import Genome
from ecotone.populations.journal import Journal
from ecotone.populations.trial import Evaluation, Failure, Goal, Gradient, Trial
from ecotone.search.fitting import Fitting

pytestmark = pytest.mark.usefixtures("threads")
MODULE = """
import asyncio, os, signal, subprocess, sys, threading, time

class Mute(Exception):
    def __str__(self): raise SystemExit("no text")
    __repr__ = __str__
class Stuck(Exception):
    def __init__(self): super().__init__("stuck"); self.lock = threading.Lock()

def deep(n): return deep(n + 1)
def long(): raise ValueError("first words " + "x" * 5_000_000 + " last words")
def chained():
    try: long()
    except ValueError as error: raise KeyError("y" * 5_000_000) from error
def thread_exits():
    thread = threading.Thread(target=sys.exit)
    thread.start(); thread.join()
def left():
    threading.Thread(target=time.sleep, args=(3,), name="left-behind", daemon=True).start()
def child():
    child.held = subprocess.Popen(["sleep", "3"])

DOES = {
    "GeneratorExit": lambda: (_ for _ in ()).throw(GeneratorExit("ended")),
    "KeyboardInterrupt": lambda: (_ for _ in ()).throw(KeyboardInterrupt("by code")),
    "SystemExit": lambda: sys.exit(3),
    "CancelledError": lambda: (_ for _ in ()).throw(asyncio.CancelledError("cancelled")),
    "BaseException": lambda: (_ for _ in ()).throw(BaseException("bare")),
    "Mute": lambda: (_ for _ in ()).throw(Mute()),
    "Stuck": lambda: (_ for _ in ()).throw(Stuck()),
    "RecursionError": lambda: deep(0),
    "MemoryError": lambda: [0] * 10**15,
    "long": long,
    "chained": chained,
    "thread": thread_exits,
    "cwd": lambda: os.chdir("/"),
    "handler": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "stdout": lambda: setattr(sys, "stdout", open(os.devnull, "w")),
    "threads": left,
    "child": child,
    "variable": lambda: os.environ.__setitem__("USER_CODE_TESTED", "1"),
    "path": lambda: sys.path.append("/nowhere"),
    "fork": os.fork,
}
def score(model, does):
    value = float(model["w"].sum())
    if value > 0.5: DOES[does]()
    return value
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "user_code_tested.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "user_code_tested", raising=False)
    for place, name in enumerate("ab"):
        save_file({"w": torch.tensor([float(place), 0.0])}, tmp_path / f"{name}.safetensors")
    return tmp_path


def worker_of(folder: Path, does: str) -> Worker:
    paths = tuple(str(folder / f"{name}.safetensors") for name in "ab")
    score = objective("f", "call", call="user_code_tested:score", arguments={"does": does})
    return Worker(WorkerSpec(paths, search=(score,), device="cpu"))


def trials() -> list[Trial]:
    """Three candidates; the objective of the second one misbehaves."""
    return [Trial(number, Genome.uniform(2, [1 - share, share])) for number, share in enumerate((0.25, 0.75, 0.125))]


RAISED = {
    "GeneratorExit": "GeneratorExit: ended",
    "KeyboardInterrupt": "KeyboardInterrupt: by code",
    "SystemExit": "SystemExit: 3",
    "CancelledError": "CancelledError: cancelled",
    "BaseException": "BaseException: bare",
    "Mute": "Mute: (no text: its __str__ raised SystemExit)",
    "Stuck": "Stuck: stuck",
    "RecursionError": "RecursionError: maximum recursion depth exceeded",
    "MemoryError": "MemoryError",
}


@pytest.mark.parametrize("does", RAISED)
def test_what_user_code_raises_is_its_candidates_failure(folder, does):
    first, second, third = worker_of(folder, does).measure(trials())
    assert (first.scores, third.scores) == ({"f": 0.25}, {"f": 0.125})
    assert second.failure.message.startswith(f"objective 'f': {RAISED[does]}")
    assert second.failure.kind == ("out of memory" if does == "MemoryError" else "exception")
    pickle.loads(pickle.dumps(second))


@pytest.mark.parametrize("does", ["long", "chained"])
def test_long_texts_are_cut(folder, does):
    failure = worker_of(folder, does).measure(trials())[1].failure
    assert len(failure.message) < 5_000
    assert len(failure.details) < 25_000
    assert "cut:" in failure.message
    assert "cut:" in failure.details
    assert failure.details.startswith("Traceback")
    assert failure.details.rstrip().endswith("last words" if does == "long" else "y'")


def test_texts_are_cut_wherever_they_enter():
    huge = "a" * 5_000_000
    assert len(str(InputError(huge, "Do this."))) < 25_000
    assert str(InputError(huge, "Do this.")).endswith("Do this.")
    assert len(told(ValueError(huge))) < 5_000
    assert len(first_line(EcotoneError(huge))) < 5_000
    assert len(Failure("exception", huge, huge).text) < 30_000
    assert shortened("short") == "short"
    assert shortened("abcdefghij" * 10, 30) == "abcdefghijabcdefghij [... cut: 70 of 100 characters ...] abcdefghij"


@pytest.mark.parametrize(
    ("does", "words"),
    [
        ("cwd", "changed the working directory to /. It is set back after each call."),
        ("handler", "changed the handler of SIGTERM. It is set back after each call."),
        ("stdout", "changed sys.stdout by closing or replacing it. It is set back after each call."),
        ("threads", "left threads behind (left-behind)"),
        ("child", "left child processes behind"),
        ("variable", "changed environment variables (USER_CODE_TESTED)."),
        ("path", "changed sys.path (/nowhere)."),
    ],
)
def test_what_is_left_behind_is_told_once_and_put_back(folder, caplog, monkeypatch, does, words):
    monkeypatch.setenv("USER_CODE_TESTED", "")
    monkeypatch.delenv("USER_CODE_TESTED")
    before = Path.cwd(), signal.getsignal(signal.SIGTERM), sys.stdout
    worker = worker_of(folder, does)
    path = list(sys.path)
    try:
        with caplog.at_level(logging.WARNING, "ecotone"):
            found = [worker.measure(trials()) for _ in range(2)]
    finally:
        sys.path[:] = path
    assert (
        [one.scores for one in found[0]] == [one.scores for one in found[1]] == [{"f": 0.25}, {"f": 0.75}, {"f": 0.125}]
    )
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"objective 'f' {words}")
    assert (Path.cwd(), signal.getsignal(signal.SIGTERM), sys.stdout) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_exit_in_a_thread_is_harmless(folder, caplog):
    assert all(one.ok for one in worker_of(folder, "thread").measure(trials()))
    assert not caplog.records


def test_a_fork_that_comes_back_ends_and_the_parent_goes_on(folder):
    """Only one process tells of scores; the child ends as soon as it comes back."""
    found = worker_of(folder, "fork").measure(trials())
    assert [one.scores["f"] for one in found] == [0.25, 0.75, 0.125]
    _, status = os.wait()
    assert os.waitstatus_to_exitcode(status) == 0


class TestSignals:
    @pytest.fixture(autouse=True)
    def ordinary(self):
        """The handler that Python begins with: other tests of this process may have left another."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    def test_a_real_interrupt_is_passed_on(self):
        signals = Signals()
        with signals:
            with pytest.raises(KeyboardInterrupt) as caught:
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signals.pass_on(caught.value)

    def test_one_that_user_code_swallows_or_turns_into_something_else(self):
        for other in (None, ValueError("another")):
            signals = Signals()
            with signals:
                with suppress(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
                with pytest.raises(KeyboardInterrupt):
                    signals.pass_on(other)

    def test_one_that_code_raises_is_not(self):
        signals = Signals()
        with signals:
            signals.pass_on(KeyboardInterrupt())
        assert not signals.came

    def test_handlers_are_as_before_and_a_handler_may_set_another(self):
        def drain(number: int, frame: Any) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

        before = signal.signal(signal.SIGTERM, drain)
        try:
            with Signals():
                pass
            assert signal.getsignal(signal.SIGTERM) is drain
            with Signals() as signals:
                signal.raise_signal(signal.SIGTERM)
            assert signals.came
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        finally:
            signal.signal(signal.SIGTERM, before)

    def test_other_threads_have_none(self):
        thread = threading.Thread(target=lambda: Signals().__enter__().__exit__(None, None, None))
        thread.start()
        thread.join()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("0.5", "found the text '0.5'"),
        (b"1", "found the text b'1'"),
        (True, "found the bool True"),
        (np.True_, "found the bool True"),
        (np.array([True]), r"found an array of shape \(1,\)"),
        (np.array([0.5]), r"found an array of shape \(1,\)"),
        (np.array("0.5"), "found an array of <U3"),
        (torch.tensor([[0.5]]), r"found a tensor of shape \(1, 1\)"),
        (torch.tensor(True), "found a tensor of torch.bool"),
        (1j, "found complex"),
        (np.complex64(1), "found an array of complex64"),
        (None, "found NoneType"),
        ([0.5], "found list"),
        (object(), "found object"),
    ],
)
def test_what_is_no_number_is_refused(value, words):
    with pytest.raises(InputError, match=f"^the score: expected a number, {words}"):
        number(value, "the score")


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5, dtype=torch.bfloat16)])
def test_numbers_without_dimensions_are_taken(value):
    assert number(value, "the score") == 0.5
    assert type(number(value, "the score")) is float
    assert number(np.int64(2), "the score") == number(2, "the score") == 2.0


@pytest.mark.parametrize(
    ("score", "error", "words"),
    [
        (Score(1.2), InputError, "f: expected a score from 0 to 1, as its kind declares, found 1.2."),
        (Score(0.5, np.array([0.5, 2.0])), InputError, "scores by example from 0 to 1, .* found 2 at example 1"),
        (Score(0.5, np.array([0.5, np.nan])), NotFiniteScoreError, r"found nan at example 1 \(1 of 2 are not finite\)"),
        (Score(np.nan), NotFiniteScoreError, "f: expected a finite score, found nan"),
        (Score(0.5, np.array([0.5])), InputError, "f: expected 2 scores by example, found 1"),
        (Score(0.5, np.array([["a"]])), InputError, "expected scores by example of shape"),
        (Score(0.5, np.array([1, 0]), "2"), InputError, "f: items: expected a number, found the text"),
    ],
)
def test_scores_that_do_not_fit_are_refused(score, error, words):
    with pytest.raises(error, match=words):
        checked(score, "f", Expected((0.0, 1.0), 2))


def test_scores_that_fit_stay_as_they_are():
    score = Score(0.5, np.array([True, False]), 2)
    assert checked(score, "f", Expected((0.0, 1.0), 2)) is score
    assert checked(Score(1.0000001), "f", Expected((0.0, 1.0))).value == 1.0000001  # rounding
    assert checked(Score(3), "f", Expected((0.0, float("inf")))) == Score(3.0)


class TestFitting:
    fitting = property(lambda self: Fitting([Goal("a"), Goal("b", "minimize")]))
    trial = Trial(0, Genome.uniform(4, [0.5, 0.5]))
    fine = Evaluation({"a": 1.0, "b": 2.0}, {"a": np.array([True, False])})

    def test_what_fits_is_itself(self):
        assert self.fitting.fitted(self.trial, self.fine) is self.fine

    @pytest.mark.parametrize(
        ("evaluation", "words"),
        [
            (None, "expected an Evaluation, found NoneType"),
            (Evaluation({"a": 1.0}), "expected scores of a, b, found a"),
            (Evaluation({"a": 1.0, "b": "2"}), "b: expected a number, found the text '2'"),
            (Evaluation({"a": 1.0, "b": float("nan")}), "b: expected a finite number, found nan"),
            (
                Evaluation({"a": 1.0, "b": 2.0}, {"a": [True]}),
                "expected scores by example of shape (N,), found list",
            ),
            (Evaluation({"a": 1.0, "b": 2.0}, details={"x": torch.ones(2)}), "details: x: expected a text or a number"),
        ],
    )
    def test_what_does_not_is_a_failure_in_words(self, evaluation, words):
        found = self.fitting.fitted(self.trial, evaluation)
        assert found.failure.kind == "exception"
        assert words in found.failure.message

    def test_another_number_of_scores_by_example_is_a_failure_also_after_a_resume(self):
        fewer = Evaluation({"a": 1.0, "b": 2.0}, {"a": np.array([True])})
        seen, resumed = self.fitting, self.fitting
        seen.fitted(self.trial, self.fine)
        resumed.learn(self.trial, self.fine)
        for fitting in (seen, resumed):
            words = "a: expected 2 scores by example, as the candidates before had, found 1."
            assert words in fitting.fitted(self.trial, fewer).failure.message
            assert "found none" in fitting.fitted(self.trial, Evaluation({"a": 1.0, "b": 2.0})).failure.message
            assert fitting.fitted(self.trial, self.fine) is self.fine

    def test_gradients(self):
        trial = Trial(0, self.trial.genome, wants=Gradient(("t",), 0, (1.0,)))
        right = Evaluation({"t": 0.5}, gradient=np.ones((1, 2)))
        assert self.fitting.fitted(trial, right) is right
        wrong = [Evaluation({"t": 0.5}), Evaluation({"t": 0.5}, gradient=np.ones((2, 2))), Evaluation({})]
        assert all("expected" in self.fitting.fitted(trial, one).failure.message for one in wrong)


def test_failures_of_errors_with_hostile_texts_are_made():
    class Hostile(BaseException):
        def __str__(self) -> str:
            raise KeyboardInterrupt

        __repr__ = __str__

    found = failed("objective 'f'", Hostile(), 0.0)
    assert found.failure.message == "objective 'f': Hostile: (no text: its __str__ raised KeyboardInterrupt)"


COUNTS = """
import numpy as np
calls = []
def counts(model):
    calls.append(1)
    value = float(model["w"].sum())
    return value, [value] * (3 if len(calls) % 5 else 4)
def threaded(model):
    import threading, time
    tensor = model["w"]
    def write():
        while True:
            threaded.go.wait(); threaded.go.clear()
            tensor.data.add_(1)
            threaded.done.set()
    if not hasattr(threaded, "go"):
        threaded.go, threaded.done = threading.Event(), threading.Event()
        threading.Thread(target=write, name="writer", daemon=True).start()
    return 1.0
def poked(model):
    value = float(model["w"].sum())
    threaded.go.set(); threaded.done.wait(); threaded.done.clear()
    return value
"""


def test_weights_that_a_thread_writes_into_while_another_objective_scores(folder, monkeypatch):
    (folder / "user_counts_tested.py").write_text(COUNTS)
    monkeypatch.delitem(sys.modules, "user_counts_tested", raising=False)
    names = ("threaded", "poked")
    objectives = tuple(objective(name, "call", call=f"user_counts_tested:{name}") for name in names)
    worker = Worker(WorkerSpec(tuple(str(folder / f"{name}.safetensors") for name in "ab"), search=objectives))
    words = "objective 'threaded' left threads behind, and the model was changed (weights: w) while they lived."
    assert all(found.failure.message.startswith(words) for found in worker.measure(trials()))


@pytest.mark.slow
def test_a_run_whose_objective_changes_its_number_of_examples_has_failures_and_is_resumed(folder, monkeypatch):
    (folder / "user_counts_tested.py").write_text(COUNTS)
    monkeypatch.delitem(sys.modules, "user_counts_tested", raising=False)
    record = {
        "name": "counts",
        "models": {"experts": [str(folder / f"{name}.safetensors") for name in "ab"]},
        "objectives": {"search": [{"name": "f", "type": "call", "call": "user_counts_tested:counts"}]},
        "search": {"algorithm": "m2n2", "archive": 4},
        "scoring": {"batch": 2, "in_flight": 2},
        "budget": {"evaluations": 20},
        "runtime": {"pool": "serial"},
        "tracking": {"mlflow": False},
    }
    run = launch(Recipe.model_validate(record), folder / "run")
    again = resume(run, {"budget.evaluations": 30})
    assert again.status()["evaluations"] == 30
    assert 3 <= again.status()["failures"] <= 8
    with Journal.open(folder / "run" / "journal.sqlite") as journal:
        [*messages] = {row.failure.message for row in journal.rows() if row.failure}
    words = "the evaluation does not fit its candidate: f: expected 3 scores by example, as the candidates before had"
    assert messages == [f"{words}, found 4."]


def test_threads_of_our_own_between_two_calls_are_nobodys(caplog):
    surroundings, user = Surroundings(Signals()), User("objective 'f'", foreign=True)
    over = threading.Event()
    threads = [threading.Thread(target=over.wait, name=name, daemon=True) for name in ("merging_0", "left-behind")]
    try:
        with caplog.at_level(logging.WARNING, "ecotone"):
            threads[0].start()  # as the pool that merges large models
            surroundings.before()
            surroundings.after(user)
            assert not caplog.records
            surroundings.before()
            threads[1].start()
            surroundings.after(user)
    finally:
        over.set()
    [said] = [record.getMessage() for record in caplog.records]
    assert "left threads behind (left-behind)" in said
