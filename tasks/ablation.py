"""Restore one face of a study under its conditions, and measure the pictures."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from rgcp_core.ablation import Case, Condition, Restored, cell_key, restore_conditions
from rgcp_core.errors import UserError
from rgcp_core.gate import SMALLEST, likeness, refusal
from rgcp_core.images import load_image, save_image, write_atomically
from rgcp_core.metrics import measure_faces
from rgcp_core.metrics.fidelity import psnr
from rgcp_core.metrics.identity import Window
from rgcp_core.prior import Card, Prior, find_prior
from rgcp_core.studies import INPUT, Study
from rgcp_core.study_page import write_study
from tasks.device import pick_device
from tasks.recognise import identity_model
from tasks.units import stage_key

METRICS = ("psnr", "ssim", "lpips_alex", "identity_dlib", "identity_arcface")
"""What a study measures of every picture, against the clean face."""


@task(cache_policy=NO_CACHE)
def restore_cells(
    prior: str, case: Case, conditions: Sequence[Condition], seed: int, folder: Path, device: str, threads: int = 0
) -> list[dict[str, Any]]:
    """Rows of one face and seed, one a condition; pictures that are there under their key are not made again.

    Args:
        prior: name or folder of the prior.
        case: the face.
        conditions: of the study.
        seed: of all draws.
        folder: holds ``<key>/restored.png``, ``anchors.png`` and ``facts.json``.
        device: auto, cpu, cuda or cuda:N.
        threads: of this process, which shares the machine with others; 0 leaves them as they are.
    """
    if threads:
        torch.set_num_threads(threads)
    model = Prior.load(find_prior(prior), pick_device(device))
    keys = [stage_key("cell", cell_key(model, case, condition, seed)) for condition in conditions]
    missing = [i for i, key in enumerate(keys) if not (folder / key / "facts.json").is_file()]
    made = restore_conditions(model, case, [conditions[i] for i in missing], seed)
    for i, restored in zip(missing, made, strict=True):
        write_cell(folder / keys[i], restored)
    measured, reasons = measure_cells(case, [folder / key for key in keys], model.card.crop_window)
    gate = gate_verdicts(case, conditions, [folder / key for key in keys], model.card)
    unavailable = "\n".join(f"{name}: {reason}" for name, reason in reasons.items()) or None
    common = {"face": case.face, "kind": case.kind, "seed": seed, "metrics_unavailable": unavailable}
    rows = [{**common, "condition": INPUT, "series": INPUT, "whole_album": False, **measured[0]}]
    for key, condition, values in zip(keys, conditions, measured[1:], strict=True):
        facts = json.loads((folder / key / "facts.json").read_text(encoding="utf-8"))
        count = None if case.personal is None else len(case.personal)
        whole = condition.anchors == "personal" and condition.anchor_count == count
        what = {"condition": condition.name, "level": condition.level, "series": condition.series}
        verdict = {"refused": gate[key]} if gate else {}
        rows.append({**common, **what, "whole_album": whole, "cell": key, **facts, **values, **verdict})
    return rows


def measure_cells(
    case: Case, folders: Sequence[Path], crop_window: Window
) -> tuple[list[dict[str, float]], dict[str, str]]:
    """Metrics of the input and of each cell against the clean face, and why others are missing.

    An album is measured too: `album_identity`, its mean likeness to the clean face, and `album_psnr_input`, how near it
    is to the damaged one.
    """
    pictures = torch.stack([case.y, *(load_image(folder / "restored.png") for folder in folders)])
    clean = case.clean.expand_as(pictures)
    columns, reasons = measure_faces(pictures, clean=clean, which=METRICS, crop_window=crop_window)
    rows: list[dict[str, float]] = [
        {name: columns[name][i] if name in columns else math.nan for name in METRICS} for i in range(len(pictures))
    ]
    measured: dict[bytes, dict[str, float]] = {}  # several conditions share an album
    for folder, row in zip(folders, rows[1:], strict=True):
        if (folder / "anchors.png").is_file():
            content = (folder / "anchors.png").read_bytes()
            if content not in measured:
                measured[content] = measure_album(case, read_strip(folder / "anchors.png"), crop_window)
            row |= measured[content]
    return rows, reasons


def measure_album(case: Case, album: Tensor, crop_window: Window) -> dict[str, float]:
    """Mean likeness of an album (N,3,H,W) to the clean face, and its PSNR against the damaged one."""
    found = {"album_psnr_input": float(psnr(album, case.y.expand_as(album)).mean())}
    clean = case.clean.expand_as(album)
    columns, _ = measure_faces(album, clean=clean, which=["identity_dlib"], crop_window=crop_window)
    if "identity_dlib" in columns:
        found["album_identity"] = sum(columns["identity_dlib"]) / len(album)
    return found


def gate_verdicts(case: Case, conditions: Sequence[Condition], folders: Sequence[Path], card: Card) -> dict[str, float]:
    """By cell, 1.0 where a run's identity gate would have refused the picture, else 0.0; empty if it cannot judge.

    As in a run, a personal album is compared with the result too; so is that of the stranger, taken for the person.
    """
    if card.image_size < SMALLEST:
        return {}
    try:
        identity = identity_model()
    except UserError:
        return {}
    verdicts = {}
    for condition, folder in zip(conditions, folders, strict=True):
        gate, embeddings = condition.settings.gate, None
        photos = condition.anchors in ("personal", "stranger") and (folder / "anchors.png").is_file()
        if photos:
            embeddings = identity.embed(read_strip(folder / "anchors.png"), card.crop_window)
        found = likeness(load_image(folder / "restored.png"), case.y, embeddings, identity, card.crop_window)
        if photos:
            refused = refusal(found, min_input=gate.min_input_personal, min_album=gate.min_album)
        else:
            refused = refusal(found, min_input=gate.min_input, min_album=None)
        verdicts[folder.name] = float(refused is not None)
    return verdicts


def write_cell(folder: Path, restored: Restored) -> None:
    """Write a cell's files, the facts last: a cell with facts is whole."""
    save_image(restored.picture, folder / "restored.png")
    if restored.anchors is not None:
        save_image(strip(restored.anchors), folder / "anchors.png")
    facts = {"noise_step": restored.noise_step, "loss_start": restored.loss_start, "loss_end": restored.loss_end}
    write_atomically(folder / "facts.json", json.dumps(facts).encode())


def read_strip(path: Path) -> Tensor:
    """Pictures (N,3,H,H) that `strip` put side by side."""
    picture = load_image(path)
    return torch.stack(picture.split(picture.shape[-2], dim=-1))


def strip(pictures: Tensor) -> Tensor:
    """Pictures (N,3,H,W) side by side, (3,H,N*W)."""
    return torch.cat(list(pictures), dim=-1)


@task(cache_policy=NO_CACHE)
def write_page(
    folder: Path, study: Study, rows: pd.DataFrame, run: Mapping[str, Any], cells: Path, cases: Sequence[Case]
) -> Path:
    """Write all files of a study; return its page."""
    return write_study(folder, study, rows, run, cells, cases)
