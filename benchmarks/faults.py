"""What goes wrong, and what comes of it: kills, failing disks, damaged journals, hostile files, misbehaving objectives.

    python benchmarks/faults.py                   # or: make faults; minutes on two idle cores. Needs a C compiler.
    python benchmarks/faults.py --only kills disks --kills 40

Each fault is made for real, in a process of its own, on a small search (20 or 240 evaluations of models of 27 numbers):

- kills: SIGKILL at a random moment of a phase: while the run is created, while it searches, while it scores held-out
  data, while a member is exported, and of the process that tracks the run. Then the same command is given again, or
  `resume`, `export`, `sync`. Right is: it goes on, with the digest (the bytes, the number of rows) of a run that
  nothing happened to.
- disks: every write of a run (write, fsync, ftruncate; ``faulty_writes.c``) finds the disk full from there on, fails
  once, or writes half. Right is: one clear error or none, and afterwards the same digest.
- damage: the bytes of a finished journal are changed at a random place. Right is: it is noticed and told in words, or
  all that can be read of it is as before.
- hostile: headers of safetensors files and recipes made to do harm. Right is: one clear error, or for the harmless ones
  among them their value.
- secrets: a search whose tracker, directory and endpoints have passwords in their addresses. Right is: no file, no
  argument of a process and nothing printed has them.
- objectives: each of the kinds of misbehaviour. Right is: no candidate is recorded with another score than from a
  well-behaved objective. Threads that an objective leaves behind may also fail its candidates, and so end the run.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import hostile
import misbehaving
import torch
from materialise import save
from safetensors.torch import save_file
from test_faults import toy_recipe

from ecotone.experiments import exports, running
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.runs import JOURNAL, Run
from ecotone.populations.errors import EcotoneError
from ecotone.populations.journal import Journal
from ecotone.search.manager import Manager

HERE = Path(__file__).parent
SHIM = "ECOTONE_FAULTY_WRITES"  # the variable with the folder of a process that has the library
EVALUATIONS = 20
FAULTS = {"disk full": 1, "input/output error": 2, "short write": 3}
PATIENCE = 120.0  # seconds for a child
SECRETS_PLANTED = ("tests/test_secrets_of_runs.py",)
TRACKER_KILLED = (
    "tests/test_tracking.py::test_killed_in_the_middle_then_mirrored_again",
    "tests/test_trackers.py",
    "tests/test_watching.py",
    *("-k", "killed"),
)


@dataclass
class Tally:
    """How often a fault was made, and what was wrong afterwards."""

    fault: str
    case: str
    tried: int = 0
    wrong: list[str] = field(default_factory=list)
    ended: dict[str, int] = field(default_factory=dict)  # how, in a word, and how often

    def add(self, ending: str, wrong: str | None = None) -> None:
        """Count one."""
        self.tried += 1
        self.ended[ending] = self.ended.get(ending, 0) + 1
        if wrong is not None:
            self.wrong.append(wrong[:300])

    def row(self) -> dict[str, Any]:
        """As plain values."""
        return {**vars(self), "right": self.tried - len(self.wrong)}


# -- children ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ending:
    """How a child ended: ``killed``, ``error`` (an EcotoneError), ``traceback``, or ``done`` with a value."""

    how: str
    value: Any = None


class Child:
    """A function in a forked process. It says which phase it is in, and what came of it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(read)
            _live(work, write)
        os.close(write)
        self._lines = os.fdopen(read, "rb")

    def until(self, phase: str) -> bool:
        """Wait for a phase to begin; False when the child ends before."""
        return any(line.strip() == f"phase {phase}".encode() for line in self._lines)

    def kill(self) -> None:
        """SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)

    def end(self) -> Ending:
        """Wait for the end."""
        last = b""
        for line in self._lines:
            last = line if line.startswith(b"{") else last
        _, status = os.waitpid(self.pid, 0)
        self._lines.close()
        if os.WIFSIGNALED(status):
            return Ending("killed", os.WTERMSIG(status))
        return Ending(**json.loads(last)) if last else Ending("traceback", "it ended without a word")


def _live(work: Callable[[], Any], write: int) -> None:
    """The child's life. Never returns."""

    def say(text: str) -> None:
        os.write(write, f"{text}\n".encode())

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    signal.alarm(int(PATIENCE))
    try:
        with_phases(say)
        ending = {"how": "done", "value": work()}
    except EcotoneError as error:
        ending = {"how": "error", "value": str(error)}
    except BaseException:
        ending = {"how": "traceback", "value": traceback.format_exc()[-600:]}
    say(json.dumps(ending))
    os._exit(0)


