"""``rgcp ablate``: a study of the method on faces whose clean pictures are known."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import pandas as pd
from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from prefect.task_runners import ProcessPoolTaskRunner, ThreadPoolTaskRunner
from torch import Tensor

from flows.progress import to_ui
from flows.run_file import code_version
from rgcp_core.ablation import Case
from rgcp_core.benchmark import Crops
from rgcp_core.degrade import KINDS
from rgcp_core.errors import UserError
from rgcp_core.images import find_photos
from rgcp_core.prior import Card, find_prior, read_card
from rgcp_core.studies import STUDIES, Study, StudyName, build_study, conditions_for, damaged_cases, personal_cases
from tasks.ablation import restore_cells, write_page

CELLS = "cells"


class StudyOutcome(NamedTuple):
    """How a study ended."""

    page: Path
    flow_run_id: UUID | None
    task_runs: int
    """Task runs that the Prefect API should know."""


def run_name() -> str:
    """Name of a flow run in the UI."""
    parameters = flow_run.parameters
    return f"ablate {parameters.get('study', '?')} on {Path(parameters.get('data', '?')).name}"


@flow(
    name="ablate",
    flow_run_name=run_name,
    task_runner=ThreadPoolTaskRunner(max_workers=1),  # type: ignore[arg-type]
    validate_parameters=True,
)
def ablate(
    study: StudyName,
    data: str,
    out: str,
    prior: str = "faces64",
    preset: str = "fast",
    seeds: int = 3,
    faces: int | None = None,
    kind: str = "blind",
    damage_seed: int = 0,
    settings: dict[str, Any] | None = None,
    device: str = "auto",
    workers: int = 1,
    command: list[str] | None = None,
) -> StudyOutcome:
    """Restore known faces under conditions that differ in one thing, and judge what the paper says of it.

    Args:
        study: noise-step, guidance-interval, album-size, distortion or presets.
        data: Folder of clean crops framed as the prior's pictures; for album-size, a folder a person.
        out: Folder for the results; the same command again resumes.
        prior: Name or folder of the prior.
        preset: Whose settings hold where the study does not change them.
        seeds: How many seeds each face is restored with.
        faces: Only the first so many faces or people by name.
        kind: How the faces are damaged; distortion tries several.
        damage_seed: Seed of the damage.
        settings: Single settings in place of the preset's.
        device: auto, cpu, cuda or cuda:N.
        workers: Processes at a time.
        command: The command line, for the record.
    """
    logger = get_run_logger()
    plan, cases, card = plan_study(study, data, prior, preset, settings, faces, kind, damage_seed)
    folder = Path(out).absolute()
    names = {case.face for case in cases}
    units = [(case, seed) for case in cases for seed in range(seeds)]
    logger.info("%s: %d faces, %d seeds, %d conditions", study, len(names), seeds, len(plan.conditions))
    threads = max(1, (os.cpu_count() or 1) // workers) if workers > 1 else 0
    futures = [
        restore_cells.with_options(task_run_name=f"{case.face} {case.kind} seed {seed}").submit(
            prior, case, conditions_for(plan, case), seed, folder / CELLS, device, threads
        )
        for case, seed in units
    ]
    rows = pd.DataFrame([row for future in futures for row in future.result()])
    run = {
        "faces": len(names),
        "seeds": seeds,
        "prior": card.name,
        "prior_sha256": card.sha256,
        "size": card.image_size,
        "preset": preset,
        "settings": settings or {},
        "damage_seed": damage_seed,
        "command": shlex.join(command or ["rgcp", "ablate", study]),
        "code_version": code_version(),
    }
    page = write_page(folder, plan, rows, run, folder / CELLS, cases)
    to_ui(create_markdown_artifact, page.read_text(encoding="utf-8"), key=f"study-{study}", description=str(folder))
    return StudyOutcome(page, UUID(str(flow_run.id)) if flow_run.id else None, len(units) + 1)


def on_processes(workers: int) -> Any:
    """The flow with its tasks on so many processes of this machine."""
    if workers == 1:
        return ablate
    return ablate.with_options(task_runner=ProcessPoolTaskRunner(max_workers=workers))  # type: ignore[arg-type]


def plan_study(
    study: StudyName,
    data: str,
    prior: str,
    preset: str,
    settings: dict[str, Any] | None,
    faces: int | None,
    kind: str,
    damage_seed: int,
) -> tuple[Study, list[Case], Card]:
    """Check all inputs of a study and lay it out; `UserError` for what would make it pointless."""
    if study not in STUDIES:
        raise UserError(f"Unknown study {study!r}; there are: {', '.join(STUDIES)}.")
    if kind not in KINDS:
        raise UserError(f"Unknown damage {kind!r}; there are: {', '.join(KINDS)}.")
    card = read_card(find_prior(prior))
    plan = build_study(study, card, preset, settings, kind)
    crops = Crops(card.image_size, card.crop_window, "window")
    folder = Path(data)
    if not plan.people:
        clean = load_faces(folder, crops, faces)
        cases = [case for damage in plan.kinds for case in damaged_cases(clean, damage, damage_seed)]
        return plan, cases, card
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    people = {name: load_faces(folder / name, crops, None) for name in names[:faces]}
    cases = [case for damage in plan.kinds for case in personal_cases(people, damage, damage_seed)]
    return plan, cases, card


def load_faces(folder: Path, crops: Crops, limit: int | None) -> dict[str, Tensor]:
    """Clean crops of a folder by name, in order."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder} with clean faces.")
    paths: Sequence[Path] = sorted(root / name for root, name in find_photos([folder]))[:limit]
    if not paths:
        raise UserError(f"No pictures in {folder}.")
    return {path.stem: crops.load(path) for path in paths}
