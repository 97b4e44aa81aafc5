"""Fetching public priors: resumable, checked against a sha256, never without the licence being accepted."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from rgcp_core.checkpoints import import_prior
from rgcp_core.errors import UserError
from rgcp_core.images import write_atomically
from rgcp_core.prior import Card, file_sha256

PINS_FILE = "pins.json"
_PIECE = 1 << 20


@dataclass(frozen=True)
class PublicPrior:
    """A prior that others published."""

    name: str
    url: str
    licence: str
    source: str
    sha256: str | None = None
    """Published sum; None: the sum of the first download is recorded and enforced from then on."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What its weights do not say, see `rgcp_core.checkpoints.Facts`."""


PUBLIC_PRIORS = {
    prior.name: prior
    for prior in [
        PublicPrior(
            name="ffhq256",
            url="https://github.com/adobe-research/gen2res/releases/download/v1.0.0/base_256.pt",
            licence="Adobe Research License (noncommercial research purposes only); trained on FFHQ, CC BY-NC-SA 4.0",
            source="the prior of the paper's authors, https://github.com/adobe-research/gen2res, release v1.0.0",
            # One head over all 512 channels, as the released code builds it; the paper's Table 1 says 128 a head.
            facts={"architecture": {"image_size": 256, "num_head_channels": 512, "dropout": 0.1}},
        )
    ]
}


def pull_prior(
    name: str,
    folder: Path,
    *,
    accept_licence: bool,
    public: Mapping[str, PublicPrior] = PUBLIC_PRIORS,
    on_step: Callable[[int, int], None] | None = None,
) -> Card:
    """Download a public prior and import it into ``folder / name``; an interrupted download goes on where it was.

    Args:
        name: one of ``public``.
        folder: the user's folder of priors; sums of first downloads are kept in its ``pins.json``.
        accept_licence: must be true; the error says which licence it is about.
        public: what can be pulled.
        on_step: progress callback, (bytes, bytes in all; 0 when unknown).

    Raises:
        UserError: an unknown name, a licence that was not accepted, no connection, or another sha256 than pinned; the
            file is deleted then.
    """
    if name not in public:
        raise UserError(f"No public prior {name!r}; there are: {', '.join(public)}.")
    prior = public[name]
    if not accept_licence:
        raise UserError(
            f"{name} comes under this licence: {prior.licence}. Read it at {prior.source}, and add --accept-licence "
            "if you accept it."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{name}.lock"):
        weights = folder / f".{name}{Path(prior.url).suffix}"
        download(prior.url, weights, on_step)
        found = file_sha256(weights)
        pins = _read_pins(folder)
        expected = prior.sha256 or pins.get(prior.url)
        if expected is not None and found != expected:
            weights.unlink()
            raise UserError(
                f"{prior.url} is not the file it was: its sha256 is {found}, expected {expected}. It was deleted. "
                f"If the publisher announced a new file, remove its line from {folder / PINS_FILE}."
            )
        facts = {"name": name, "licence": prior.licence, "source": f"{prior.source}, {prior.url} (sha256 {found})"}
        card = import_prior(weights, folder / name, {**prior.facts, **facts})
        write_atomically(folder / PINS_FILE, json.dumps({**pins, prior.url: found}, indent=1).encode())
        weights.unlink()
    return card


def download(url: str, path: Path, on_step: Callable[[int, int], None] | None = None) -> None:
    """Fetch ``url`` to ``path``; what an interrupted call left in ``<path>.part`` is continued by an HTTP range.

    The part is dropped when the server's file is no longer the same (its ETag or date changed) or it knows no ranges.
    """
    if path.is_file():
        return
    part, tag_file = path.with_name(path.name + ".part"), path.with_name(path.name + ".etag")
    done = part.stat().st_size if part.is_file() and tag_file.is_file() else 0
    headers = {"User-Agent": "rgcp"}
    if done:
        headers |= {"Range": f"bytes={done}-", "If-Range": tag_file.read_text()}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            if answer.status != 206:
                done = 0
            tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
            if tag:
                tag_file.write_text(tag)
            total = done + int(answer.headers.get("Content-Length", 0))
            with part.open("ab" if done else "wb") as file:
                while piece := answer.read(_PIECE):
                    file.write(piece)
                    done += len(piece)
                    if on_step is not None:
                        on_step(done, total)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the part already holds everything
            raise UserError(f"{url} cannot be fetched: HTTP {error.code} {error.reason}.") from error
        total = done
    except OSError as error:
        raise UserError(f"{url} cannot be fetched: {error}. The same command goes on where it stopped.") from error
    if total and done < total:
        raise UserError(f"{url}: the connection ended after {done} of {total} bytes. The same command goes on there.")
    part.replace(path)
    tag_file.unlink(missing_ok=True)


def _read_pins(folder: Path) -> dict[str, str]:
    path = folder / PINS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
