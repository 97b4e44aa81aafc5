"""Restore a test set, measure our results and those of other methods in one run, and put them beside the paper's."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import pyarrow as pa
from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from flows.archive import Outcome, archive, prepare
from flows.run_file import code_version
from rgcp_core.benchmark import INPUT, RESTORED, Crops, Framing, References, summarise
from rgcp_core.datasets import Dataset, find_dataset, match_by_name, published
from rgcp_core.errors import UserError
from rgcp_core.images import find_photos
from rgcp_core.manifest import read_table
from rgcp_core.metrics.distribution import ResizeMode
from rgcp_core.prior import Card, find_prior, read_card
from tasks.benchmark import measure, measure_sets, write_benchmark

FOLDER = "benchmark"
"""Where in the run's folder the numbers go."""


class BenchmarkOutcome(NamedTuple):
    """How a benchmark ended."""

    summary: dict[str, Any]
    table: Path
    counts: dict[str, int]
    """Rows of the manifest by status; empty when nothing was restored."""
    task_runs: dict[UUID, int]
    """Task runs that the Prefect API should know, by flow run."""


@dataclass(frozen=True)
class Plan:
    """A benchmark whose inputs have been checked."""

    dataset: Dataset
    card: Card
    crops: Crops
    references: References
    reference: Path | None
    methods: Mapping[str, Mapping[str, Path | None]]


def run_name() -> str:
    """Name of a flow run in the UI."""
    return f"benchmark {Path(flow_run.parameters.get('dataset', '?')).name}"


@flow(
    name="benchmark",
    flow_run_name=run_name,
    task_runner=ThreadPoolTaskRunner(max_workers=1),  # type: ignore[arg-type]
    validate_parameters=True,
)
def benchmark(
    dataset: str,
    out: str,
    clean: str | None = None,
    reference: str | None = None,
    album: str | None = None,
    methods: dict[str, str] | None = None,
    prior: str = "faces64",
    preset: str = "balanced",
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    framing: Framing = "ffhq",
    resize_mode: ResizeMode = "bilinear",
    limit: int | None = None,
    restore: bool = True,
    device: str = "auto",
    command: list[str] | None = None,
    person: str | None = None,
    people: str | None = None,
) -> BenchmarkOutcome:
    """Restore a test set and measure everything.

    Args:
        dataset: A protocol's name or a folder of aligned faces.
        out: Folder of the run; the same folder again resumes.
        clean: Folder of the undamaged pictures, under the same names.
        reference: Folder of the set that FID and KID compare with.
        album: Folder of other pictures of the one person whom all faces show; identity is measured against them.
        methods: Folders of other methods' results by name; files are matched by name.
        prior: Name or folder of the prior; it decides the size at which everything is measured.
        preset: fast, balanced or paper.
        seed: Seed of all random streams.
        settings: Single settings in place of the preset's.
        framing: ffhq for FFHQ squares, window for crops framed as the prior's own.
        resize_mode: How FID's network gets its 299 px: bilinear (pytorch-fid) or bicubic-antialias (clean-fid).
        limit: Only the first so many pictures by name.
        restore: False measures the inputs and the other methods only.
        device: auto, cpu, cuda or cuda:N.
        command: The command line, for the run's record.
        person: Known person whose faces are restored with her personal prior; auto: everybody known.
        people: Folder of people; by default RGCP_PEOPLE_DIR or ./people.
    """
    logger = get_run_logger()
    plan = plan_benchmark(dataset, clean, reference, album, methods, prior, framing, limit)
    folder, names = Path(out).absolute(), plan.dataset.pictures
    logger.info("%d pictures of %s into %s", len(names), plan.dataset.folder, folder)
    counts: dict[str, int] = {}
    task_runs: dict[UUID, int] = {}
    with_personal_prior = 0
    columns: dict[str, tuple[Mapping[str, Path | None], Crops]] = {INPUT: (dict(plan.references.inputs), plan.crops)}
    if restore:
        state = archive(
            [inputs_argument(plan, folder)], out, prior, preset, seed, settings, framing,
            device=device, command=command, person=person, people=people, return_state=True,
        )  # fmt: skip
        outcome: Outcome = state.result()
        counts = outcome.counts
        if state.state_details.flow_run_id is not None:
            task_runs[state.state_details.flow_run_id] = outcome.task_runs
        own = plan.crops._replace(framing="window")
        columns[RESTORED] = (restored_faces(folder, plan.references.inputs), own)
        with_personal_prior = len(read_table(folder, ["person"])["person"].drop_null())
    columns |= {name: (pictures, plan.crops) for name, pictures in plan.methods.items()}

    tables = [
        measure.submit(name, pictures, plan.references, crops, plan.crops, device)
        for name, (pictures, crops) in columns.items()
    ]
    sets_of = {
        name: ([path for path in pictures.values() if path], crops) for name, (pictures, crops) in columns.items()
    }
    sets, no_sets = measure_sets.submit(sets_of, plan.reference, plan.crops, resize_mode, device).result()
    faces = pa.concat_tables([table.result() for table in tables])
    run = {
        "prior": plan.card.name,
        "prior_sha256": plan.card.sha256,
        "preset": preset,
        "settings": settings or {},
        "person": person,
        "with_personal_prior": with_personal_prior,
        "seed": seed,
        "framing": framing,
        "size": plan.crops.size,
        "restored": restore,
        "code_version": code_version(),
    }
    summary = {
        "dataset": dataset_facts(plan.dataset),
        "run": run,
        **summarise(faces),
        "distances": sets,
        "distances_unavailable": no_sets,
    }
    rows = published(plan.dataset.name)
    table = write_benchmark.submit(folder / FOLDER, faces, summary, rows, sheet(plan, columns)).result()
    create_markdown_artifact(table.read_text(encoding="utf-8"), key="benchmark", description=str(folder))
    own_id = flow_run.id
    if own_id:
        task_runs[UUID(str(own_id))] = len(tables) + 2
    return BenchmarkOutcome(summary, table, counts, task_runs)


