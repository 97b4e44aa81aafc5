"""People whom a prior was fine-tuned to, kept in a folder of people, one folder each:

    people/<name>/card.json            who, from which photos, with what settings and how well
                  model.delta          the personal prior as its difference to the prior it was made from
                  album/NN.png         the aligned faces that it was fine-tuned on
                  embeddings.npy       (N,D) float32: the album to the recognition network that the card names
                  samples.png          unconditional samples of the personal prior
                  index.html           all of it to look at

A person's folder appears whole or not at all. Nothing about a person is kept elsewhere than here and in the run's
folders of the photos that were restored.
"""

import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from rgcp_core.delta import read_delta, write_delta
from rgcp_core.errors import UserError
from rgcp_core.images import load_image, save_image, write_atomically
from rgcp_core.prior import Prior, file_sha256

PEOPLE_DIR = "RGCP_PEOPLE_DIR"
"""Environment variable that names the folder of people."""
AUTO = "auto"
"""In place of a name: whoever of all known people a face is."""
NO_IDENTITY = "none"
"""In place of a recognition network: the album shows no faces (a cat, a house), so nothing is recognised by it."""

CARD, DELTA, ALBUM, EMBEDDINGS, SAMPLES, PAGE = (
    *("card.json", "model.delta", "album", "embeddings.npy"),
    *("samples.png", "index.html"),
)


class AlbumFace(BaseModel):
    """A face of the album folder: taken, or left out and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    photo: str = Field(description="Name of the photo below the folder that was given.")
    sha256: str | None = Field(default=None, description="Of the photo's file.")
    face_index: int | None = Field(default=None, description="Number of the face in its photo; none: whole photo.")
    left_out: str | None = Field(default=None, description="The reason as a sentence; none: it is in the album.")
    similarity: float | None = Field(default=None, description="Mean cosine with the faces taken, without itself.")
    pixels: float | None = Field(default=None, description="Side of the crop in photo pixels: the detail it had.")
    sharpness: float | None = Field(default=None, description="Variance of the Laplacian, grey levels 0..255.")
    score: float | None = Field(default=None, description="The face detector's.")
    yaw: float | None = Field(default=None, description="Nose's place between the eyes: -1 left, 0 frontal, 1 right.")
    brightness: float | None = Field(default=None, description="Mean grey level, 0..255.")


class PersonCard(BaseModel):
    """Who a personal prior is of and how it was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="Name on the command line and of the folder.")
    prior: str = Field(description="Name of the prior that was fine-tuned.")
    prior_sha256: str = Field(description="Of its weights.")
    image_size: int = Field(description="Side of the album's pictures and of the prior's, in pixels.")
    crop_window: tuple[float, float, float, float] = Field(description="Part of the FFHQ square that they show.")
    preset: str = Field(description="Preset of the fine-tuning.")
    settings: Mapping[str, Any] = Field(description="All settings of the fine-tuning.")
    seed: int = Field(description="Seed of all random streams.")
    created: str = Field(description="When, UTC.")
    code_version: str = Field(description="Version of rgcp, with the git revision where known.")
    faces: tuple[AlbumFace, ...] = Field(description="All faces of the folder; those without `left_out`: the album.")
    variety: Mapping[str, float] = Field(default={}, description="How much the album varies; see its warnings.")
    warnings: tuple[str, ...] = Field(default=(), description="What the album lacks.")
    identity_network: str = Field(description="Recognition network of the embeddings; none: no faces.")
    loss_start: float = Field(description="Noise error of the prior on the album.")
    loss_end: float = Field(description="The same of the personal prior.")
    leave_out: Mapping[str, Any] | None = Field(
        default=None, description="What photos left out of a fine-tuning say about it; none: not measured."
    )
    weights_sha256: str = Field(default="", description="Of model.delta.")

    @property
    def album(self) -> tuple[AlbumFace, ...]:
        """The faces that were taken, in the order of the album's pictures."""
        return tuple(face for face in self.faces if face.left_out is None)


