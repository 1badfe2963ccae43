"""The command line. The commands import heavy packages themselves, so that ``--help`` and ``status`` answer at once."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

# The manager's small matrix products gain nothing from threads; workers set torch's own number.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# How torch's threads wait (see fitness/__init__.py); must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import typer

from ecotone.experiments import caching_cli, check_cli, jobs_cli, logs, one_shot_cli, statistics_cli
from ecotone.experiments.options import (
    JsonOption,
    RecipeArgument,
    RunArgument,
    SetOption,
    TrustOption,
    WhereOption,
    Word,
    changes_of,
    local,
    print_json,
    recipe_of,
    say,
    users_code,
)
from ecotone.experiments.printing import echo
from ecotone.populations import arguments, sealed, secrets
from ecotone.populations.errors import EcotoneError, InputError, JournalError, sentence
from ecotone.populations.files import written_whole

if TYPE_CHECKING:
    from ecotone.experiments.logs import Watcher
    from ecotone.experiments.recipe import Recipe
    from ecotone.experiments.runs import Run
    from ecotone.experiments.tracking import MirrorReport
    from ecotone.experiments.tracking.mlflow.model_registry import Registrar

app: typer.Typer = typer.Typer(
    name="ecotone",
    help="Search for the best merges of fine-tuned models: evolutionary, on Ray, tracked in MLflow, resumable.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

PreferenceOption = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT", help='Weights of the objectives, as "a=0.7,b=0.3", or scores to reach, as "at:a=0.9,b=0.8".'
    ),
]
ReferenceOption = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help='Measure hypervolumes from this point, e.g. "a=0.2,b=0.1".'),
]
WorkersOption = Annotated[
    int | None, typer.Option(min=0, help="Number of Ray workers; 0 scores in this process. Overrides runtime.workers.")
]
AcceptOption = Annotated[
    bool,
    typer.Option(
        "--accept-changes",
        help="Go on although models, code or data have changed since the run began. The run and its exports say so.",
    ),
]
AddressOption = Annotated[
    str | None, typer.Option(help="Address of a Ray cluster to run on. Overrides runtime.address.")
]


_EVERY = 5.0  # seconds between two looks of `status --watch`


class LogFormat(str, Enum):
    """How `run` and `resume` report while they search."""

    text = "text"
    json = "json"


ResumedFolderOption = Annotated[
    Path | None,
    typer.Option(
        "--folder",
        metavar="DIR",
        parser=local("--folder"),
        help="Folder of Python modules that the recipe names. With the address of a dashboard: the folder to send.",
    ),
]
LogOption = Annotated[
    LogFormat, typer.Option("--log", help="text: a line of progress; json: one event per line on stdout, and no table.")
]


class ExportFormat(str, Enum):
    """The formats that `export` writes."""

    checkpoint = "checkpoint"
    lora = "lora"
    mergekit = "mergekit"


@app.command()
def run(
    recipe: RecipeArgument,
    out: Annotated[
        str | None, typer.Option(help="The run directory, a path or a URL; by default a new one under runs/.")
    ] = None,
    settings: SetOption = None,
    workers: WorkersOption = None,
    address: AddressOption = None,
    log: LogOption = LogFormat.text,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe: prepare, search, score the front on held-out data, and print the results.

    Ctrl-C stops cleanly. `ecotone resume` goes on from there.
    """
    from ecotone.experiments.running import launch, new_directory

    if jobs_cli.is_server(address):
        raise InputError(
            f"--address: expected that of a Ray cluster, found a dashboard's, {address}.", "ecotone submit"
        )
    chosen = recipe_of(recipe, settings, workers, address)
    if not chosen.objectives.search:
        raise InputError(
            "objectives.search: a run scores merges, found no objective to score by.",
            f"Without scores: ecotone merge {shlex.quote(str(recipe))} --to DIR",
        )
    target = str(new_directory(chosen.name)) if out is None else secrets.take(out) if "://" in out else out

    def work(watcher: Watcher) -> Run:
        return launch(chosen, target, observe=watcher, notify=watcher.say)

    _drive(chosen, target, work, log, as_json)


