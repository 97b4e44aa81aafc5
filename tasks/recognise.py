"""Say which faces of a chunk are known people, and hold their personal priors."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from rgcp_core.errors import UserError
from rgcp_core.images import load_image
from rgcp_core.metrics.identity import IdentityModel, load_identity
from rgcp_core.people import AUTO, Person, list_people, load_person, match, personal_prior
from rgcp_core.prior import Card, Prior
from tasks.job import Job
from tasks.units import FaceFound, PhotoFound

IDENTITY = "dlib"
"""Network by which people are recognised; the thresholds were measured with it."""


def recognise(job: Job, card: Card, found: Sequence[PhotoFound]) -> list[PhotoFound]:
    """The same photos, with the person named of every face that is one whom the run restores with a personal prior.

    A face is compared with everybody known, also where one person is asked for: who is more like somebody else is not
    that person. Whoever was personalized with another prior is recognised but not used.
    """
    if job.person is None or job.people is None or job.stub:
        return list(found)
    if not job.shows_faces:  # nothing to recognise: the command says whose album it is
        sha256 = load_person(job.people, job.person).card.weights_sha256
        return [
            replace(photo, faces=tuple(replace(face, person=job.person, person_sha256=sha256) for face in photo.faces))
            for photo in found
        ]
    identity = identity_model()
    people = [person for person in list_people(job.people) if person.card.identity_network == identity.name]
    return [
        replace(photo, faces=tuple(_recognised(job, card, face, people, identity) for face in photo.faces))
        for photo in found
    ]


def _recognised(job: Job, card: Card, face: FaceFound, people: Sequence[Person], identity: IdentityModel) -> FaceFound:
    if face.failure is not None:
        return face
    gate = job.settings.gate
    embedding = identity.embed(load_image(job.unit_dir(face.unit) / "input.png")[None], card.crop_window)[0]
    threshold = gate.person_auto if job.person == AUTO else gate.person_named
    found = match(embedding, people, threshold=threshold, margin=gate.person_margin)
    if found is None:
        return face
    face = replace(face, person_similarity=found.similarity)
    person = next((person for person in people if person.name == found.name), None)
    wanted = job.person == AUTO or (person is not None and person.name == job.person)
    if person is None or not wanted or person.card.prior_sha256 != card.sha256:
        return face
    return replace(face, person=person.name, person_sha256=person.card.weights_sha256)


@lru_cache(maxsize=1)
def identity_model() -> IdentityModel:
    """The recognition network, loaded once a process."""
    return load_identity(IDENTITY)


def loaded_personal(people: Path, name: str, sha256: str, prior: Prior) -> Prior:
    """A person's prior on the device of ``prior``; the last two stay in memory.

    Raises:
        UserError: the person was personalized anew, or forgotten, since the run began.
    """
    key = (people, name, sha256, prior.card.sha256, next(prior.network.parameters()).device)
    if key not in _personal:
        person = load_person(people, name)
        if person.card.weights_sha256 != sha256:
            raise UserError(f"{name} was personalized again while the run worked; run the same command again.")
        personal = personal_prior(person, prior)
        personal.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        while len(_personal) >= PERSONAL_PRIORS:
            _personal.pop(next(iter(_personal)))
        _personal[key] = personal
    return _personal[key]


PERSONAL_PRIORS = 2
_personal: dict[tuple[Path, str, str, str, torch.device], Prior] = {}