@dataclass(frozen=True, eq=False)
class Person:
    """A known person: the card, and the embeddings by which a face is recognised."""

    folder: Path
    card: PersonCard
    embeddings: Tensor
    """(N,D) of length 1."""

    @property
    def name(self) -> str:
        """Name on the command line."""
        return self.card.name

    def album(self) -> Tensor:
        """The album (N,3,S,S) in [-1,1]."""
        return torch.stack([load_image(path) for path in self.album_files()])

    def album_files(self) -> list[Path]:
        """Where the album's pictures are."""
        return [self.folder / ALBUM / f"{i:02d}.png" for i in range(len(self.card.album))]


class Match(NamedTuple):
    """Who a face was taken for."""

    name: str | None
    """None: nobody, as far as one can tell."""
    similarity: float
    """Mean cosine with the nearest person's album, whether that is near enough or not."""
    nearest: str
    """Whose album that is."""


def people_folder(folder: Path | str | None = None) -> Path:
    """The folder of people: the one given, else what `RGCP_PEOPLE_DIR` names, else ./people."""
    return Path(folder or os.environ.get(PEOPLE_DIR) or "people")


def check_name(name: str) -> str:
    """The name itself, if a folder can be called so.

    Raises:
        UserError: not 1 to 60 letters, digits, spaces and . _ ' -, starting with a letter or digit; or ``auto``.
    """
    if not re.fullmatch(r"[^\W_][\w .'-]{0,59}", name) or name.endswith((" ", ".")) or name == AUTO:
        raise UserError(
            f"Expected a name of up to 60 letters, digits, spaces and . _ ' - that starts with a letter or digit and "
            f"is not {AUTO!r}, got {name!r}."
        )
    return name


def save_person(
    people: Path,
    card: PersonCard,
    *,
    personal: Prior,
    prior: Prior,
    album: Tensor,
    embeddings: Tensor,
    samples: Tensor,
) -> Person:
    """Write a person's folder, whole or not at all, in place of an earlier one of that name.

    Args:
        people: the folder of people.
        card: without `weights_sha256`, which is filled in.
        personal, prior: the fine-tuned prior and the one that it was made from.
        album: (N,3,S,S) in [-1,1], in the order of ``card.album``.
        embeddings: (N,D) of length 1, in the same order.
        samples: (3,H,W) in [-1,1], a sheet of samples.
    """
    check_name(card.name)
    if not len(album) == len(embeddings) == len(card.album):
        raise UserError(f"{len(card.album)} faces on the card, {len(album)} pictures, {len(embeddings)} embeddings.")
    target, work = people / card.name, people / f".{uuid.uuid4().hex}.tmp"
    work.mkdir(parents=True)
    try:
        for i, picture in enumerate(album):
            save_image(picture, work / ALBUM / f"{i:02d}.png")
        write_delta(personal, prior, work / DELTA)
        buffer = BytesIO()
        np.save(buffer, embeddings.float().cpu().numpy())
        write_atomically(work / EMBEDDINGS, buffer.getvalue())
        save_image(samples, work / SAMPLES)
        card = card.model_copy(update={"weights_sha256": file_sha256(work / DELTA)})
        write_atomically(work / CARD, (card.model_dump_json(indent=1) + "\n").encode())
        write_atomically(work / PAGE, person_page(card).encode())
        if target.exists():
            os.replace(target, work / "before")  # a folder that is not empty cannot be renamed over
        os.replace(work, target)
        shutil.rmtree(target / "before", ignore_errors=True)
    except BaseException:
        if (work / "before").exists() and not target.exists():
            os.replace(work / "before", target)
        shutil.rmtree(work, ignore_errors=True)
        raise
    return load_person(people, card.name)