def with_phases(say: Callable[[str], None]) -> None:
    """Have this process say when a phase begins."""

    def announced(owner: Any, name: str, phase: str, *, of_class: bool = False) -> None:
        kept = getattr(owner, name)

        def told(*given: Any, **named: Any) -> Any:
            say(f"phase {phase}")
            return kept(*(given[1:] if of_class else given), **named)

        setattr(owner, name, classmethod(told) if of_class else told)

    announced(Journal, "create", "creation", of_class=True)
    announced(Manager, "run", "search")
    announced(running, "_judge", "held out")
    announced(exports, "export", "export")


def forked(work: Callable[[], Any]) -> Ending:
    """What comes of a function in a process of its own."""
    return Child(work).end()


# -- runs ----------------------------------------------------------------------------------------------------


def launched(recipe: Path, out: Path) -> str:
    """The digest of a new run."""
    return str(running.launch(Recipe.from_yaml(recipe), out).status()["digest"])


def gone_on(recipe: Path, out: Path) -> str:
    """The digest after going on with what is there: by `resume` where a run has begun, else by `run`."""
    if (out / JOURNAL).exists():
        return str(running.resume(out).status()["digest"])
    return launched(recipe, out)


def copied(folder: Path, name: str) -> Path:
    """A copy of a folder beside it, new each time."""
    copy = folder.with_name(name)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    return copy


def small(folder: Path, kind: str = "m2n2-dense", **others: Any) -> Path:
    """The recipe of a run of 20 evaluations."""
    return toy_recipe(folder, kind, 0.0, budget={"evaluations": EVALUATIONS}, **others)


# -- kills ---------------------------------------------------------------------------------------------------


def kills(folder: Path, count: int, rng: random.Random) -> Iterator[Tally]:
    """SIGKILL in each phase of a run, and going on from there."""
    recipe = toy_recipe(folder / "kills", "m2n2-dense", 0.0)
    out = recipe.parent / "run"
    began = time.monotonic()
    child = Child(lambda: launched(recipe, out))
    marks = {}
    for phase in ("creation", "search", "held out"):
        if not child.until(phase):
            raise RuntimeError(f"the undisturbed run failed: {child.end()}")
        marks[phase] = time.monotonic()
    undisturbed = child.end()
    marks["end"] = time.monotonic()
    assert undisturbed.how == "done", undisturbed
    print(f"the undisturbed run takes {marks['end'] - began:.2f} s", flush=True)
    for phase, following in (("creation", "search"), ("search", "held out"), ("held out", "end")):
        tally, longest = Tally("kill", phase), 1.2 * (marks[following] - marks[phase])
        for number in range(count):
            out = recipe.parent / f"run-{phase}-{number}".replace(" ", "-")
            child = Child(lambda out=out: launched(recipe, out))  # type: ignore[misc]
            child.until(phase)
            time.sleep(rng.uniform(0, longest))
            child.kill()
            ending = child.end()
            again = forked(lambda out=out: gone_on(recipe, out))  # type: ignore[misc]
            same = again.how == "done" and again.value == undisturbed.value
            tally.add(ending.how, None if same else f"then {again}")
            shutil.rmtree(out, ignore_errors=True)
        yield tally
    yield killed_exports(recipe.parent / "run", count, rng)


def killed_exports(run: Path, count: int, rng: random.Random) -> Tally:
    """SIGKILL while a member is exported: the target has all or nothing, and the next export leaves nothing else."""

    def exported(to: Path) -> dict[str, str]:
        exports.export(Run(run), "best", to)
        return {str(file.relative_to(to)): file.read_bytes().hex() for file in sorted(to.rglob("*")) if file.is_file()}

    tally, place = Tally("kill", "export"), run.parent / "exports"
    began = time.monotonic()
    whole = forked(lambda: exported(place / "whole"))
    longest = time.monotonic() - began
    assert whole.how == "done", whole
    for number in range(count):
        to = place / str(number)
        child = Child(lambda to=to: exported(to))  # type: ignore[misc]
        child.until("export")
        time.sleep(rng.uniform(0, longest))
        child.kill()
        ending, was_there = child.end(), to.exists()
        again = (
            forked(lambda to=to: str(exports.verify(to, folders=(str(run.parent),))))
            if was_there
            else forked(lambda to=to: exported(to))
        )  # type: ignore[misc]
        right = again.how == "done" and (was_there or again.value == whole.value)
        others = [one.name for one in place.iterdir() if one.name not in {"whole", *map(str, range(number + 1))}]
        wrong = (
            None
            if right and (was_there or not others)
            else f"then {again.how} {again.value if again.how != 'done' else ''}, left behind {others}"
        )
        tally.add(ending.how, wrong)
    return tally


# -- disks ---------------------------------------------------------------------------------------------------


