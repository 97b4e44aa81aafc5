"""A folder of photos in, restored photos out: align, album, constrain, restore, paste, evaluate, record."""

import base64
import json
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from prefect import Task, flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from flows.inputs import Chunk, base_folder, chunks, default_chunk, expand
from flows.one_run import only_run
from flows.progress import RunProgress, to_ui
from flows.run_file import code_version, new_run_id, write_run_file
from flows.storage import find_storage
from rgcp_core.compute import check_compiler, computes_natively
from rgcp_core.errors import RgcpError, UserError
from rgcp_core.framing import read_boxes
from rgcp_core.images import find_photos
from rgcp_core.manifest import PARTS, read_table
from rgcp_core.metrics.identity import load_identity
from rgcp_core.people import AUTO, NO_IDENTITY, check_prior, list_people, load_person, people_folder
from rgcp_core.prior import Card, find_prior, read_card
from rgcp_core.settings import load_settings
from tasks.album import album
from tasks.align import align
from tasks.constrain import constrain
from tasks.device import pick_device
from tasks.evaluate import evaluate
from tasks.events import stop_work
from tasks.job import Framing, Job, Keep
from tasks.paste import paste
from tasks.recognise import IDENTITY
from tasks.record import record, record_crashed
from tasks.report import report
from tasks.restore import restore

TASKS_A_CHUNK = 7
FREE_BYTES = 500_000_000  # less than this at the start, and the run would soon stop for want of space


class Outcome(NamedTuple):
    """How a run ended."""

    counts: dict[str, int]
    """Photos, and rows of the manifest by status (restored, no_face, skipped, failed)."""
    report: Path
    task_runs: int
    """Task runs that the Prefect API should know."""


def run_name() -> str:
    """Name of a flow run in the UI: from which folder into which."""
    parameters = flow_run.parameters
    paths = parameters.get("paths") or ["?"]
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"restore {Path(paths[0]).name}{more} into {Path(parameters.get('out', '?')).name}"


@flow(
    name="archive",
    flow_run_name=run_name,
    task_runner=ThreadPoolTaskRunner(max_workers=4),  # type: ignore[arg-type]
    validate_parameters=True,
)
def archive(
    paths: list[str],
    out: str,
    prior: str = "faces64",
    preset: str = "balanced",
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    framing: Framing = "photos",
    keep: Keep = "albums",
    device: str = "auto",
    chunk: int | None = None,
    workers: int = 1,
    command: list[str] | None = None,
    work: str | None = None,
    boxes: str | None = None,
    person: str | None = None,
    people: str | None = None,
) -> Outcome:
    """Restore all faces of all photos.

    Args:
        paths: Folders and files to restore; ``@FILE`` names a file with one path a line. Or one address: s3://...
        out: Folder for the results, or an address; the same again resumes.
        prior: Name or folder of the prior.
        preset: fast, balanced or paper.
        seed: Seed of all random streams.
        settings: Single settings in place of the preset's, e.g. {"restore": {"noise_step": 250}}.
        framing: photos finds the faces; window and ffhq take crops that are aligned already; centre and boxes look for
            no faces but take the middle square of a photo, or the squares that a table names.
        keep: none; albums, the pictures that priors were constrained with; all, the constrained priors as well.
        device: auto, cpu, cuda or cuda:N; stub restores nothing and serves load tests.
        chunk: About how many photos are done together; by default as many as suit the device.
        workers: Chunks under way at a time, for runners with several workers.
        command: The command line, for the run's record.
        work: Local folder to work in, where photos or results are at an address.
        boxes: The table for the framing boxes: CSV with photo,x,y,width,height.
        person: Known person whose faces are restored with her personal prior; auto: everybody known.
        people: Folder of people; by default RGCP_PEOPLE_DIR or ./people.
    """
    logger = get_run_logger()
    storage = find_storage(paths, out, work)
    job, card = prepare(
        *(storage.paths, storage.out, prior, preset, seed, settings, framing, keep, device),
        boxes=boxes,
        person=person,
        people=people,
    )
    precision = job.settings.precision
    if precision == "bfloat16" and not job.stub and not computes_natively(pick_device(job.device), precision):
        logger.warning("This device has no bfloat16 of its own: --set precision=float32 is faster here.")
    size = chunk or default_chunk(job)
    with only_run(job.out):
        storage.begin()
        total = storage.count(job.base)
        write_run_file(job, card, paths, command or [], photos=total)
        logger.info("Run %s: %d photos, prior %s, preset %s, into %s", job.run_id, total, card.name, preset, job.out)
        counts: Counter[str] = Counter()
        keys: set[str] = set()
        task_runs = 0
        in_flight: deque[tuple[Chunk, list[PrefectFuture[Any]]]] = deque()
        stop_work(False)

        def settle_next() -> None:
            photos, futures = in_flight.popleft()
            settle(job, photos, futures, counts, progress)
            storage.store(photos)

        try:
            with RunProgress(total, job.out) as progress:
                for photos in chunks(job, card, storage.names(job.base), size, storage.stamp):
                    keys.add(photos.key)
                    done = finished_chunk(job, photos)
                    if done is not None:
                        storage.store(photos)
                        counts.update(done)
                        progress.finish(photos, done, under_way=False)
                        continue
                    storage.fetch(photos)
                    progress.begin(photos)
                    in_flight.append((photos, submit(job, photos)))
                    task_runs += TASKS_A_CHUNK
                    if len(in_flight) > workers:  # the next chunk's faces are found while this one is restored
                        settle_next()
                while in_flight:
                    settle_next()
        except BaseException:  # a signal, a full disk: tasks under way must not go on for an hour
            stop_work()
            raise
        drop_other_parts(job.out, keys)
        write_run_file(job, card, paths, command or [], photos=total, counts=dict(counts))
        page = report(job.out)
        storage.finish(keys)
        progress.tables()
    show_in_ui(job)
    return Outcome(dict(counts), page, task_runs + 1)