def load_person(people: Path, name: str) -> Person:
    """Read a person's card and embeddings.

    Raises:
        UserError: nobody of that name, or a folder that is not whole.
    """
    folder = people / check_name(name)
    if not (folder / CARD).is_file():
        known = ", ".join(sorted(path.parent.name for path in people.glob(f"*/{CARD}"))) or "nobody"
        raise UserError(
            f"Nobody called {name!r} is known in {people}; known: {known}. Make a personal prior with "
            f"'rgcp personalize ALBUM_DIR --name', or name another folder of people with --people."
        )
    try:
        card = PersonCard.model_validate_json((folder / CARD).read_text(encoding="utf-8"))
        embeddings = torch.from_numpy(np.load(folder / EMBEDDINGS, allow_pickle=False))
    except (OSError, ValueError, ValidationError) as error:
        raise UserError(f"{folder} is not a person's folder: {error}") from error
    if embeddings.ndim != 2 or len(embeddings) != len(card.album) or len(embeddings) == 0:
        raise UserError(f"{folder}: {len(card.album)} faces on the card, embeddings {tuple(embeddings.shape)}.")
    return Person(folder, card, embeddings)


def list_people(people: Path) -> list[Person]:
    """All known people, by name; none where there is no such folder."""
    found = (path.parent.name for path in people.glob(f"*/{CARD}") if not path.parent.name.startswith("."))
    return [load_person(people, name) for name in sorted(found)]


def personal_prior(person: Person, prior: Prior) -> Prior:
    """The personal prior, on the device and with the card of ``prior``, which it must have been made from.

    Raises:
        UserError: it was made from another prior, or the weights are not those of the card.
    """
    check_prior(person, prior.card.name, prior.card.sha256)
    path = person.folder / DELTA
    if not path.is_file() or file_sha256(path) != person.card.weights_sha256:
        raise UserError(f"{path} is not the file that the card of {person.name} describes: personalize again.")
    return read_delta(prior, path)


def check_prior(person: Person, prior: str, sha256: str) -> None:
    """Raise `UserError` unless a person was made from this prior."""
    if person.card.prior_sha256 != sha256:
        raise UserError(
            f"{person.name} was personalized with the prior {person.card.prior} (sha256 "
            f"{person.card.prior_sha256[:12]}…), not with {prior} ({sha256[:12]}…). Restore with that one, or "
            "personalize again with this one."
        )


def similarity_to(embedding: Tensor, person: Person) -> float:
    """Mean cosine of an embedding (D,) of length 1 with a person's album, in [-1,1]."""
    return float((person.embeddings @ embedding.cpu().float()).mean())


def match(embedding: Tensor, people: Sequence[Person], *, threshold: float, margin: float = 0.0) -> Match | None:
    """Say who of ``people`` a face is: the one whose album is nearest, if near enough and nearer than all others.

    The mean cosine with the album separates better than the largest one or the centroid's, where the face is damaged.
    Measured with dlib on 59 faces of 9 people at 64 px, each against the sharp faces of all nine without itself. Share
    of faces recognised as the right person / pairs of a face and a stranger's album above the threshold:

    | face                   | 0.91         | 0.92         | 0.93         | 0.935        | 0.94         |
    |------------------------|--------------|--------------|--------------|--------------|--------------|
    | sharp                  | 100 / 2.3 %  | 100 / 1.9 %  | 100 / 1.1 %  | 100 / 0.4 %  | 100 / 0.0 %  |
    | blurred, sigma 1       | 100 / 2.5 %  | 100 / 1.7 %  | 100 / 0.4 %  | 100 / 0.0 %  | 98 / 0.0 %   |
    | blurred, sigma 2       | 100 / 3.2 %  | 95 / 0.2 %   | 80 / 0.2 %   | 59 / 0.0 %   | 41 / 0.0 %   |
    | noise, sigma 25        | 98 / 2.3 %   | 95 / 0.8 %   | 93 / 0.0 %   | 92 / 0.0 %   | 75 / 0.0 %   |
    | 16 px enlarged         | 93 / 1.3 %   | 78 / 0.6 %   | 34 / 0.0 %   | 29 / 0.0 %   | 19 / 0.0 %   |
    | `old_photo`            | 56 / 3.0 %   | 36 / 0.0 %   | 3 / 0.0 %    | 2 / 0.0 %    | 0 / 0.0 %    |

    Damage lowers the similarity to the person and hardly raises that to strangers: one threshold for all damage errs
    towards not recognising, which costs a generative album and no wrong face. Nine people are few: strangers who look
    alike, relatives above all, will be nearer than these were.

    Args:
        embedding: (D,) of length 1, by the network that made the people's embeddings.
        people: known people.
        threshold: smallest mean cosine.
        margin: by how much the second nearest person must be farther.

    Returns:
        None when nobody is known; a `Match` without a name when it is nobody of them or cannot be told.
    """
    if not people:
        return None
    similarities = sorted(((similarity_to(embedding, person), person.name) for person in people), reverse=True)
    best, name = similarities[0]
    clear = len(similarities) == 1 or best - similarities[1][0] >= margin
    return Match(name if best >= threshold and clear else None, best, name)