@app.command()
def resume(
    run: RunArgument,
    settings: SetOption = None,
    workers: WorkersOption = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Address of a Ray cluster to run on, or of its dashboard (http://...) to go on there, as a job."
        ),
    ] = None,
    folder: ResumedFolderOption = None,
    environment: jobs_cli.EnvironmentOption = None,
    accept_changes: AcceptOption = False,
    trust: TrustOption = False,
    log: LogOption = LogFormat.text,
    as_json: JsonOption = False,
) -> None:
    """Go on with a run that was stopped or killed. No finished evaluation is ever repeated.

    You may set fields of runtime, tracking and budget anew, e.g. --set budget.evaluations=5000 to search longer. With
    the http:// address of a cluster's dashboard the run goes on there, as a job; RUN may then be its name there.
    """
    if address is not None and jobs_cli.is_server(address):
        changed = [*(settings or []), *([] if workers is None else [f"runtime.workers={workers}"])]
        jobs_cli.resume(run, changed, folder, environment, address, trust, as_json, accept_changes)
        return
    if environment:
        raise InputError("--env: expected with the http:// address of a cluster's dashboard, found without.")
    from ecotone.experiments.gate import check_claim, resumable
    from ecotone.experiments.recipe import Recipe
    from ecotone.experiments.running import resume as resume_run
    from ecotone.experiments.words import wrote
    from ecotone.populations import facts

    try:
        found = _run(run)
    except JournalError as error:
        if Path(run).exists():
            raise
        cluster = f"A run on a cluster: `ecotone resume {shlex.quote(run)} --address http://HEAD:8265`."
        raise JournalError(error.message, f"{error.remedy} {cluster}") from error
    changes = changes_of(settings, workers, address)
    check_claim(found.where)
    with found.journal() as journal:
        resumable(journal, found.where, changes, trust)  # what is trusted is told when the run goes on
        recorded, written_by = journal.fact(facts.RECIPE) or {}, wrote(journal)
    chosen = Recipe.read_back(recorded, written_by, changes)
    added = () if folder is None else (str(folder.resolve()),)

    def work(watcher: Watcher) -> Run:
        return resume_run(
            found,
            changes,
            accept_changes=accept_changes,
            observe=watcher,
            notify=watcher.say,
            trust=trust,
            folders=added,
        )

    _drive(chosen, found.where, work, log, as_json)


