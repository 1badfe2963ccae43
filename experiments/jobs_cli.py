"""The commands for runs on a Ray cluster: submit, jobs, logs, stop, and resume there."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ecotone.experiments.options import JsonOption, RecipeArgument, SetOption, changes_of, local, print_json, recipe_of
from ecotone.experiments.printing import echo
from ecotone.populations.errors import InputError
from ecotone.populations.secrets import place

if TYPE_CHECKING:
    from ecotone.experiments.jobs import Job, JobServer

ADDRESS = "http://127.0.0.1:8265"  # of the job server, at the near end of a tunnel to the head

JobArgument = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run, as `ecotone jobs` lists it.")]
ServerOption = Annotated[
    str,
    typer.Option(
        "--address",
        metavar="URL",
        envvar="RAY_API_SERVER_ADDRESS",
        help="Address of the cluster's dashboard, often the near end of a tunnel.",
    ),
]
FolderOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        parser=local("--folder"),
        help="Folder to send; by default the checkout that holds the recipe, or its folder.",
    ),
]
EnvironmentOption = Annotated[
    list[str] | None,
    typer.Option("--env", metavar="NAME", help="Pass on this environment variable, e.g. HF_TOKEN. Repeatable."),
]


def submit(
    recipe: RecipeArgument,
    name: Annotated[str | None, typer.Option(help="The run's name; by default the recipe's and the time.")] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The run directory: a URL, or a path on the head (~/ecotone-runs/NAME)."),
    ] = None,
    settings: SetOption = None,
    folder: FolderOption = None,
    environment: EnvironmentOption = None,
    address: ServerOption = ADDRESS,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe on a Ray cluster, as a job on its head. It goes on when this machine disconnects."""
    from ecotone.experiments.jobs import JobServer, Parcel, environment_of
    from ecotone.experiments.keeping import texts_in
    from ecotone.experiments.ready import recipe_file

    chosen = recipe_of(recipe, settings)
    urls = tuple(texts_in(chosen.record()))
    parcel = Parcel(settings or (), folder, environment_of(environment or ()), chosen.runtime.grace, urls=urls)
    named = name or f"{chosen.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    server = JobServer(address)
    _told(server.submit(recipe_file(recipe), named, out, parcel), server, as_json)


def resume(
    run: str,
    settings: list[str],
    folder: Path | None,
    environment: list[str] | None,
    address: str,
    trust: bool,
    as_json: bool,
    accept_changes: bool = False,
) -> None:
    """Go on with a run as another job of a cluster."""
    from ecotone.experiments.jobs import JobServer, Parcel, environment_of

    parcel = Parcel(
        settings,
        folder,
        environment_of(environment or ()),
        _grace(settings),
        accept_changes=accept_changes,
        trust=trust,
    )
    server = JobServer(address)
    _told(server.resume(run, parcel), server, as_json)


def jobs(address: ServerOption = ADDRESS, as_json: JsonOption = False) -> None:
    """List the runs of a cluster, one line for each job. A resumed run has several."""
    from ecotone.experiments import report
    from ecotone.experiments.jobs import JobServer

    found = JobServer(address).jobs()
    if as_json:
        print_json([job.record() for job in found])
    elif not found:
        echo(f"{place(address)} knows no runs: none was submitted since its head was started.")
    else:
        report.console().print(report.jobs_table([job.record() for job in found]))


def logs(
    run: JobArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print new lines until the run ends, or Ctrl-C.")
    ] = False,
    address: ServerOption = ADDRESS,
    as_json: Annotated[bool, typer.Option("--json", help="Print the lines as they were logged.")] = False,
) -> None:
    """Print the log of a run on a cluster."""
    from ecotone.experiments.jobs import JobServer
    from ecotone.experiments.logs import in_words

    server = JobServer(address)
    job = server.job(run)

    def write(line: str) -> None:
        echo(line if as_json else in_words(line))

    if not follow:
        for line in server.logs(job).splitlines():
            write(line)
        return
    try:
        server.follow(job, write)
    except KeyboardInterrupt:
        echo(f"{job.run} goes on. `ecotone stop {job.run}{_option(address)}` stops it.", err=True)
        raise typer.Exit from None
    echo(f"{job.run}: {server.ended(job, 10.0).state}.", err=True)


def stop(
    run: JobArgument,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the run has ended.")] = True,
    address: ServerOption = ADDRESS,
    as_json: JsonOption = False,
) -> None:
    """Stop a run on a cluster. It waits for candidates in flight, journals them, and can be resumed."""
    from ecotone.experiments.jobs import STOPPING, JobServer

    server = JobServer(address)
    job = server.job(run)
    if not job.live:
        raise InputError(f"{run}: it is not running; it has {_ended(job)}.", "`ecotone jobs` lists what is.")
    server.stop(job)
    if wait:
        echo(f"Waiting for {job.run} to journal the candidates in flight ...", err=True)
        job = server.ended(job, 2 * STOPPING)
    if as_json:
        print_json(job.record())
        return
    echo(f"{job.run} is stopping." if job.live else f"{job.run} has {_ended(job)}.")
    echo(f"Go on with: ecotone resume {shlex.quote(job.run)} --address {server.address}")


def is_server(address: str | None) -> bool:
    """True for the address of a job server; False for that of a cluster that this process could join."""
    return address is not None and address.startswith(("http://", "https://"))


def register(app: typer.Typer) -> None:
    """Make the commands part of ``app``."""
    for command in (submit, jobs, logs, stop):
        app.command()(command)


def _grace(settings: list[str]) -> float | None:
    """The grace that a resumed run's settings name, if any. They are checked without its recipe."""
    from ecotone.experiments.recipe import Recipe, check_resumable

    changes = changes_of(settings)
    check_resumable(changes)
    stand_in = Path(__file__).parent / "recipes" / "digits-scratch.yaml"
    checked = Recipe.from_yaml(stand_in, {"runtime.pool": "ray", **changes})
    return checked.runtime.grace if "runtime.grace" in changes else None


def _told(job: Job, server: JobServer, as_json: bool) -> None:
    from ecotone.experiments.jobs import tunnel

    address = server.address
    if server.unguarded():
        echo(
            f"Warning: {address} takes jobs from anybody who reaches it. Start clusters with RAY_AUTH_MODE=token.",
            err=True,
        )
    if as_json:
        print_json({**job.record(), "address": address, "tunnel": tunnel(address)})
        return
    run, option = shlex.quote(job.run), _option(address)
    echo(f"{job.run} is job {job.id} of the cluster; this machine may disconnect. Its directory is {job.out}.")
    for command, text in (
        (f"logs {run} --follow{option}", "print its log"),
        (f"jobs{option}", "show its state"),
        (f"stop {run}{option}", "stop it; it can be resumed"),
        (f"resume {run} --address {address}", "go on"),
        (f"front {shlex.quote(job.out) if '://' in job.out else job.out}", _where(job)),
    ):
        echo(f"  ecotone {command}   # {text}")
    echo(f"The dashboard is at {address}. From another machine: {tunnel(address)}")


def _where(job: Job) -> str:
    return "the front" if "://" in job.out else "the front, on the head"


def _ended(job: Job) -> str:
    words: dict[str, Any] = {"succeeded": "finished", "stopped": "stopped", "failed": "failed"}
    return str(words.get(job.state, job.state))


def _option(address: str) -> str:
    return "" if address == ADDRESS else f" --address {place(address)}"