def plan_benchmark(
    dataset: str,
    clean: str | None,
    reference: str | None,
    album: str | None,
    methods: Mapping[str, str] | None,
    prior: str,
    framing: Framing,
    limit: int | None,
) -> Plan:
    """Check all inputs of a benchmark; `UserError` for what would make it pointless."""
    found = find_dataset(dataset, limit)
    card = read_card(find_prior(prior))
    taken = sorted({INPUT, RESTORED} & set(methods or {}))
    if taken:
        raise UserError(f"The names {INPUT} and {RESTORED} are taken; call the method {taken[0]} otherwise.")
    references = References(
        inputs={name: (found.folder / name).absolute() for name in found.pictures},
        clean=match_by_name(found.pictures, Path(clean)) if clean else {},
        album=_pictures(Path(album), "album") if album else (),
    )
    if reference:
        _pictures(Path(reference), "reference set")
    return Plan(
        dataset=found,
        card=card,
        crops=Crops(card.image_size, card.crop_window, framing),
        references=references,
        reference=Path(reference) if reference else None,
        methods={name: match_by_name(found.pictures, Path(folder)) for name, folder in (methods or {}).items()},
    )


def inputs_argument(plan: Plan, folder: Path) -> str:
    """What the archive flow is told to restore: the whole folder, or a list when only a part was asked for."""
    if plan.dataset.total == len(plan.dataset.pictures):
        return str(plan.dataset.folder.absolute())
    listing = folder / ".rgcp" / "inputs.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text("\n".join(str(path) for path in plan.references.inputs.values()), encoding="utf-8")
    return f"@{listing}"


def check_restoration(
    plan: Plan, out: str, prior: str, preset: str, seed: int, settings: dict[str, Any] | None,
    framing: Framing, device: str, person: str | None, people: str | None,
) -> None:  # fmt: skip
    """What the archive flow would refuse, before a server is started."""
    prepare(
        [str(plan.dataset.folder)], out, prior, preset, seed, settings, framing, "albums", device,
        person=person, people=people,
    )  # fmt: skip


def restored_faces(out: Path, inputs: Mapping[str, Path]) -> dict[str, Path | None]:
    """The restored face of every picture, by the hash of the picture; None for one that was not restored.

    One that was refused for its identity counts: leaving the worst out would flatter the method.
    """
    rows = read_table(out, ["photo_sha256", "unit", "status"]).to_pylist()
    units = {row["photo_sha256"]: row["unit"] for row in rows if row["status"] in ("restored", "skipped:identity")}
    faces: dict[str, Path | None] = {}
    for name, path in inputs.items():
        unit = units.get(hashlib.sha256(path.read_bytes()).hexdigest())
        faces[name] = out / "faces" / unit / "restored.png" if unit else None
    return faces


def dataset_facts(dataset: Dataset) -> dict[str, Any]:
    """What the results say about the test set."""
    return {
        "name": dataset.name,
        "title": dataset.protocol.title if dataset.protocol else dataset.name,
        "about": dataset.protocol.about if dataset.protocol else "",
        "count": len(dataset.pictures),
        "total": dataset.total,
        "sha256": dataset.sha256,
    }


def sheet(
    plan: Plan, columns: Mapping[str, tuple[Mapping[str, Path | None], Crops]]
) -> dict[str, tuple[Mapping[str, Path | None], Crops]]:
    """Columns of the sheet of faces: the methods, and the clean pictures at the end."""
    return {**columns, "clean": (plan.references.clean, plan.crops)} if plan.references.clean else dict(columns)


def _pictures(folder: Path, what: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"The {what} {folder} is not a folder.")
    paths = sorted(root / name for root, name in find_photos([folder]))
    if not paths:
        raise UserError(f"No pictures in the {what} {folder}.")
    return paths
