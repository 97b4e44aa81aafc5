"""The people of an archive: find all faces, group them, propose albums; personalize those that a person confirmed."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run

from flows.archive import prepare
from flows.inputs import Chunk, chunks, expand, photo_names
from flows.one_run import only_run
from flows.progress import to_ui
from flows.run_file import RUN_FILE, write_run_file
from rgcp_core.clustering import SAME_PERSON
from rgcp_core.errors import UserError
from rgcp_core.metrics.identity import load_identity
from rgcp_core.proposal import PARTS, read_confirmed, write_albums
from tasks.align import align
from tasks.events import stop_work, tell
from tasks.job import Job
from tasks.people import embed, part_file, propose
from tasks.personal import IDENTITY

CHUNK = 16


class Proposed(NamedTuple):
    """What an archive holds."""

    counts: dict[str, int]
    """Rows of people.parquet by status (found, no_face, skipped, failed)."""
    clusters: list[int]
    """Numbers of the clusters that are proposed."""


def flow_name() -> str:
    """Name of a flow run in the UI."""
    return f"people of {Path((flow_run.parameters.get('paths') or ['?'])[0]).name}"


@flow(name="people", flow_run_name=flow_name)
def people_archive(
    paths: list[str],
    out: str,
    prior: str = "faces64",
    settings: dict[str, Any] | None = None,
    framing: str = "photos",
    min_similarity: float = SAME_PERSON,
    chunk: int = CHUNK,
    command: list[str] | None = None,
) -> Proposed:
    """Find the people of an archive and propose an album for each; see `prepare_people` for the parameters.

    The same call again resumes; new photos are added, and what was written into the proposal stays.
    """
    job, card = prepare_people(paths, out, prior, settings, framing, min_similarity)
    logger, inputs = get_run_logger(), expand(paths)
    stop_work(False)
    keys: list[str] = []
    counts: Counter[str] = Counter()
    with only_run(job.out):
        total = sum(1 for _ in photo_names(job.base, inputs))
        write_run_file(job, card, paths, command or [], photos=total)
        done = 0
        try:
            for photos in chunks(job, card, photo_names(job.base, inputs), chunk):
                keys.append(photos.key)
                if not is_finished(job, photos):
                    embed(job, photos.key, align(job, photos.photos))
                counts += statuses(job, photos)
                done += len(photos.photos)
                tell("people", "finding faces", done / total)
            clusters = propose(job, keys, min_similarity)
        except BaseException:
            stop_work()
            raise
        drop_other_parts(job, keys)
        write_run_file(job, card, paths, command or [], photos=total, counts=dict(counts), clusters=clusters)
    logger.info("%d faces, %d people proposed", counts["found"], len(clusters))
    text = f"{counts['found']} faces, {len(clusters)} people proposed: {job.out / 'index.html'}"
    to_ui(create_markdown_artifact, text, key="people", description="People of an archive")
    return Proposed(dict(counts), clusters)


def prepare_people(
    paths: Sequence[str],
    out: str,
    prior: str = "faces64",
    settings: dict[str, Any] | None = None,
    framing: str = "photos",
    min_similarity: float = SAME_PERSON,
) -> tuple[Job, Any]:
    """Check all that can be checked before any work.

    Args:
        paths: folders and files; ``@FILE`` names a file with one path a line.
        out: folder for the proposal.
        prior: whose crops the albums are for.
        settings: single settings; only those of ``faces`` count. Faces may be finer than the prior: an album is
            reduced to its size.
        framing: photos finds the faces; window and ffhq take crops that are aligned already.
        min_similarity: see `rgcp_core.clustering.cluster_faces`.

    Raises:
        UserError: whatever would make the work pointless.
    """
    if framing not in ("photos", "window", "ffhq"):
        raise UserError(f"People have faces: expected the framing photos, window or ffhq, got {framing!r}.")
    if not 0 < min_similarity < 1:
        raise UserError(f"Expected a similarity between 0 and 1, got {min_similarity}.")
    chosen = dict(settings or {})
    chosen["faces"] = {"max_enlargement": 1e6, **chosen.get("faces", {})}
    load_identity(IDENTITY)
    return prepare(paths, out, prior, "balanced", 0, chosen, framing)  # type: ignore[arg-type]


def is_finished(job: Job, photos: Chunk) -> bool:
    """Whether a chunk is done, with nothing in it that may succeed now."""
    return part_file(job, photos.key).is_file() and not statuses(job, photos)["failed"]


def statuses(job: Job, photos: Chunk) -> Counter[str]:
    """Rows of a chunk by status."""
    column = pq.read_table(part_file(job, photos.key), columns=["status"])["status"]
    return Counter(status.partition(":")[0] for status in column.to_pylist())


def drop_other_parts(job: Job, keys: Sequence[str]) -> None:
    """Remove parts of an earlier call with other photos or settings."""
    for part in (job.out / PARTS).glob("*.parquet"):
        if part.stem not in keys:
            part.unlink()


def confirmed_albums(out: Path, people: Path) -> tuple[str, dict[str, Path]]:
    """The prior that the crops are for, and an album folder for each person confirmed who is not in ``people`` yet.

    Raises:
        UserError: nothing is confirmed, or the proposal cannot be used.
    """
    confirmed = read_confirmed(out)
    folders = write_albums(out, confirmed)
    prior = json.loads((out / RUN_FILE).read_text(encoding="utf-8"))["prior_argument"]
    return prior, {name: folder for name, folder in folders.items() if not (people / name).exists()}