@app.command()
def validate(
    recipe: RecipeArgument,
    settings: SetOption = None,
    headers: Annotated[
        bool, typer.Option("--headers", help="Read only the models' headers; merge and score nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check a recipe against its functions and its models, and score one model on one example of each task.

    `ecotone run` makes the same checks before it spends any of the budget.
    """
    from ecotone.experiments import report
    from ecotone.experiments.checks import validate as check
    from ecotone.experiments.compose import python_paths

    chosen = recipe_of(recipe, settings)
    python_paths((str(recipe.parent.resolve()),))
    with users_code():
        findings = [(finding.subject, finding.text) for finding in check(chosen, headers=headers)]
    if as_json:
        print_json({"valid": True, "signature": chosen.signature, "findings": dict(findings)})
        return
    out = report.console()
    out.print(report.lines(findings))
    out.print("The recipe is valid.")


@app.command("recipe")
def recipe_fields(
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a whole recipe.")] = False,
    explain: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Explain one field, by its dotted path, e.g. search.archive.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Explain the fields of a recipe: type, default and meaning of each, or of one."""
    from ecotone.experiments import fields

    if schema and explain is not None:
        raise InputError("--explain: expected without --schema, found both.", "Leave one out.")
    if schema:
        print_json(fields.schema())
        return
    texts = fields.everything() if explain is None else fields.explained_path(explain)
    if as_json:
        print_json([vars(text) for text in texts])
        return
    for text in texts:
        echo(str(text))


@app.command()
def plugins(as_json: JsonOption = False) -> None:
    """List the algorithms, operators and other kinds that recipes can name, with the package of each.

    Packages of your own add kinds by entry points. A kind that cannot be used is listed with the reason.
    """
    from ecotone.experiments import report
    from ecotone.experiments.plugins import origins

    kinds = origins()
    if as_json:
        print_json([vars(kind) for kind in kinds])
        return
    report.console().print(report.plugins_table(kinds))


@app.command()
def status(
    run: RunArgument,
    watch: Annotated[
        bool, typer.Option("--watch", help="Print the state every few seconds, until the run ends.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the state of a run, also while it is running."""
    from ecotone.experiments import report

    if as_json and watch:
        raise InputError("--watch: expected without --json, found both.", "Leave one out.")
    known = _status(run)
    if as_json:
        print_json(known)
        return
    out = report.console()
    out.print(report.status_table(known))
    while watch and known["state"] in ("starting", "running"):
        time.sleep(_EVERY)
        known = _status(run)
        out.print()
        out.print(report.status_table(known))


def _status(run: str) -> dict[str, Any]:
    from ecotone.experiments.tracking.watching import shown

    found = _opened(run)
    known = found.status()
    return {**known, "tracking": shown(found.directory, found.where, known)}


@app.command()
def front(
    run: RunArgument,
    preference: PreferenceOption = None,
    reference: ReferenceOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the Pareto front, the best first, with scores on search and held-out data.

    A preference marks the member that fits it best. If the search predicted its front, prediction and result are shown.
    """
    from ecotone.experiments import report
    from ecotone.experiments.preferences import choose_member, reference_numbers

    opened = _run(run)
    choice = None if preference is None else choose_member(opened, preference)
    volume = opened.hypervolume({} if reference is None else reference_numbers(reference, opened.goals))
    if as_json:
        print_json(report.front_record(opened, volume, choice))
        return
    members, out = opened.front_or_explain(), report.console()
    out.print(report.front_table(opened, members, None if choice is None else choice.member.id))
    for part in report.search_report(opened.report() or {}, opened.goals):
        out.print(part)
    notes = (*report.start_lines(opened), *report.accepted_lines(opened))
    for text in (*report.front_lines(opened, volume, choice), *notes):
        out.print(text, soft_wrap=True)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Run directories, or MLflow run ids.")],
    reference: ReferenceOption = None,
    reach: Annotated[
        str,
        typer.Option(metavar="HV", help="Show the cost to reach this hypervolume, or this share of the best run's."),
    ] = "90%",
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", parser=local("--html"), help="Also write a page that works offline.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the fronts of runs with the same objectives: hypervolume, distance to the best front, cost."""
    from ecotone.experiments import report
    from ecotone.experiments.compare import compare as compare_runs

    comparison = compare_runs([_run(named) for named in runs], reference, reach)
    if html is not None:
        from ecotone.experiments.pages import write

        write(comparison, html)
    if as_json:
        print_json({**comparison.record(), **({} if html is None else {"html": str(html)})})
        return
    out = report.console()
    for table in report.comparison_tables(comparison):
        out.print(table)
    for text in report.comparison_lines(comparison):
        out.print(text, soft_wrap=True)
    if html is not None:
        out.print(f"The page is {html}: open it in any browser.", soft_wrap=True)


@app.command()
def export(
    run: RunArgument,
    to: Annotated[
        Path,
        typer.Option(
            metavar="DIR", parser=local("--to"), help="A new directory, or a path that ends in .safetensors (or .yaml)."
        ),
    ],
    member: Annotated[
        str | None, typer.Option(help="Number of a member, as `front` lists it, or 'best', the default.")
    ] = None,
    preference: PreferenceOption = None,
    register: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Also register it as a version of this MLflow model; above 2 GiB, without weights."
        ),
    ] = None,
    alias: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --register: an alias of that version, e.g. champion.")
    ] = None,
    kind: Annotated[
        ExportFormat,
        typer.Option(
            "--format",
            help="checkpoint: the weights; lora: a merge of adapters as an adapter of their base; mergekit: a YAML "
            "file from which mergekit makes the weights.",
        ),
    ] = ExportFormat.checkpoint,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="With lora: cut the update of each module to this rank; the error is shown."),
    ] = None,
    snap: Annotated[
        bool, typer.Option("--snap", help="With mergekit: move split points inside tensors to tensor borders.")
    ] = False,
    accept_changes: AcceptOption = False,
    folder: WhereOption = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a member's weights as a checkpoint, with a model card and the record for `verify`."""
    from ecotone.experiments.exports import export as export_member

    opened = _run(run)
    trial = opened.trial(_wanted_member(opened, member, preference))
    if rank is not None and kind is not ExportFormat.lora:
        raise InputError(f"--rank: expected --format lora with it, found --format {kind.value}.")
    if snap and kind is not ExportFormat.mergekit:
        raise InputError(f"--snap: expected --format mergekit with it, found --format {kind.value}.")
    word = Word(trust, tuple(str(one.resolve()) for one in folder or ()), accept_changes)
    if kind is not ExportFormat.checkpoint:
        if register or alias:
            raise InputError(f"--register: expected --format checkpoint with it, found --format {kind.value}.")
        if kind is ExportFormat.lora:
            _export_lora(opened, trial.number, to, rank, word, as_json)
        else:
            _export_mergekit(opened, trial.number, to, snap, word, as_json)
        return
    registrar = _registrar(opened, register, alias, trust)
    with users_code():
        path = export_member(opened, trial.number, to, **word.options())
    version = registrar.register(path) if registrar else None
    if as_json:
        registered = {} if version is None else {"registered": vars(version)}
        print_json({"member": trial.number, "path": str(path), **registered})
        return
    echo(f"Member {trial.number} is in {path}. Check it with: ecotone verify {shlex.quote(str(path))}")
    if version is not None:
        where = "" if version.uploaded else f" Its weights are too large to upload and stay in {path}."
        echo(f"MLflow has it as {version.uri}, version {version.version} of {version.name}.{where}")


def _export_lora(run: Run, member: int, to: Path, rank: int | None, word: Word, as_json: bool) -> None:
    from ecotone.experiments import report
    from ecotone.experiments.exports import export_lora

    with users_code():
        found = export_lora(run, member, to, rank, **word.options())
    merged = found.adapter
    if as_json:
        print_json({"member": member, "path": str(to), **found.record()})
        return
    echo(f"Member {member} is in {to}, an adapter. Check it with: ecotone verify {shlex.quote(str(to))}")
    for note in merged.notes:
        echo(note)
    if not merged.exact:
        worst = sorted(merged.errors.items(), key=lambda item: -item[1])
        report.console().print(report.lines([(name, f"relative error {error:.3g}") for name, error in worst]))
    if found.scores is not None:
        echo("The adapter is not the member itself. It scores:")
        report.console().print(report.lines(_score_rows(found.scores)))


def _export_mergekit(run: Run, member: int, to: Path, snap: bool, word: Word, as_json: bool) -> None:
    from ecotone.experiments import report
    from ecotone.experiments.exports import export_mergekit, rescored

    with users_code():
        merge = export_mergekit(run, member, to, snap, **word.options())
        scores = rescored(run, merge.genome, trust=word.trust, folders=word.folders) if merge.snap else {}
    if as_json:
        moved = {} if merge.snap is None else {"snap": str(merge.snap), "scores": scores}
        print_json({"member": member, "path": str(to), "notes": merge.notes, **moved})
        return
    echo(f"Member {member} is in {to}. Make it with: {merge.command(to)}")
    for note in merge.notes:
        echo(note)
    if merge.snap is not None:
        echo(f"The file is not the member itself: {merge.snap}. It scores:")
        report.console().print(report.lines(_score_rows(scores)))


def _score_rows(scores: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str]]:
    return [(f"{subset} {name}", f"{score:.6f}") for subset, each in scores.items() for name, score in each.items()]


@app.command("import-mergekit")
def import_mergekit(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            parser=local("FILE"),
            help="A configuration of mergekit-evolve, or a merge of mergekit with tasks (YAML).",
        ),
    ],
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="RECIPE", parser=local("--to"), help="A new file for the recipe; otherwise it is printed."
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="Number of layers; needed with layer_granularity if the models are not here."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Turn a configuration of mergekit-evolve, or a merge with tasks, into a recipe. Its comments say what differs."""
    from ecotone.experiments.mergekit import import_mergekit as imported

    text = imported(file, layers)
    if to is not None:
        if to.exists():
            raise InputError(f"{to}: the file exists.", "Choose another name, or remove it.")
        try:
            written_whole(to, text, exclusive=True)
        except FileExistsError as error:
            raise InputError(f"{to}: the file exists.", "Choose another name, or remove it.") from error
        except OSError as error:
            raise InputError(f"{to}: cannot be written ({error.strerror or error}).") from error
    if as_json:
        print_json({"recipe": text} if to is None else {"path": str(to)})
    elif to is None:
        echo(text, nl=False)
    else:
        echo(f"The recipe is {to}. Read its comments, then: ecotone validate {to}")


@app.command()
def verify(
    path: Annotated[
        Path, typer.Argument(metavar="DIR", parser=local("DIR"), help="A checkpoint that `ecotone export` wrote.")
    ],
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Largest difference that passes; raise it on another kind of device.")
    ] = 1e-6,
    folder: WhereOption = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score an exported checkpoint again, and compare with the recorded scores.

    Of an export that was made elsewhere it lists the functions, files and plug-ins that the record names, and uses them
    with --trust only.
    """
    from ecotone.experiments import report
    from ecotone.experiments.exports import verify as check

    with users_code():
        compared = check(path, trust=trust, folders=tuple(str(one.resolve()) for one in folder or ()), notify=say)
    equal = all(score.difference <= tolerance for score in compared)
    if as_json:
        print_json({"equal": equal, "scores": [vars(score) for score in compared]})
    else:
        rows = [
            (f"{score.subset} {score.objective}", f"recorded {score.recorded:.6f}, found {score.found:.6f}")
            for score in compared
        ]
        out = report.console()
        out.print(report.lines(rows))
        if compared:
            out.print("The scores equal the recorded ones." if equal else "The scores differ.")
        else:
            out.print("It has no recorded scores to compare with. Its weights can be loaded.")
    if not equal:
        raise typer.Exit(1)


@app.command()
def ui(
    run: RunArgument,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port for an embedded store; 0 takes a free one.")] = 5000,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the fronts in a browser.")] = False,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show the fronts of an experiment's searches in MLflow, this run's among them, and where other trackers show it.

    Prints the pages of the tracking server, or serves the embedded store until Ctrl-C.
    """
    from ecotone.experiments import tracking

    found = _run(run)
    known = tracking.statuses(found.directory)
    elsewhere = {name: one["page"] for name, one in known.items() if one["page"]}
    if as_json:
        pages = tracking.ui_pages(found.directory)
        addresses = {"address": pages and pages.view, "run_address": pages and pages.run, "pages": elsewhere}
        print_json({**tracking.status(found.directory), **addresses})
        return
    titles = {name: kind.title for name, kind in tracking.TRACKERS.usable().items()}
    for name, page in elsewhere.items():
        echo(f"{titles.get(name, name)}: {page}")
    if "mlflow" in known or not elsewhere:
        tracking.serve(found.directory, port, open_browser, echo, trust=trust)


@app.command()
def sync(
    run: RunArgument,
    trackers: Annotated[
        list[str] | None,
        typer.Option("--tracker", metavar="NAME", help="Only this one, as mlflow or wandb. Repeatable."),
    ] = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Send the run's trackers everything in its journal that they lack, for example after a server was down."""
    from ecotone.experiments import tracking

    reports = tracking.mirror_all(_run(run).directory, trackers or (), trust=trust, notify=say)
    if as_json:
        print_json({name: vars(report) for name, report in reports.items()})
    failed = {name: report for name, report in reports.items() if report.error is not None}
    for name, report in reports.items():
        if name not in failed and not as_json:
            echo(f"{name} has {report.evaluations} evaluations (run {report.run_id} in {report.uri}).")
    if failed:
        raise EcotoneError("\n".join(_failure(name, report) for name, report in failed.items()))


