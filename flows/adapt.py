"""An archive in, a prior that knows its kind of picture out: the shared warm start."""

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact

from flows.inputs import expand
from flows.progress import to_ui
from rgcp_core.errors import UserError
from rgcp_core.images import find_photos
from rgcp_core.people import check_name
from rgcp_core.prior import Card, find_prior, list_priors, prior_folders, read_card
from rgcp_core.settings import load_settings
from rgcp_core.warm_start import LEAST_DETAIL, WARM_START, choose_clean
from tasks.adapt import AdaptRequest, fine_tune_on_archive, keep_prior, look_at_faces
from tasks.device import pick_device
from tasks.events import stop_work
from tasks.job import Framing

LOOK_AT, MOST = 500, 200


@flow(name="adapt", flow_run_name="adapt {prior} to {name}")
def adapt(
    paths: list[str],
    name: str,
    prior: str = "faces64",
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    framing: Framing = "photos",
    look_at: int = LOOK_AT,
    most: int = MOST,
    least_detail: float = LEAST_DETAIL,
    to: str | None = None,
    device: str = "auto",
    replace: bool = False,
) -> Card:
    """Fine-tune a prior on an archive's own cleaner faces; see `prepare` for the parameters."""
    request = prepare(paths, name, prior, seed, settings, framing, look_at, most, least_detail, to, device, replace)
    logger = get_run_logger()
    stop_work(False)
    try:
        found = look_at_faces(request)
        clean = choose_clean(found, most, least_detail)
        logger.info("%d faces found, %d of the cleaner ones used", clean.found, len(clean.crops))
        card = keep_prior(request, clean, fine_tune_on_archive(request, clean))
    except BaseException:
        stop_work()
        raise
    to_ui(create_markdown_artifact, summary(card), key="adapted-prior", description=f"Prior {name}")
    return card


def prepare(
    paths: list[str],
    name: str,
    prior: str = "faces64",
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    framing: Framing = "photos",
    look_at: int = LOOK_AT,
    most: int = MOST,
    least_detail: float = LEAST_DETAIL,
    to: str | None = None,
    device: str = "auto",
    replace: bool = False,
) -> AdaptRequest:
    """Check all that can be checked before any work.

    Args:
        paths: folders and files of the archive; ``@FILE`` names a file with one path a line.
        name: of the new prior.
        prior: name or folder of the prior to start from.
        seed: of all random streams.
        settings: single settings; those of ``faces`` say which faces are looked at, those of ``warm_start`` are the
            fine-tuning.
        framing: photos finds the faces; window and ffhq take crops that are aligned already; centre takes the middle
            square of every picture, whatever it shows.
        look_at: photos to look at, drawn from all of them.
        most: faces to learn from at most.
        least_detail: see `rgcp_core.warm_start.choose_clean`.
        to: folder of priors to put it in; by default the user's.
        device: auto, cpu, cuda or cuda:N.
        replace: whether a prior of that name may be there already.

    Raises:
        UserError: whatever would make the work pointless.
    """
    folder = (Path(to) if to else prior_folders()[0]).absolute() / check_name(name)
    if folder.exists() and not replace:
        raise UserError(f"There is a prior {name!r} already: {folder}. Use --replace, or another name.")
    if not folder.exists() and name in {card.name for card in list_priors()}:
        raise UserError(f"{name!r} is the name of another prior, which would be hidden; use another name.")
    if framing == "boxes":
        raise UserError("A warm start needs faces, or pictures whose middle is taken; boxes are for restoring.")
    if look_at < 1 or most < 1:
        raise UserError(f"Expected numbers of photos and faces above 0; got {look_at} and {most}.")
    sources = expand(paths)
    if not any(True for _ in find_photos(sources)):
        raise UserError(f"There are no photos in {', '.join(paths[:3])}.")
    card = read_card(find_prior(prior))
    changes = dict(settings or {})
    own = changes.pop("warm_start", {})
    if set(changes) - {"faces"}:
        raise UserError(f"Of the settings only faces.* and warm_start.* count here; got {', '.join(changes)}.")
    try:
        tuning = WARM_START.model_validate(WARM_START.model_dump() | own)
    except (TypeError, ValueError) as error:
        raise UserError(f"Unusable settings: {error}") from error
    if tuning.times != "all":
        raise UserError("warm_start.times must be all: the album and every noise step are drawn with this prior.")
    pick_device(device)
    return AdaptRequest(
        paths=tuple(sources),
        name=name,
        folder=folder,
        prior=prior,
        framing=framing,
        faces=load_settings("balanced", card, changes).faces,
        look_at=look_at,
        most=most,
        least_detail=least_detail,
        tuning=tuning,
        seed=seed,
        device=device,
    )


def summary(card: Card) -> str:
    """What was made, as Markdown."""
    facts = card.training["warm_start"]
    before, after = facts["heldout_loss_before"], facts["heldout_loss_after"]
    lines = [
        f"# {card.name}",
        "",
        f"{facts['prior']}, fine-tuned on {facts['faces_used']} of {facts['faces_found']} faces.",
        f"Denoising error on faces held out: {before:.5f} before, {after:.5f} after ({after / before - 1:+.1%}).",
        "",
        "| left out | faces |",
        "|---|---|",
        *(f"| {reason} | {count} |" for reason, count in facts["left_out"].items()),
    ]
    return "\n".join(lines)
