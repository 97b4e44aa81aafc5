"""A folder of photos of one person in, a personal prior out."""

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact

from flows.progress import to_ui
from flows.run_file import code_version
from rgcp_core.errors import UserError
from rgcp_core.images import find_photos
from rgcp_core.leave_out import LEFT_OUT
from rgcp_core.metrics.identity import load_identity
from rgcp_core.people import Person, check_name, people_folder
from rgcp_core.personal_album import choose_album
from rgcp_core.prior import find_prior, read_card
from rgcp_core.settings import PERSONAL, ConstrainSettings, load_settings
from tasks.device import pick_device
from tasks.events import stop_work
from tasks.job import Framing
from tasks.personal import (
    PersonalRequest,
    find_faces,
    fine_tune_on_person,
    keep_person,
    measure_left_out,
)
from tasks.recognise import IDENTITY


@flow(name="personal", flow_run_name="personalize {name}")
def personal(
    album_dir: str,
    name: str,
    people: str | None = None,
    prior: str = "faces64",
    preset: str = "balanced",
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    framing: Framing = "photos",
    left_out: int | None = None,
    device: str = "auto",
    replace: bool = False,
) -> Path:
    """Fine-tune a prior to one person; see `prepare` for the parameters. Returns the person's folder."""
    request = prepare(album_dir, name, people, prior, preset, seed, settings, framing, left_out, device, replace)
    logger = get_run_logger()
    stop_work(False)
    try:
        found, unusable = find_faces(request)
        choice = choose_album(found)
        logger.info("%d faces found, %d in the album of %s", len(found), len(choice.album), name)
        for warning in choice.warnings:
            logger.warning(warning)
        constrained = fine_tune_on_person(request, choice)
        measured = measure_left_out(request, choice)
        person = keep_person(request, choice, unusable, constrained, measured)
    except BaseException:
        stop_work()
        raise
    to_ui(create_markdown_artifact, summary(person), key="personal-prior", description=f"Personal prior of {name}")
    return person.folder


def prepare(
    album_dir: str,
    name: str,
    people: str | None = None,
    prior: str = "faces64",
    preset: str = "balanced",
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    framing: Framing = "photos",
    left_out: int | None = None,
    device: str = "auto",
    replace: bool = False,
) -> PersonalRequest:
    """Check all that can be checked before any work.

    Args:
        album_dir: folder of photos of the person; others may be on them.
        name: of the person.
        people: folder of people; by default `RGCP_PEOPLE_DIR` or ./people.
        prior: name or folder of the prior.
        preset: fast, balanced or paper.
        seed: of all random streams.
        settings: single settings in place of the preset's; the group ``personal`` is the fine-tuning, the others are of
            the restorations that it is measured by.
        framing: photos finds the faces; window and ffhq take crops that are aligned already; centre takes the middle
            square of every picture, whatever it shows: the pictures are trusted to show the same.
        left_out: photos to leave out for the measurement; None: as many as the preset says; 0: no measurement.
        device: auto, cpu, cuda or cuda:N.
        replace: whether somebody of that name may be there already.

    Raises:
        UserError: whatever would make the work pointless.
    """
    check_name(name)
    folder = people_folder(people).absolute()
    if (folder / name).exists() and not replace:
        raise UserError(f"{name} is known already: {folder / name}. Use --replace, or another name.")
    if framing == "boxes":
        raise UserError("A personal album needs faces, or pictures whose middle is taken; boxes are for restoring.")
    if framing == "centre" and left_out:
        raise UserError("Leaving photos out measures identity, which only faces have: --domain any does not measure.")
    source = Path(album_dir).absolute()
    if not any(True for _ in find_photos([source])):
        raise UserError(f"There are no photos in {source}.")
    card = read_card(find_prior(prior))
    changes = dict(settings or {})
    own = changes.pop("personal", {})
    chosen = load_settings(preset, card, {**changes, "seed": seed})
    known = set(ConstrainSettings.model_fields)
    if not isinstance(own, dict) or set(own) - known:
        raise UserError(f"Unknown setting in personal: {own}; there are: {', '.join(sorted(known))}.")
    try:
        tuning = ConstrainSettings.model_validate(PERSONAL[preset].model_dump() | own)  # type: ignore[index]
    except ValueError as error:
        raise UserError(f"Unusable settings: {error}") from error
    if tuning.times != "all":
        raise UserError("personal.times must be all: a personal prior serves every noise step.")
    load_identity(IDENTITY)
    pick_device(device)
    return PersonalRequest(
        album_dir=source,
        name=name,
        people=folder,
        prior=prior,
        settings=chosen,
        personal=tuning,
        framing=framing,
        left_out=(0 if framing == "centre" else LEFT_OUT[preset]) if left_out is None else left_out,
        device=device,
        code_version=code_version(),
    )


def summary(person: Person) -> str:
    """What was made, as Markdown."""
    card = person.card
    lines = [f"# {card.name}", "", f"{len(card.album)} faces in the album, prior {card.prior}, preset {card.preset}."]
    lines += [f"- {warning}" for warning in card.warnings]
    lines += ["", "| left out | why |", "|---|---|"]
    lines += [f"| {face.photo} | {face.left_out} |" for face in card.faces if face.left_out is not None]
    if card.leave_out:
        lines += ["", card.leave_out["about"], "", "| | identity |", "|---|---|"]
        lines += [f"| {what} | {value['mean']:.3f} |" for what, value in card.leave_out["identity"].items()]
    return "\n".join(lines)