def disks(folder: Path) -> Iterator[Tally]:
    """Each write of a small run fails, in each of three ways."""
    shim = ctypes.CDLL(None)
    shim.faulty_count.restype = ctypes.c_long
    recipe = small(folder / "disks")

    def armed(out: Path, at: int, fault: int) -> str:
        shim.faulty_arm(str(out).encode(), ctypes.c_long(at), fault)
        try:
            return launched(recipe, out)
        finally:
            shim.faulty_arm(b"", ctypes.c_long(-1), 0)

    def counted(out: Path) -> list[Any]:
        shim.faulty_arm(str(out).encode(), ctypes.c_long(-1), 0)
        return [launched(recipe, out), shim.faulty_count()]

    undisturbed = forked(lambda: counted(recipe.parent / "run"))
    assert undisturbed.how == "done", undisturbed
    digest, writes = undisturbed.value
    for name, fault in FAULTS.items():
        tally = Tally("disk", name)
        for at in range(writes):
            out = recipe.parent / f"run-{fault}-{at}"
            ending = forked(lambda out=out, at=at, fault=fault: armed(out, at, fault))  # type: ignore[misc]
            again = forked(lambda out=out: gone_on(recipe, out))  # type: ignore[misc]
            wrong = None
            if again.how != "done" or again.value != digest:
                wrong = f"write {at}: {ending}, then {again}"
            elif ending.how == "traceback":
                wrong = f"write {at}: {ending.value}"
            elif ending.how == "error" and "resume" in str(ending.value) and "journal" not in str(ending.value):
                wrong = f"write {at}: advises to resume: {ending.value}"
            tally.add(ending.how, wrong)
            shutil.rmtree(out, ignore_errors=True)
        yield tally


# -- damage --------------------------------------------------------------------------------------------------


def everything(run: Path) -> str:
    """All that can be read of a run, as text."""
    one = Run(run)
    with one.journal() as journal:
        results = [f"{number} {evaluation}" for number, evaluation in journal.evaluations()]
        genomes = [journal.trial(row.number).genome.digest for row in journal.rows(unscored=True)]
        steps = [str(event) for event in journal.events()]
    front = [str(member.record()) for member in one.front()]
    scores = [str(reference.record()) for reference in one.references()]
    return json.dumps([one.status(), results, genomes, steps, front, scores], default=str)


def damage(folder: Path, count: int, rng: random.Random) -> Iterator[Tally]:
    """A byte, or sixteen, of a finished journal changed."""
    recipe = small(folder / "damage", "m2n2")  # all of whose genomes can be read
    assert forked(lambda: launched(recipe, recipe.parent / "run")).how == "done"
    whole = recipe.parent / "run"
    original, before = (whole / JOURNAL).read_bytes(), forked(lambda: everything(whole))
    assert before.how == "done", before
    tally = Tally("damage", "journal, 200 places" if count == 200 else f"journal, {count} places")
    for _ in range(count):
        run = copied(whole, "damaged")
        place, length = rng.randrange(len(original)), rng.choice((1, 16))
        data = bytearray(original)
        for position in range(place, min(place + length, len(data))):
            data[position] ^= rng.randrange(1, 256)
        (run / JOURNAL).write_bytes(data)
        found = forked(lambda run=run: everything(run))  # type: ignore[misc]
        same = found.how == "done" and found.value.replace("/damaged", "/run") == before.value
        ending = "noticed" if found.how == "error" else "harmless" if same else found.how
        tally.add(ending, None if ending in ("noticed", "harmless") else f"bytes from {place}: {found}")
    yield tally


# -- hostile files -------------------------------------------------------------------------------------------


def hostile_files(folder: Path) -> Iterator[Tally]:
    """Headers of safetensors files and recipes that are to be refused, beside some that are to be taken."""
    for name, reader, taken, refused in (
        ("headers", hostile.read_header, hostile.TAKEN_HEADERS, {**hostile.STRICTER, **hostile.REFUSED_HEADERS}),
        ("recipes", hostile.read_recipe, hostile.TAKEN_RECIPES, hostile.REFUSED_RECIPES),
    ):
        suffix = ".safetensors" if name == "headers" else ".yaml"
        for word, files in (("accepted", taken), ("refused", refused)):
            tally = Tally("hostile", f"{name} to be {word}")
            for case, content in files.items():
                found = hostile.outcome(reader, content, folder / f"hostile{suffix}")
                tally.add(found, None if found == word else f"{case}: {found}")
            yield tally


# -- objectives ----------------------------------------------------------------------------------------------