def _failure(tracker: str, report: MirrorReport) -> str:
    """A line about a tracker that did not get everything."""
    place = f"{report.uri}: " if report.uri else ""
    return f"{tracker}: {place}{sentence(report.error or '')} {report.remedy}".rstrip()


@app.callback(invoke_without_command=True)
def about(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Search for the best merges of fine-tuned models: evolutionary, on Ray, tracked in MLflow, resumable."""
    if version:
        from importlib.metadata import version as installed

        echo(f"ecotone {installed('ecotone')}")
        raise typer.Exit


jobs_cli.register(app)
statistics_cli.register(app)
one_shot_cli.register(app)
check_cli.register(app)
caching_cli.register(app)


def main() -> None:
    """The console script. It prints an error as one clear message, and after a stop the command that goes on."""
    signal.signal(signal.SIGTERM, _as_interrupt)
    arguments.hide()
    secrets.hook()
    try:
        sealed.check()
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except EcotoneError as error:
        _fail(f"error: {error.message}", error.remedy, 1)
    except KeyboardInterrupt:
        _fail("stopped.", "", 130)
    except Exception as error:
        if not hasattr(error, "show"):  # only the parser's own errors about the command line have it
            raise
        error.message = secrets.stripped(str(getattr(error, "message", "")))  # type: ignore[attr-defined]
        error.show()
        sys.exit(getattr(error, "exit_code", 2))


def _as_interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str, remedy: str, code: int) -> NoReturn:
    echo(message, err=True)
    if remedy:
        echo(remedy, err=True)
    sys.exit(code)


def _drive(recipe: Recipe, place: str, work: Callable[[Watcher], Run], log: LogFormat, as_json: bool) -> None:
    """Run ``work`` under a progress line or a log, then print the closing table or its JSON."""
    from ecotone.experiments import report, storage

    try:
        with _watched(recipe, log) as watcher, _stdout_to_stderr():
            finished = work(watcher)
    except KeyboardInterrupt:
        _fail(
            "Stopped.",
            f"Go on with: ecotone resume {shlex.quote(place)}" if storage.begun(place) else "Nothing was recorded yet.",
            130,
        )
    if as_json:
        print_json(finished.status())
        return
    if log is LogFormat.json:
        return
    out = report.console()
    out.print(report.closing_table(finished))
    warnings = report.search_warnings(finished.report() or {})
    for text in (*report.start_lines(finished), *warnings, *report.accepted_lines(finished)):
        out.print(text, soft_wrap=True)
    out.print(f"\nThe run is in {finished.where}. What next:", soft_wrap=True)
    for command, text in (
        ("front", "list the front"),
        *([("ui", "open the run in MLflow")] if recipe.tracking.mlflow else []),
        ("export --to merged --member best", "write the best merge as a checkpoint"),
    ):
        name, _, options = command.partition(" ")
        typed = f"ecotone {name} {shlex.quote(finished.where)} {options}".rstrip()
        out.print(f"  {typed}   # {text}", soft_wrap=True)  # to be copied: never broken


@contextlib.contextmanager
def _watched(recipe: Recipe, log: LogFormat) -> Iterator[Watcher]:
    """An observer of the search: a line on stderr with warnings above it, or events on stdout."""
    from ecotone.experiments import report

    if log is LogFormat.json:
        with logs.streamed(sys.stdout):
            yield logs.Heartbeat()
        return
    console, budget = report.console(to_stderr=True), recipe.budget
    with report.ProgressLine(console, budget.evaluations, budget.seconds) as line, logs.said(line.say):
        yield line


def _wanted_member(run: Run, member: str | None, preference: str | None) -> int | str:
    """The member to export: the one named, or the one that a preference picks."""
    if preference is None:
        return member or "best"
    if member is not None:
        raise InputError("--preference: expected it or --member, found both.", "Leave one out.")
    from ecotone.experiments.preferences import choose_member

    return choose_member(run, preference).member.id


def _registrar(run: Run, name: str | None, alias: str | None, trust: bool) -> Registrar | None:
    """The registrar of an export, if the user wants one. It has checked that MLflow is there."""
    if name is None and alias is None:
        return None
    if name is None:
        raise InputError("--alias: it names a version of a registered model.", "Give --register NAME too.")
    from ecotone.experiments.tracking.mlflow.model_registry import Registrar

    return Registrar(run.directory, name, alias, trust=trust, notify=say)


def _run(named: str) -> Run:
    """The run of a directory, or of an MLflow run id. Refuses a directory that holds statistics and no search."""
    found = _opened(named)
    found.check_search()
    return found


def _opened(named: str) -> Run:
    """The run of a directory, or of an MLflow run id."""
    from ecotone.experiments.runs import Run

    if Path(named).exists() or not _looks_like_id(named):
        return Run(named)
    from ecotone.experiments import tracking

    uri = os.environ.get("MLFLOW_TRACKING_URI") or tracking.default_uri("runs")
    return Run(tracking.find_run_dir(named, uri))


def _looks_like_id(text: str) -> bool:
    return len(text) == 32 and all(c in "0123456789abcdef" for c in text)


def _stdout_to_stderr() -> contextlib.redirect_stdout[Any]:
    """Send the prints of the user's functions to stderr: stdout is for results."""
    return contextlib.redirect_stdout(sys.stderr)


if __name__ == "__main__":
    main()
