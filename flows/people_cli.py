"""``rgcp personalize`` and ``rgcp people``: the people whom a prior was fine-tuned to."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup


class PeopleGroup(TyperGroup):
    """``rgcp people DIR`` is short for ``rgcp people find DIR``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """What is no command's name is a folder."""
        if args and args[0] not in self.commands:
            args = ["find", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=PeopleGroup, no_args_is_help=True)
People = Annotated[Path | None, typer.Option(help="Folder of people; by default RGCP_PEOPLE_DIR, or ./people.")]
console = Console(stderr=True, highlight=False)


def mount(main: typer.Typer) -> None:
    """Put these commands into the command line ``rgcp``."""
    main.command("personalize")(personalize_command)
    main.add_typer(app, name="people", help="People: known ones, those an archive holds, forget one.")


@app.callback()
def people() -> None:
    """People: known ones, those an archive holds, forget one."""


def personalize_command(
    album_dir: Annotated[Path, typer.Argument(help="Folder of photos of the person; others may be on them.")],
    name: Annotated[str, typer.Option(help="Name of the person, for --person.")],
    people: Annotated[
        Path | None, typer.Option(help="Folder of people; by default RGCP_PEOPLE_DIR, or ./people.")
    ] = None,
    prior: Annotated[str, typer.Option(help="Name or folder of the prior.")] = "faces64",
    preset: Annotated[str, typer.Option(help="fast, balanced or paper.")] = "balanced",
    seed: Annotated[int, typer.Option(help="Seed of all random streams.")] = 0,
    aligned: Annotated[bool, typer.Option(help="The files are crops framed as the prior's pictures.")] = False,
    aligned_ffhq: Annotated[bool, typer.Option(help="The files are squares aligned as FFHQ is.")] = False,
    domain: Annotated[
        str, typer.Option(help="faces, or any: the middle square of every picture, e.g. of a cat; for such a prior.")
    ] = "faces",
    measure: Annotated[bool, typer.Option(help="Leave photos out to measure how good it is.")] = True,
    left_out: Annotated[int | None, typer.Option(min=1, help="How many; by default what the preset says.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, e.g. personal.iterations=600; may be repeated.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    replace: Annotated[bool, typer.Option(help="Replace a person of that name.")] = False,
) -> None:
    """Fine-tune a prior to one person, from a folder of photos; then use it with `rgcp restore --person NAME`."""
    from flows.cli import chosen_framing, parse_settings

    run_personal(
        str(album_dir),
        name,
        people=None if people is None else str(people),
        prior=prior,
        preset=preset,
        seed=seed,
        settings=parse_settings(setting or []),
        framing=chosen_framing(domain, None, aligned, aligned_ffhq),
        left_out=left_out if measure else 0,
        device=device,
        replace=replace,
    )


def run_personal(album_dir: str, name: str, **options: Any) -> Path:
    """Run the flow `flows.personal.personal` with a Prefect API for its time; say how it went; return the folder."""
    import flows.run  # noqa: F401  # sets up Prefect's logging, before anything of Prefect is imported
    from flows.personal import personal, prepare, summary
    from flows.progress import stage_bar
    from flows.server import prefect_api
    from rgcp_core.people import load_person

    prepare(album_dir, name, **options)  # a wrong call should not wait for a server
    with prefect_api(), stage_bar(name):
        folder = personal(album_dir, name, **options)
    console.print(summary(load_person(folder.parent, name)), markup=False, soft_wrap=True)
    console.print(f"Person: {folder}; to look at: {folder / 'index.html'}", soft_wrap=True)
    return folder


@app.command("find")
def find_command(
    paths: Annotated[list[Path], typer.Argument(help="Folders and files with photos.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the proposal; the same command again resumes.")],
    prior: Annotated[str, typer.Option(help="Name or folder of the prior that albums are for.")] = "faces64",
    detector: Annotated[str, typer.Option(help="auto, offline or facexlib.")] = "auto",
    aligned: Annotated[bool, typer.Option(help="The files are crops framed as the prior's pictures.")] = False,
    aligned_ffhq: Annotated[bool, typer.Option(help="The files are squares aligned as FFHQ is.")] = False,
    similarity: Annotated[
        float | None, typer.Option(help="Mean cosine from which faces are one person's; see docs/people.md.")
    ] = None,
) -> None:
    """Find the people of an archive and propose an album for each (also: rgcp people DIR --out OUT)."""
    import flows.run  # noqa: F401  # sets up Prefect's logging, before anything of Prefect is imported
    from flows.cli import chosen_framing
    from flows.people import people_archive, prepare_people
    from flows.progress import stage_bar
    from flows.server import prefect_api
    from rgcp_core.clustering import SAME_PERSON
    from rgcp_core.proposal import PAGE, PROPOSAL

    options: dict[str, Any] = {
        "prior": prior,
        "settings": {"faces": {"detector": detector}},
        "framing": chosen_framing("faces", None, aligned, aligned_ffhq),
        "min_similarity": SAME_PERSON if similarity is None else similarity,
    }
    sources = [str(path) for path in paths]
    prepare_people(sources, str(out), **options)  # a wrong call should not wait for a server
    with prefect_api(), stage_bar("people"):
        proposed = people_archive(sources, str(out), **options, command=["rgcp", *sys.argv[1:]])
    counts = proposed.counts
    console.print(f"{counts.get('found', 0)} faces, {len(proposed.clusters)} people with 3 faces or more.")
    for kind in ("no_face", "skipped", "failed"):
        if counts.get(kind):
            console.print(f"{kind}: {counts[kind]}; people.parquet says why.")
    console.print(f"Look at: {out / PAGE}", soft_wrap=True)
    console.print(f"Write names into: {out / PROPOSAL}; then: rgcp people confirm {out}", soft_wrap=True)


@app.command("confirm")
def confirm_command(
    out: Annotated[Path, typer.Argument(help="Folder of the proposal, with names written into proposal.csv.")],
    people: People = None,
    preset: Annotated[str, typer.Option(help="fast, balanced or paper.")] = "balanced",
    seed: Annotated[int, typer.Option(help="Seed of all random streams.")] = 0,
    measure: Annotated[bool, typer.Option(help="Leave photos out to measure how good each is.")] = True,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, e.g. personal.iterations=600; may be repeated.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Personalize those who have a name in the proposal; people who are known already are left as they are."""
    import flows.run  # noqa: F401  # sets up Prefect's logging, before anything of Prefect is imported
    from flows.cli import parse_settings
    from flows.people import confirmed_albums
    from flows.server import prefect_api
    from rgcp_core.errors import UserError
    from rgcp_core.people import people_folder

    folder = people_folder(people)
    prior, albums = confirmed_albums(out, folder)
    failed = []
    with prefect_api():  # one for all
        for name, album in albums.items():
            options: dict[str, Any] = {"prior": prior, "preset": preset, "seed": seed, "device": device}
            options |= {"settings": parse_settings(setting or []), "left_out": None if measure else 0}
            try:
                run_personal(str(album), name, people=str(folder), framing="window", **options)
            except UserError as error:  # this person's photos do not do; the next one's may
                failed.append(f"{name}: {error}")
    if not albums:
        console.print(f"All who have a name are known in {folder} already; forget or rename to begin anew.")
    elif len(failed) < len(albums):
        console.print("Use them with: rgcp restore PHOTOS --out DIR --person auto", soft_wrap=True)
    if failed:
        raise UserError("Not personalized: " + " ".join(failed))


@app.command("list")
def list_command(people: People = None) -> None:
    """List the people who are known."""
    from rich.table import Table

    from rgcp_core.people import list_people, people_folder

    folder = people_folder(people)
    known = list_people(folder)
    table = Table("name", "faces", "prior", "preset", "made")
    for person in known:
        card = person.card
        table.add_row(card.name, str(len(card.album)), card.prior, card.preset, card.created)
    if known:
        Console().print(table)
    else:
        console.print(f"Nobody is known in {folder}.", soft_wrap=True)


@app.command("forget")
def forget_command(
    name: Annotated[str, typer.Argument(help="Name of the person.")],
    people: People = None,
    proposal: Annotated[
        list[Path] | None, typer.Option(help="Also in this OUT of rgcp people DIR; may be repeated.")
    ] = None,
    run: Annotated[list[Path] | None, typer.Option(help="Also in this run's folder; may be repeated.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a person: model, album, embeddings, and rows in the folders that are named."""
    from rgcp_core.forget import check_known, forget_person
    from rgcp_core.manifest import MANIFEST
    from rgcp_core.people import people_folder
    from rgcp_core.report import write_report

    folder, proposals, runs = people_folder(people), proposal or [], run or []
    check_known(folder, name, proposals, runs)
    if not yes:
        places = ", ".join(str(place) for place in [folder / name, *proposals, *runs])
        typer.confirm(f"Remove {name} for good from {places}?", abort=True, err=True)
    removed = forget_person(folder, name, proposals, runs)
    for each in runs:
        if (each / MANIFEST).is_file():
            write_report(each)
    for sentence in removed:
        console.print(f"Removed {sentence}", markup=False, soft_wrap=True)
