"""``rgcp benchmark``, ``rgcp ablate``, ``rgcp degrade`` and ``rgcp explain``; `flows.cli` mounts them."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from rgcp_core.errors import UserError

EXIT_STRICT = 3
console = Console(stderr=True, highlight=False)


def mount(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("benchmark")(benchmark_command)
    app.command("degrade")(degrade_command)
    app.command("explain")(explain_command)
    app.command("ablate")(ablate_command)


def benchmark_command(
    dataset: Annotated[
        str,
        typer.Argument(help="wider-test, lfw-test, webphoto-test, deblur-test, or a folder of aligned faces."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the results; the same command again resumes.")],
    clean: Annotated[Path | None, typer.Option(help="Folder of the undamaged pictures, under the same names.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Folder that FID and KID compare with.")] = None,
    album: Annotated[
        Path | None,
        typer.Option(help="Folder of other pictures of the one person whom all faces show, for identity."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="NAME=DIR: results of another method as files, measured too; may be repeated."),
    ] = None,
    prior: Annotated[str, typer.Option(help="Name or folder of the prior; all is measured at its size.")] = "faces64",
    preset: Annotated[str, typer.Option(help="fast, balanced or paper.")] = "balanced",
    seed: Annotated[int, typer.Option(help="Seed of all random streams.")] = 0,
    framing: Annotated[
        str,
        typer.Option(help="ffhq: squares aligned as FFHQ is; window: crops framed as the prior's pictures."),
    ] = "ffhq",
    resize: Annotated[
        str, typer.Option(help="For FID: bilinear (as pytorch-fid) or bicubic-antialias (as clean-fid).")
    ] = "bilinear",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many pictures by name.")] = None,
    measure_only: Annotated[
        bool,
        typer.Option("--measure-only", help="Do not restore; measure the inputs and the --method folders."),
    ] = False,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="One setting, e.g. restore.noise_step=250; may be repeated."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    person: Annotated[
        str | None, typer.Option(help="Restore faces of this known person with the personal prior; auto: anybody's.")
    ] = None,
    people: Annotated[
        Path | None, typer.Option(help="Folder of people; by default RGCP_PEOPLE_DIR, or ./people.")
    ] = None,
    strict: Annotated[
        bool, typer.Option(help="Exit with 3 when a picture failed or a method shows other people.")
    ] = False,
) -> None:
    """Restore a test set, measure it and other methods' results, and write a table beside the paper's."""
    from flows.cli import parse_settings

    if framing not in ("ffhq", "window"):
        raise UserError(f"Unknown framing {framing!r}; there are: ffhq, window.")
    summary = run_benchmark(
        dataset,
        out,
        console,
        clean=str(clean) if clean else None,
        reference=str(reference) if reference else None,
        album=str(album) if album else None,
        methods=parse_methods(method or []),
        prior=prior,
        preset=preset,
        seed=seed,
        settings=parse_settings(setting or []),
        framing=framing,
        resize_mode=resize,
        limit=limit,
        restore=not measure_only,
        device=device,
        person=person,
        people=str(people) if people else None,
    )
    if strict and not is_sound(summary):
        raise typer.Exit(EXIT_STRICT)


def run_benchmark(dataset: str, out: Path, console: Console, **options: Any) -> dict[str, Any]:
    """Run the benchmark flow with a Prefect API for its time, print its table, and return its summary."""
    import flows.run  # noqa: F401  # sets up Prefect's logging, before anything of Prefect is imported
    from flows.benchmark import BenchmarkOutcome, benchmark, check_restoration, plan_benchmark
    from flows.server import prefect_api, wait_until_recorded

    given = {name: options[name] for name in ("clean", "reference", "album", "methods", "prior", "framing", "limit")}
    plan = plan_benchmark(dataset, **given)  # a wrong call should not wait for a server
    if options["restore"]:
        of_run = ("prior", "preset", "seed", "settings", "framing", "device", "person", "people")
        check_restoration(plan, str(out), **{name: options[name] for name in of_run})
    with prefect_api():
        outcome: BenchmarkOutcome = benchmark(dataset, str(out), **options, command=["rgcp", *sys.argv[1:]])
        for flow_run_id, task_runs in outcome.task_runs.items():
            wait_until_recorded(flow_run_id, task_runs)
    console.print(outcome.table.read_text(encoding="utf-8"), soft_wrap=True, markup=False)
    console.print(f"Table and plots: {outcome.table.parent}", soft_wrap=True)
    return outcome.summary


def is_sound(summary: dict[str, Any]) -> bool:
    """Whether every face of every method was measured and shows the person that it should."""
    return all(
        entry["measured"] == entry["faces"] and entry["identity_check"]["result"] != "failed"
        for entry in summary["methods"].values()
    )


def parse_methods(given: list[str]) -> dict[str, str]:
    """``["GFPGAN=out/gfpgan"]`` as a dict."""
    methods: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise UserError(f"Expected a method as NAME=DIR, got {text!r}.")
        if name in methods:
            raise UserError(f"The method {name} is given twice.")
        methods[name] = folder
    return methods


def degrade_command(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A picture, or a folder of pictures.")],
    out: Annotated[Path, typer.Option(help="Folder for the degraded pictures (PNG).")],
    kind: Annotated[str, typer.Option(help="low_resolution, gaussian_blur, jpeg, blind, old_photo ...")],
    seed: Annotated[int, typer.Option(min=0, help="Seed; each picture's own comes from it and its name.")] = 0,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="A level of that kind, e.g. factor=4; may be repeated.")
    ] = None,
) -> None:
    """Damage clean pictures in a known way; what was done stands in OUT/degradations.json."""
    from flows.cli import parse_settings
    from rgcp_core.datasets import degrade_pictures
    from rgcp_core.degrade import KINDS

    if kind not in KINDS:
        kinds = "\n".join(f"  {name}: {entry.about}" for name, entry in KINDS.items())
        raise UserError(f"Unknown degradation {kind!r}. There are:\n{kinds}")
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("degrading", total=None)
        record = degrade_pictures(
            source,
            out,
            kind,
            seed,
            parse_settings(setting or []),
            on_step=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    count = len(json.loads(record.read_text(encoding="utf-8"))["pictures"])
    console.print(f"{count} pictures in {out}; how each was damaged: {record}", soft_wrap=True)


def explain_command(
    photo: Annotated[Path, typer.Argument(help="A restored photo, below DIR/photos of its run or a copy.")],
    run: Annotated[Path | None, typer.Option(help="The run's folder, for a copy that lies elsewhere.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Tell how a restored photo was made, and the command that makes it again."""
    from rgcp_core.provenance import explain, explanation_lines

    explanation = explain(photo, run)
    if as_json:
        print(json.dumps(asdict(explanation), indent=1, ensure_ascii=False, default=str))
    else:
        print("\n".join(explanation_lines(explanation)))