def objectives(folder: Path) -> Iterator[Tally]:
    """Whole searches with a misbehaving objective between two others; every score is compared with a right one."""

    def searched(kind: str | None) -> list[Any]:
        out = folder / "objectives" / f"run-{'well' if kind is None else list(misbehaving.KINDS).index(kind)}"
        middle = "misbehaving:well" if kind is None else misbehaving.call_of(kind)
        calls = {"first": "misbehaving:well", "middle": middle, "last": "misbehaving:well"}
        record = {
            "name": "objectives",
            "models": {"experts": [str(file) for file in experts], "architecture": {"call": "misbehaving:net"}},
            "objectives": {"search": [{"name": name, "type": "call", "call": call} for name, call in calls.items()]},
            "search": {"algorithm": "random"},
            "budget": {"evaluations": EVALUATIONS},
            "runtime": {"pool": "serial"},
            "tracking": {"mlflow": False},
        }
        run = running.launch(Recipe.model_validate(record), out)
        with run.journal() as journal:
            return [row.scores if row.failure is None else None for row in journal.rows()]

    experts = [folder / "objectives" / f"{number}.safetensors" for number in range(2)]
    experts[0].parent.mkdir()
    assert forked(lambda: written_nets(experts)).how == "done"
    right = forked(lambda: searched(None))
    assert right.how == "done", right
    for kind in misbehaving.KINDS:
        tally = Tally("objective", kind)
        found = forked(lambda kind=kind: searched(kind))  # type: ignore[misc]
        if found.how == "error" and kind in misbehaving.MAY_FAIL:
            tally.add("refused", None if "left threads behind" in str(found.value) else str(found.value))
        elif found.how != "done" or len(found.value) != len(right.value):
            tally.add(found.how, str(found))
        else:
            for scores, expected in zip(found.value, right.value, strict=True):
                same = scores is None or scores == expected
                ending = "failed" if scores is None else "scored"
                tally.add(ending, None if same else f"expected {expected}, found {scores}")
        yield tally


def written_nets(files: Sequence[Path]) -> None:
    """Experts of the misbehaving objectives' architecture."""
    for number, file in enumerate(files):
        torch.manual_seed(number)
        save_file(misbehaving.net().state_dict(), file)


# -- what the tests make -------------------------------------------------------------------------------------


def tests(fault: str, case: str, *names: str) -> Tally:
    """A tally of tests that make the fault with whole programs: a tracker killed, secrets planted."""
    tally = Tally(fault, case)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA", "--no-header", *names]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        word, _, name = line.partition(" ")
        if word in ("PASSED", "FAILED", "ERROR"):
            tally.add(word.lower(), None if word == "PASSED" else name)
    if not tally.tried:
        tally.add("not run", done.stdout[-300:])
    return tally


# -- all of it -----------------------------------------------------------------------------------------------


def with_shim(folder: Path) -> None:
    """Start this program anew with the library that makes writes fail."""
    library = folder / "faulty_writes.so"
    compiler = os.environ.get("CC", "cc")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O2", "-o", str(library), str(HERE / "faulty_writes.c"), "-ldl"], check=True
    )
    environment = {**os.environ, SHIM: str(folder), "LD_PRELOAD": str(library)}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=Path(__file__).name)
    parser.add_argument("--kills", type=int, default=20, help="in each phase (default 20)")
    parser.add_argument("--places", type=int, default=200, help="of damaged bytes (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    options = parser.parse_args(arguments)
    if SHIM not in os.environ:
        with_shim(Path(tempfile.mkdtemp(prefix="faults-")))
    folder = Path(os.environ[SHIM])
    os.environ["ECOTONE_CACHE"], os.environ["ECOTONE_KEY_FILE"] = str(folder / "cache"), str(folder / "key")
    del os.environ["LD_PRELOAD"]  # this process has it; those that it starts need not
    sys.path.insert(0, str(folder))
    rows = []
    try:
        for name in options.only:
            for tally in SECTIONS[name](folder, options):
                row = tally.row()
                rows.append(row)
                endings = ", ".join(f"{number} {ending}" for ending, number in sorted(tally.ended.items()))
                print(
                    f"{tally.fault:10} {tally.case:32} {row['right']:4} of {tally.tried:4} right ({endings})",
                    flush=True,
                )
                for wrong in tally.wrong[:3]:
                    print(f"    {wrong}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    save("faults", options, rows)
    if any(row["wrong"] for row in rows):
        sys.exit(1)


SECTIONS: dict[str, Callable[[Path, argparse.Namespace], Iterator[Tally]]] = {
    "kills": lambda folder, options: kills(folder, options.kills, random.Random(options.seed)),
    "disks": lambda folder, options: disks(folder),
    "damage": lambda folder, options: damage(folder, options.places, random.Random(options.seed)),
    "hostile": lambda folder, options: hostile_files(folder),
    "objectives": lambda folder, options: objectives(folder),
    "tracking": lambda folder, options: iter([tests("kill", "tracking", *TRACKER_KILLED)]),
    "secrets": lambda folder, options: iter([tests("secrets", "planted in whole runs", *SECRETS_PLANTED)]),
}

if __name__ == "__main__":
    main()