def prepare(
    paths: Sequence[str],
    out: str,
    prior: str = "faces64",
    preset: str = "balanced",
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    framing: Framing = "photos",
    keep: Keep = "albums",
    device: str = "auto",
    create: bool = True,
    boxes: str | None = None,
    person: str | None = None,
    people: str | None = None,
) -> tuple[Job, Card]:
    """Check all that can be checked before any work, and settle the run.

    Raises:
        UserError: whatever would make the run pointless: no such photos, prior, preset or device; K beyond T; an output
            inside the input; no space left.
    """
    inputs = expand(paths)
    find_photos(inputs)  # says at once which path does not exist
    base = base_folder(inputs)
    target = Path(out).absolute()
    if (framing == "boxes") != (boxes is not None):
        raise UserError(f"A table of boxes goes with the framing boxes and no other; got {framing} and {boxes}.")
    table = None if boxes is None else Path(boxes).absolute()
    if table is not None:
        read_boxes(table)  # says at once what is wrong with it
    card = read_card(find_prior(prior))
    chosen = load_settings(preset, card, {**(settings or {}), "seed": seed})
    known = None if person is None else known_people(person, people, card, framing)
    where = pick_device(device)
    if chosen.compiled:
        check_compiler(where)
    for path in inputs:
        source = path.resolve()
        if target.resolve() == source or source in target.resolve().parents:
            raise UserError(
                f"The output {target} lies inside the input {path}: its pictures would be restored again next time. "
                "Choose a folder outside."
            )
        if target.resolve() in source.parents:
            raise UserError(f"The input {path} lies inside the output {target}. Choose another output folder.")
    try:
        if create:
            target.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(next(path for path in (target, *target.parents) if path.exists())).free
    except OSError as error:
        raise UserError(f"The output folder {target} cannot be made: {error.strerror}.") from error
    if free < FREE_BYTES:
        raise UserError(
            f"Only {free / 1e6:.0f} MB are free where {target} is; at least {FREE_BYTES / 1e6:.0f} MB are needed. "
            "Free some space and run the same command again."
        )
    job = Job(
        run_id=new_run_id(),
        base=base,
        out=target,
        prior=prior,
        settings=chosen,
        framing=framing,
        boxes=table,
        person=person,
        people=None if known is None else known.folder,
        people_sha256=None if known is None else known.sha256,
        keep=keep,
        device=device,
        code_version=code_version(),
    )
    return job, card


def check_boxes(table: Path, base: Path) -> None:
    """Refuse a table of boxes that names photos that are not below ``base``."""
    unknown = [photo for photo in read_boxes(table) if not (base / photo).exists()]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UserError(
            f"The table of boxes {table} names photos that are not below {base}: {', '.join(unknown[:3])}{more}. "
            "Expected their paths below that folder."
        )


class Known(NamedTuple):
    """The people whom the faces of a run are compared with."""

    folder: Path
    sha256: str
    """Over all of them: their names and weights."""


def known_people(person: str, people: str | None, card: Card, framing: Framing) -> Known:
    """Check that a run can restore with personal priors.

    Raises:
        UserError: no such person, one made with another prior, nobody at all, or pictures that are not faces.
    """
    folder = people_folder(people).absolute()
    known, faceless = list_people(folder), framing in ("centre", "boxes")
    if person != AUTO:
        named = load_person(folder, person)
        check_prior(named, card.name, card.sha256)
        if faceless != (named.card.identity_network == NO_IDENTITY):
            why = "needs faces: it does not go with" if faceless else "shows no faces: it goes only with"
            raise UserError(f"The album of {person} {why} --domain any.")
    elif faceless:
        raise UserError("Only faces can be recognised: with --domain any name the album instead of auto.")
    elif not any(each.card.prior_sha256 == card.sha256 for each in known):
        raise UserError(
            f"Nobody in {folder} was personalized with the prior {card.name}: rgcp personalize ALBUM_DIR --name NAME."
        )
    load_identity(IDENTITY)
    text = json.dumps([[each.name, each.card.weights_sha256] for each in known])
    return Known(folder, sha256(text.encode()).hexdigest())


