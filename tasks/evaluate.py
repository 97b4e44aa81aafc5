"""Measure the restored faces of a chunk."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE

from rgcp_core.images import load_image
from rgcp_core.metrics import measure_faces
from rgcp_core.prior import find_prior, read_card
from tasks.device import pick_device
from tasks.job import Job
from tasks.units import Failure, PhotoFound, units_of

WITHOUT_REFERENCE = ("identity_input_dlib", "identity_input_arcface")
"""What can be measured when nobody knows the undamaged face."""


@dataclass(frozen=True)
class Measurement:
    """Metrics by unit, under the manifest's column names, and why others are missing."""

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    unavailable: str = ""


@task(cache_policy=NO_CACHE)
def evaluate(job: Job, found: Sequence[PhotoFound], failures: dict[str, Failure]) -> Measurement:
    """Compare each restored face with its input: is it still the same person?"""
    units = list(units_of(found, failures))
    if job.stub or not units:
        return Measurement()
    if not job.shows_faces:
        return Measurement(unavailable="identity: these are no faces (--domain any)")
    card = read_card(find_prior(job.prior))
    restored = torch.stack([load_image(job.unit_dir(unit) / "restored.png") for unit in units])
    inputs = torch.stack([load_image(job.unit_dir(unit) / "input.png") for unit in units])
    values, reasons = measure_faces(
        restored, input=inputs, which=WITHOUT_REFERENCE, crop_window=card.crop_window, device=pick_device(job.device)
    )
    metrics = {unit: {name: column[i] for name, column in values.items()} for i, unit in enumerate(units)}
    return Measurement(metrics, "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