def ablate_command(
    study: Annotated[str, typer.Argument(help="noise-step, guidance-interval, album-size, distortion or presets.")],
    data: Annotated[Path, typer.Option(help="Clean crops framed as the prior's; for album-size, a folder a person.")],
    out: Annotated[Path, typer.Option(help="Folder for the results; the same command again resumes.")],
    prior: Annotated[str, typer.Option(help="Name or folder of the prior.")] = "faces64",
    preset: Annotated[str, typer.Option(help="Settings where the study does not change them.")] = "fast",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds a face.")] = 3,
    faces: Annotated[int | None, typer.Option(min=1, help="Only the first so many faces or people.")] = None,
    kind: Annotated[str, typer.Option(help="How the faces are damaged; see rgcp degrade.")] = "blind",
    damage_seed: Annotated[int, typer.Option(min=0, help="Seed of the damage.")] = 0,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, e.g. precision=bfloat16; may be repeated.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    workers: Annotated[int, typer.Option(min=1, envvar="RGCP_WORKERS", help="Processes at a time.")] = 1,
) -> None:
    """Study the method on known faces: restore them under conditions that differ in one thing, and judge the claims."""
    import flows.run  # noqa: F401  # sets up Prefect's logging, before anything of Prefect is imported
    from flows.ablation import StudyOutcome, on_processes, plan_study
    from flows.cli import parse_settings
    from flows.server import prefect_api, wait_until_recorded

    settings = parse_settings(setting or [])
    plan_study(study, str(data), prior, preset, settings, faces, kind, damage_seed)  # type: ignore[arg-type]
    with prefect_api():
        outcome: StudyOutcome = on_processes(workers)(
            study, str(data), str(out), prior, preset, seeds, faces, kind, damage_seed, settings, device, workers,
            ["rgcp", *sys.argv[1:]],
        )  # fmt: skip
        if outcome.flow_run_id is not None:
            wait_until_recorded(outcome.flow_run_id, outcome.task_runs)
    console.print(outcome.page.read_text(encoding="utf-8"), soft_wrap=True, markup=False)
    console.print(f"Page, table, plot and pictures: {outcome.page.parent}", soft_wrap=True)
