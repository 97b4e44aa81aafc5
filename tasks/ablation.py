"""Restore one face of a study under its conditions, and measure the pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from rgcp_core.ablation import Case, Condition, Restored, cell_key, restore_conditions
from rgcp_core.images import load_image, save_image, write_atomically
from rgcp_core.metrics import measure_faces
from rgcp_core.prior import Prior, find_prior
from tasks.device import pick_device
from tasks.units import stage_key

METRICS = ("psnr", "ssim", "lpips_alex", "identity_dlib", "identity_arcface")
"""What a study measures of every picture, against the clean face."""


@task(cache_policy=NO_CACHE)
def restore_cells(
    prior: str, case: Case, conditions: Sequence[Condition], seed: int, folder: Path, device: str
) -> list[dict[str, Any]]:
    """Rows of one face and seed, one a condition; pictures that are there under their key are not made again.

    Args:
        prior: name or folder of the prior.
        case: the face.
        conditions: of the study.
        seed: of all draws.
        folder: holds ``<key>/restored.png``, ``anchors.png`` and ``facts.json``.
        device: auto, cpu, cuda or cuda:N.
    """
    model = Prior.load(find_prior(prior), pick_device(device))
    keys = [stage_key("cell", cell_key(model, case, condition, seed)) for condition in conditions]
    missing = [i for i, key in enumerate(keys) if not (folder / key / "facts.json").is_file()]
    made = restore_conditions(model, case, [conditions[i] for i in missing], seed)
    for i, restored in zip(missing, made, strict=True):
        write_cell(folder / keys[i], restored)
    pictures = torch.stack([load_image(folder / key / "restored.png") for key in keys])
    values, reasons = measure_faces(
        pictures, clean=case.clean.expand_as(pictures), which=METRICS, crop_window=model.card.crop_window
    )
    rows = []
    for i, (key, condition) in enumerate(zip(keys, conditions, strict=True)):
        facts = json.loads((folder / key / "facts.json").read_text(encoding="utf-8"))
        row = {"face": case.face, "seed": seed, "condition": condition.name, "level": condition.level}
        row |= {"series": condition.series, "anchors": condition.anchors, "cell": key, **facts}
        row |= {name: column[i] for name, column in values.items()}
        rows.append(row | {"metrics_unavailable": "; ".join(f"{n}: {why}" for n, why in reasons.items()) or None})
    return rows


def write_cell(folder: Path, restored: Restored) -> None:
    """Write a cell's files, the facts last: a cell with facts is whole."""
    save_image(restored.picture, folder / "restored.png")
    if restored.anchors is not None:
        save_image(strip(restored.anchors), folder / "anchors.png")
    facts = {"loss_start": restored.loss_start, "loss_end": restored.loss_end}
    write_atomically(folder / "facts.json", json.dumps(facts).encode())


def strip(pictures: Tensor) -> Tensor:
    """Pictures (N,3,H,W) side by side, (3,H,N*W)."""
    return torch.cat(list(pictures), dim=-1)