def submit(job: Job, photos: Chunk) -> list[PrefectFuture[Any]]:
    """Start the tasks of a chunk, each waiting for those before it; the last one's future is the chunk's."""
    label = photos.label.replace("{", "{{").replace("}", "}}")  # Prefect fills in braces

    def named(task: Task[..., Any]) -> Task[..., Any]:
        return task.with_options(task_run_name=f"{task.name} {label}")

    found: Any = named(align).submit(job, photos.photos)
    futures: list[PrefectFuture[Any]] = [found]
    failures: Any = {}
    for stage in (album, constrain, restore, paste):
        failures = named(stage).submit(job, found, failures)
        futures.append(failures)
    measurement: Any = named(evaluate).submit(job, found, failures)
    return [*futures, measurement, named(record).submit(job, photos.key, found, failures, measurement)]


def settle(
    job: Job,
    photos: Chunk,
    futures: Sequence[PrefectFuture[Any]],
    counts: Counter[str],
    progress: RunProgress,
) -> None:
    """Wait for a chunk and count its rows.

    Settings, disk or memory that fail would fail the next chunk too: they stop the run, and the same command goes on
    from there. Anything else costs this chunk only: its photos are recorded as failed, and the next run tries them
    again.
    """
    futures[-1].wait()
    error = first_error(futures)
    if error is None:
        done = futures[-1].result()
    elif isinstance(error, RgcpError):
        raise error
    elif isinstance(error, OSError | MemoryError):
        raise RgcpError(f"The run stopped: {error}. Put that right and run the same command again.") from error
    else:
        get_run_logger().error("A chunk of %d photos failed: %r", len(photos.photos), error)
        done = record_crashed(job, photos.key, photos.photos, f"{type(error).__name__}: {error}")
    get_run_logger().info("%s: %s", photos.label, ", ".join(f"{number} {kind}" for kind, number in done.items()))
    counts.update(done)
    progress.finish(photos, done)


def first_error(futures: Iterable[PrefectFuture[Any]]) -> BaseException | None:
    """What went wrong first in a chain of tasks; those after it only say that they could not start."""
    for future in futures:
        try:
            result = future.result(raise_on_failure=False)
        except Exception as error:  # the worker is gone, and with it the task's state
            return error
        if isinstance(result, BaseException):
            return result
    return None


def finished_chunk(job: Job, photos: Chunk) -> dict[str, int] | None:
    """Rows by status of a chunk that is done; None if it is not, or if something failed that may succeed now.

    Where constrained priors are to be kept, a chunk that an earlier run finished without them is not done.
    """
    part = job.out / PARTS / f"{photos.key}.parquet"
    if not part.is_file():
        return None
    rows = pq.read_table(part, columns=["status", "unit"]).to_pylist()
    done = Counter(row["status"].partition(":")[0] for row in rows)
    if done["failed"]:
        return None
    if job.keep == "all":
        restored = (row["unit"] for row in rows if row["status"] == "restored")
        if not all(job.delta_file(unit).exists() for unit in restored):
            return None
    return {"photos": len(photos.photos), **done}


def drop_other_parts(out: Path, keys: set[str]) -> None:
    """Remove parts of an earlier run with other photos or settings; the manifest speaks of this run alone."""
    for part in (out / PARTS).glob("*.parquet"):
        if part.stem not in keys:
            part.unlink()


def show_in_ui(job: Job) -> None:
    """Some faces before and after, as an artifact of the flow run."""
    pairs = list(islice(before_and_after(job), 8))
    if pairs:
        lines = ["| photo | before | after |", "|---|---|---|"]
        lines += [f"| {photo} | ![before]({before}) | ![after]({after}) |" for photo, before, after in pairs]
        to_ui(create_markdown_artifact, "\n".join(lines), key="before-after", description="Some restored faces")


def before_and_after(job: Job) -> Iterator[tuple[str, str, str]]:
    """Photo, input and result of restored faces; pictures as data addresses, since the UI cannot read our files."""
    rows = read_table(job.out, ["photo", "unit", "status"]).to_pylist()
    for row in rows:
        if row["status"] == "restored":
            folder = job.unit_dir(row["unit"])
            photo = row["photo"].replace("|", "\\|")
            yield photo, data_url(folder / "input.png"), data_url(folder / "restored.png")


def data_url(picture: Path) -> str:
    """A PNG as an address that carries it."""
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
