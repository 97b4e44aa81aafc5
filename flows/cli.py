"""The command line ``rgcp``. Heavy imports happen inside the commands, so that ``--help`` and errors are quick."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from flows import benchmark_cli, operations_cli, people_cli
from flows.prior_cli import app as prior_app
from rgcp_core.errors import RgcpError, UserError

app = typer.Typer(
    name="rgcp",
    help="Restore faces in old and poor photographs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(prior_app, name="prior", help="Priors: list, import, pull, train, look inside.")
app.add_typer(operations_cli.app)
benchmark_cli.mount(app)
people_cli.mount(app)

console = Console(stderr=True, highlight=False)

EXIT_WRONG_CALL, EXIT_STRICT, EXIT_STOPPED = 2, 3, 1


def main() -> None:
    """Entry point: an expected error is one sentence and exit code 2 (wrong call) or 1 (the run stopped)."""
    try:
        app()
    except UserError as error:
        console.print(f"[bold red]Error:[/] {_plain(error)}", soft_wrap=True)
        sys.exit(EXIT_WRONG_CALL)
    except RgcpError as error:
        console.print(f"[bold red]Stopped:[/] {_plain(error)}", soft_wrap=True)
        sys.exit(EXIT_STOPPED)


@app.command()
def restore(
    paths: Annotated[
        list[str], typer.Argument(help="Folders and files with photos, or one address: s3://...", show_default=False)
    ],
    out: Annotated[str, typer.Option(help="Folder or address for the results; the same command again resumes.")],
    prior: Annotated[str, typer.Option(help="Name or folder of the prior.")] = "faces64",
    preset: Annotated[str, typer.Option(help="fast, balanced or paper.")] = "balanced",
    seed: Annotated[int, typer.Option(help="Seed of all random streams.")] = 0,
    detector: Annotated[str, typer.Option(help="auto, offline or facexlib.")] = "auto",
    aligned: Annotated[bool, typer.Option(help="The files are crops framed as the prior's pictures.")] = False,
    aligned_ffhq: Annotated[bool, typer.Option(help="The files are squares aligned as FFHQ is.")] = False,
    domain: Annotated[
        str, typer.Option(help="faces, or any: no faces are looked for; the middle square, or --boxes.")
    ] = "faces",
    boxes: Annotated[
        Path | None, typer.Option(help="With --domain any: CSV with photo,x,y,width,height in pixels.")
    ] = None,
    person: Annotated[
        str | None, typer.Option(help="Restore faces of this known person with the personal prior; auto: anybody's.")
    ] = None,
    people: Annotated[
        Path | None, typer.Option(help="Folder of people; by default RGCP_PEOPLE_DIR, or ./people.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="One setting, e.g. restore.noise_step=120; may be repeated."),
    ] = None,
    keep: Annotated[str, typer.Option(help="What stays: none, albums, or all (also fitted priors).")] = "albums",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    chunk: Annotated[int | None, typer.Option(min=1, help="About how many photos are done together.")] = None,
    runner: Annotated[str, typer.Option(help="local, or processes of a cluster: dask or ray.")] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Processes that dask or ray starts.")] = 1,
    cluster: Annotated[str | None, typer.Option(help="Address of a Dask or Ray cluster that is there.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Local folder to work in, where photos or results are at an address.")
    ] = None,
    watch: Annotated[
        float | None, typer.Option(min=1, help="Look again every so many seconds; do what is new or changed.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Only say what would be done, how long and how much.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Put the finished run under DVC.")] = False,
    strict: Annotated[bool, typer.Option(help="Exit with 3 when any photo or face failed.")] = False,
) -> None:
    """Restore the faces of all photos in PATHS."""
    from flows.run import run_archive, watch_archive  # first: it quiets Prefect before that is imported

    if any("://" in path for path in [*paths, out]) and (dry_run or version or watch is not None):
        raise UserError("--dry-run, --version and --watch work with local folders only, not with addresses.")
    options: dict[str, Any] = {
        "prior": prior,
        "preset": preset,
        "seed": seed,
        "settings": parse_settings([*(setting or []), f"faces.detector={detector}"]),
        "framing": chosen_framing(domain, boxes, aligned, aligned_ffhq),
        "boxes": str(boxes) if boxes else None,
        "person": person,
        "people": str(people) if people else None,
        "keep": keep,
        "device": device,
        "chunk": chunk,
    }
    if dry_run:
        from flows.plan import plan_archive

        plan_archive(paths, Path(out), console, **options)
        return
    if version:
        from tasks.version import add_to_dvc, check_versionable

        check_versionable(Path(out))
    options |= {"runner": runner, "workers": workers, "cluster": cluster, "work": str(work) if work else None}
    if watch is not None:
        watch_archive(paths, Path(out), console, watch, **options)
    counts = run_archive(paths, out, console, **options)
    if version:
        console.print(f"Under DVC; commit {add_to_dvc(Path(out)).dvc_file}", soft_wrap=True)
    if strict and counts.get("failed", 0):
        raise typer.Exit(EXIT_STRICT)


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Write the report of a run again."""
    from rgcp_core.report import write_report

    print(write_report(directory))


@app.command()
def doctor() -> None:
    """Say what is here: priors, weights of other projects, device, Prefect, and what is done without them."""
    from flows.doctor import doctor as examine

    if not examine(Console(highlight=False)):
        raise typer.Exit(EXIT_STOPPED)


@app.command()
def theory(
    prior: Annotated[str, typer.Option(help="Name or folder of the prior whose schedule counts.")] = "faces64",
    damage: Annotated[float, typer.Option(help="Damage as the PSNR of input against original, in dB.")] = 22.0,
    out: Annotated[Path | None, typer.Option(help="Also draw the curves into this PNG.")] = None,
) -> None:
    """Tell what a noise step hides of a damage and what it costs (supplement E)."""
    from flows.theory import print_theory

    print_theory(Console(highlight=False), prior, damage, out)


def chosen_framing(domain: str, boxes: Path | None, aligned: bool, aligned_ffhq: bool) -> str:
    """The framing (see `tasks.job.Job`) that the options ask for."""
    if domain not in ("faces", "any"):
        raise UserError(f"Unknown domain {domain!r}; there are: faces, any.")
    if aligned + aligned_ffhq + (domain == "any") > 1:
        raise UserError("Choose one of --aligned, --aligned-ffhq and --domain any.")
    if domain == "any":
        return "centre" if boxes is None else "boxes"
    if boxes is not None:
        raise UserError("A table of boxes needs --domain any: faces are found without it.")
    return "window" if aligned else "ffhq" if aligned_ffhq else "photos"


def parse_settings(assignments: list[str]) -> dict[str, Any]:
    """``["album.size=8", "seed=1"]`` as a nested dict; values are JSON where they can be, else text."""
    settings: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"Expected a setting as NAME=VALUE, got {assignment!r}.")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        *groups, last = name.split(".")
        target = settings
        for group in groups:
            target = target.setdefault(group, {})
            if not isinstance(target, dict):
                raise UserError(f"The setting {name!r} is given twice in different ways.")
        target[last] = value
    return settings


def _plain(error: Exception) -> str:
    return str(error).replace("[", r"\[")
