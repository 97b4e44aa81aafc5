"""How good a personal prior would be for a photo that it has not seen: some of the album are left out and restored."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rgcp_core.compute import computing
from rgcp_core.constrain import Draft, constrain_prior, draft_of
from rgcp_core.degrade import degrade
from rgcp_core.metrics.identity import IdentityModel
from rgcp_core.prior import Prior
from rgcp_core.randomness import stream
from rgcp_core.sampling import generate_album, restore
from rgcp_core.settings import ConstrainSettings, Settings
from rgcp_core.statistics import mean_interval

DAMAGE = "old_photo"
LEFT_OUT = {"fast": 2, "balanced": 3, "paper": 5}
"""Photos left out, by preset. They share one fine-tuning; each has a generative album of its own to compare with."""
REMAINING = 3
"""Photos that must remain to fine-tune on."""

Progress = Callable[[str, float], None]
"""Called with what is being done and its share, 0..1."""


def leave_out(
    prior: Prior,
    album: Tensor,
    identity: IdentityModel,
    *,
    settings: Settings,
    personal: ConstrainSettings,
    count: int,
    name: str,
    generative: bool = True,
    on_progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Leave ``count`` photos out, fine-tune on the rest, restore the damaged left-out ones, and compare identities.

    Args:
        prior: the unmodified prior.
        album: (N,3,S,S) in [-1,1], the person's faces.
        identity: the recognition network that judges.
        settings: of the restoration, and of the generative album it is compared with, at the prior's size.
        personal: of the fine-tuning.
        count: fewer are left out where fewer than 3 would remain.
        name: whose album it is; with the seed it decides every draw.
        generative: whether the generative album is compared too, which costs an album and a fine-tuning a photo.
        on_progress: progress callback.

    Returns:
        ``about`` in words; ``identity``: the mean cosine of the left-out photos with those that remained (none of which
        is the photo itself), with its 95 % bootstrap interval (None for a single photo), for the photos undamaged,
        damaged, and restored with each prior. None when no photo can be left out.
    """
    count = min(count, len(album) - REMAINING)
    if count < 1:
        return None
    seed = settings.seed
    order = torch.randperm(len(album), generator=stream(seed, name, "leave out")).tolist()
    out, rest = sorted(order[:count]), sorted(order[count:])
    tell = on_progress or (lambda stage, share: None)
    device = next(prior.network.parameters()).device
    clean = album[out]
    damaged = torch.stack([degrade(picture, DAMAGE, seed + i).image for i, picture in enumerate(clean)]).to(device)

    def fine_tuned(
        anchors: Tensor,
        constrain: ConstrainSettings,
        unit: str,
        t_end: int | None,
        stage: str,
        draft: Draft | None = None,
    ) -> Prior:
        return constrain_prior(
            prior,
            anchors,
            **constrain.arguments(),
            precision=settings.precision,
            compiled=settings.compiled,
            t_end=t_end,
            seed=seed,
            unit=unit,
            draft=draft,
            on_step=lambda done, steps: tell(stage, done / steps),
        ).prior

    def restored(model: Prior, i: int) -> Tensor:
        with computing(model.network, settings.precision, settings.compiled) as eps:
            return restore(
                eps,
                damaged[i : i + 1],
                prior.schedule,
                noise_step=steps[i],
                steps=settings.restore.steps,
                generators=[stream(seed, f"{name}/{i}", "restore")],
            ).cpu()

    albums = [_generative_album(prior, damaged[i], settings, f"{name}/{i}") for i in range(count)] if generative else []
    steps = [prior.noise_step_for(settings.restore.noise_step, y) for y in damaged]
    own = fine_tuned(album[rest], personal, f"{name}/left out", None, "left out: personal")
    pictures = {
        "undamaged": clean,
        "damaged": damaged.cpu(),
        "unmodified prior": torch.cat([restored(prior, i) for i in range(count)]),
        "personal album": torch.cat([restored(own, i) for i in range(count)]),
    }
    if albums:
        made = [
            restored(
                fine_tuned(
                    anchors,
                    settings.constrain,
                    f"{name}/{i}",
                    settings.constrain.t_end(steps[i]),
                    f"left out: generative {i + 1}/{count}",
                    draft_of(damaged[i], prior.schedule, steps[i], seed, f"{name}/{i}"),
                ),
                i,
            )
            for i, anchors in enumerate(albums)
        ]
        pictures["generative album"] = torch.cat(made)
    window = prior.card.crop_window
    known = identity.embed(album[rest], window)
    scores = {what: (identity.embed(batch, window) @ known.T).mean(dim=1) for what, batch in pictures.items()}
    return {
        "about": f"{count} of {len(album)} photos were left out, damaged ({DAMAGE}) and restored. Mean cosine "
        f"({identity.name}) with the {len(rest)} that remained; {count} photos tell little by themselves.",
        "photos": out,
        "damage": DAMAGE,
        "noise_steps": steps,
        "identity": {what: _interval(values) for what, values in scores.items()},
    }


def _generative_album(prior: Prior, y: Tensor, settings: Settings, unit: str) -> Tensor:
    values = settings.album
    with computing(prior.network, settings.precision, settings.compiled) as model:
        return generate_album(
            model,
            y,
            prior.schedule,
            **values.arguments(),
            generators=[stream(settings.seed, unit, f"album:{i}") for i in range(values.size)],
        ).cpu()


def _interval(values: Tensor) -> dict[str, float | None]:
    found = mean_interval(values.double().numpy())
    known = len(values) > 1
    return {"mean": found.mean, "low": found.low if known else None, "high": found.high if known else None}