def person_page(card: PersonCard) -> str:
    """A person's album, samples and facts as a page of HTML that stands beside the pictures."""

    def figure(source: str, caption: str, alt: str) -> str:
        image = f'<img src="{quote(source)}" alt="{escape(alt)}">'
        return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"

    album = "".join(
        figure(f"{ALBUM}/{i:02d}.png", f"{face.photo} ({face.similarity or 0:.3f})", face.photo)
        for i, face in enumerate(card.album)
    )
    out = "".join(
        f"<li>{escape(face.photo)}{'' if face.face_index is None else f', face {face.face_index + 1}'}: "
        f"{escape(face.left_out)}</li>"
        for face in card.faces
        if face.left_out is not None
    )
    warnings = "".join(f"<p><strong>{escape(warning)}</strong></p>" for warning in card.warnings)
    facts = {
        "prior": f"{card.prior} ({card.prior_sha256[:12]}…)",
        "preset": card.preset,
        "settings": ", ".join(f"{name} {value}" for name, value in card.settings.items()),
        "loss on the album": f"{card.loss_start:.4f} → {card.loss_end:.4f}",
        "made": card.created,
        **{name: f"{value:.3g}" for name, value in card.variety.items()},
    }
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items())
    measured = _leave_out_table(card.leave_out) if card.leave_out else "<p>Not measured.</p>"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(card.name)}</title><style>
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
.album {{ display: flex; flex-wrap: wrap; gap: .75rem }} figure {{ margin: 0; width: 8rem }} img {{ max-width: 100% }}
.album img {{ width: 8rem; aspect-ratio: 1 }} figcaption {{ font-size: .75rem; overflow-wrap: anywhere }}
th {{ text-align: left; padding-right: 1rem; font-weight: 600; vertical-align: top }} td {{ padding-right: 1rem }}
.samples {{ width: auto }} .samples img {{ width: 34rem }}
</style></head><body>
<h1>{escape(card.name)}</h1>{warnings}
<h2>Album</h2><p>{len(card.album)} faces; in brackets the mean similarity of each to the others.</p>
<div class="album">{album}</div>
<h2>What the personal prior draws on its own</h2>
<figure class="samples"><img src="{SAMPLES}" alt="unconditional samples"></figure>
<h2>Left out of the album</h2><ul>{out or "<li>nothing</li>"}</ul>
<h2>Measured by leaving photos out</h2>{measured}
<h2>Facts</h2><table>{rows}</table>
</body></html>
"""


def _leave_out_table(measured: Mapping[str, Any]) -> str:
    rows = ""
    for name, value in measured["identity"].items():
        known = value["low"] is not None  # a single photo has no interval
        interval = f"{value['low']:.3f} to {value['high']:.3f}" if known else "unknown"
        rows += f"<tr><th>{escape(str(name))}</th><td>{value['mean']:.3f}</td><td>{interval}</td></tr>"
    return (
        f"<p>{escape(str(measured['about']))}</p><table><tr><th></th><td>identity</td><td>95 % interval</td></tr>"
        f"{rows}</table>"
    )
