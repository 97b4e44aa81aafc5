"""The store of people, the choice of an album, recognition and the identity gate."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rgcp_core.constrain import constrain_prior
from rgcp_core.errors import UserError
from rgcp_core.gate import Likeness, best_candidate, blurred_like, likeness, refusal
from rgcp_core.people import (
    AlbumFace,
    Person,
    PersonCard,
    check_name,
    list_people,
    load_person,
    match,
    person_page,
    personal_prior,
    save_person,
    similarity_to,
)
from rgcp_core.personal_album import FoundFace, choose_album, copies, sharpness, yaw_of
from rgcp_core.prior import Prior

WINDOW = (0.195, 0.285, 0.835, 0.925)


def unit(*values: float) -> Tensor:
    return torch.nn.functional.normalize(torch.tensor([*values], dtype=torch.float32), dim=0)


def card_of(name: str, count: int, prior: Prior) -> PersonCard:
    return PersonCard(
        name=name,
        prior=prior.card.name,
        prior_sha256=prior.card.sha256,
        image_size=16,
        crop_window=WINDOW,
        preset="fast",
        settings={"iterations": 3},
        seed=0,
        created="2026-01-01T00:00:00+00:00",
        code_version="test",
        faces=(*(AlbumFace(photo=f"{i}.png") for i in range(count)), AlbumFace(photo="x.png", left_out="another <b>")),
        identity_network="stub",
        loss_start=0.2,
        loss_end=0.1,
        leave_out={"about": "One of 4.", "identity": {"damaged": {"mean": 0.5, "low": None, "high": None}}},
    )


@pytest.fixture(scope="module")
def saved(tiny_prior_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Prior, Prior, Tensor]:
    """A folder with one person, the prior, the personal prior and the album."""
    prior = Prior.load(tiny_prior_dir)
    album = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    personal = constrain_prior(prior, album, iterations=3, batch_size=2, learning_rate=1e-3, seed=0, unit="Ada").prior
    people = tmp_path_factory.mktemp("people") / "people"
    save_person(
        people,
        card_of("Ada", 3, prior),
        personal=personal,
        prior=prior,
        album=album,
        embeddings=torch.eye(3, 4),
        samples=torch.zeros(3, 8, 8),
    )
    return people, prior, personal, album


def test_a_person_comes_back_as_saved(saved: tuple[Path, Prior, Prior, Tensor]) -> None:
    people, prior, personal, album = saved
    person = load_person(people, "Ada")
    assert [each.name for each in list_people(people)] == ["Ada"]
    assert torch.equal(person.embeddings, torch.eye(3, 4))
    assert (person.album() - album).abs().max() <= 1 / 127.5  # 8 bits
    before, read = prior.network.state_dict(), personal_prior(person, prior).network.state_dict()
    for name, value in personal.network.state_dict().items():
        step = (value - before[name]).abs().max() / 127  # the delta has 127 levels each way
        assert (read[name] - value).abs().max() <= 0.51 * step + 1e-7
        assert (value - before[name]).abs().max() > 0 or "bias" in name
    assert not list(people.glob(".*")), "nothing half done is left"


@pytest.mark.parametrize("early", [True, False])
def test_replacing_a_person_leaves_the_old_one_when_it_fails(
    saved: tuple[Path, Prior, Prior, Tensor], monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    people, prior, personal, album = saved
    before = {path: path.read_bytes() for path in people.rglob("*") if path.is_file()}

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    replace = os.replace

    def fails_to_arrive(source: Path, target: Path) -> None:
        if target == people / "Ada" and source.name != "before":
            fails()
        replace(source, target)

    if early:
        monkeypatch.setattr("rgcp_core.people.person_page", fails)
    else:  # the old folder has been moved out of the way by then
        monkeypatch.setattr("rgcp_core.people.os.replace", fails_to_arrive)
    with pytest.raises(OSError, match="No space"):
        save_person(
            people,
            card_of("Ada", 3, prior),
            personal=personal,
            prior=prior,
            album=album,
            embeddings=torch.eye(3, 4),
            samples=torch.zeros(3, 8, 8),
        )
    assert {path: path.read_bytes() for path in people.rglob("*") if path.is_file()} == before


def test_a_personal_prior_goes_with_its_own_prior_and_weights(
    saved: tuple[Path, Prior, Prior, Tensor], tiny_prior: Prior, tmp_path: Path
) -> None:
    people, prior, _, _ = saved
    person = load_person(people, "Ada")
    with pytest.raises(UserError, match="was personalized with the prior tiny"):
        personal_prior(person, tiny_prior)  # the same network, before it had a file and a sum
    folder = tmp_path / "Ada"
    folder.mkdir()
    (folder / "model.delta").write_bytes((person.folder / "model.delta").read_bytes()[:-1])
    with pytest.raises(UserError, match="is not the file that the card"):
        personal_prior(Person(folder, person.card, person.embeddings), prior)


@pytest.mark.parametrize("name", ["", "auto", "../x", "a/b", ".hidden", "x" * 61, "end.", "a\nb"])
def test_names_that_are_no_folders_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="Expected a name"):
        check_name(name)


def test_an_unknown_name_lists_the_known(saved: tuple[Path, Prior, Prior, Tensor]) -> None:
    with pytest.raises(UserError, match="known: Ada"):
        load_person(saved[0], "Grace")


def test_the_page_shows_text_as_text(saved: tuple[Path, Prior, Prior, Tensor]) -> None:
    page = person_page(load_person(saved[0], "Ada").card)
    assert "another &lt;b&gt;" in page
    assert page.count("<img") == 4  # three faces and the samples
    assert "unknown" in page  # a single photo has no interval


def stranger(prior: Prior, name: str, *embeddings: Tensor) -> Person:
    return Person(Path(name), card_of(name, len(embeddings), prior), torch.stack(embeddings))


def test_match_takes_the_nearest_person_by_the_mean_cosine(tiny_prior: Prior) -> None:
    x = unit(1, 0, 0)
    near = stranger(tiny_prior, "near", unit(1, 0, 0), unit(0.6, 0.8, 0))  # cosines 1 and 0.6: mean 0.8
    far = stranger(tiny_prior, "far", unit(0.6, 0, 0.8))  # 0.6
    assert similarity_to(x, near) == pytest.approx(0.8)
    found = match(x, [far, near], threshold=0.75)
    assert found is not None
    assert (found.name, found.nearest, found.similarity) == ("near", "near", pytest.approx(0.8))
    assert match(x, [far, near], threshold=0.81).name is None  # type: ignore[union-attr]
    assert match(x, [far, near], threshold=0.75, margin=0.25).name is None  # type: ignore[union-attr]
    assert match(x, [], threshold=0.0) is None


# ------------------------------------------------------------------------------------------------------- album


def faces_of(embeddings: list[Tensor], photos: list[str] | None = None, seed: int = 0) -> list[FoundFace]:
    generator = torch.Generator().manual_seed(seed)
    names = photos or [f"{i}.png" for i in range(len(embeddings))]
    return [
        FoundFace(
            AlbumFace(photo=name, sha256=name, face_index=0, pixels=64.0, yaw=0.1 * i),
            torch.rand(3, 64, 64, generator=generator) * 2 - 1,
            embedding,
        )
        for i, (name, embedding) in enumerate(zip(names, embeddings, strict=True))
    ]


def near_to(centre: Tensor, count: int, spread: float = 0.05) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.nn.functional.normalize(centre + spread * torch.randn(centre.shape, generator=generator), dim=0)
        for _ in range(count)
    ]


def test_the_face_that_recurs_is_kept_and_others_are_listed() -> None:
    ada, bob = unit(1, 0, 0, 0), unit(0, 1, 0, 0)
    faces = faces_of([*near_to(ada, 4), *near_to(bob, 2)])
    choice = choose_album(faces)
    assert [face.facts.photo for face in choice.album] == ["0.png", "1.png", "2.png", "3.png"]
    assert [face.photo for face in choice.left_out] == ["4.png", "5.png"]
    assert all("another person" in (face.left_out or "") for face in choice.left_out)
    assert any("4 faces" in warning for warning in choice.warnings)  # fewer than 10


def test_two_people_who_recur_equally_often_are_refused() -> None:
    ada, bob = unit(1, 0, 0, 0), unit(0, 1, 0, 0)
    with pytest.raises(UserError, match="recur equally often, in 3 photos"):
        choose_album(faces_of([*near_to(ada, 3), *near_to(bob, 3)]))


def test_of_two_faces_of_one_photo_one_is_taken() -> None:
    ada = unit(1, 0, 0, 0)
    faces = faces_of(near_to(ada, 4), ["a.png", "b.png", "c.png", "c.png"])
    choice = choose_album(faces)
    assert sorted(face.facts.photo for face in choice.album) == ["a.png", "b.png", "c.png"]
    assert "one photo" in (choice.left_out[0].left_out or "")


def test_small_blurred_and_copied_faces_are_left_out_with_the_reason() -> None:
    faces = faces_of(near_to(unit(1, 0, 0, 0), 7))
    small = faces[4].facts.model_copy(update={"pixels": 40.0})
    faces[4] = FoundFace(small, faces[4].crop, faces[4].embedding)
    mean = torch.nn.functional.avg_pool2d(faces[5].crop[None], 9, 1, 4)[0]
    faces[5] = FoundFace(faces[5].facts, mean, faces[5].embedding)
    dimmed = faces[0].crop * 0.9
    faces[6] = FoundFace(faces[6].facts, dimmed, faces[6].embedding)
    reasons = {face.photo: face.left_out or "" for face in choose_album(faces).left_out}
    assert set(reasons) == {"4.png", "5.png", "6.png"}
    assert "too small: 40 photo pixels" in reasons["4.png"]
    assert "blurred" in reasons["5.png"]
    assert "nearly the same picture as 0.png" in reasons["6.png"]


def test_fewer_than_three_faces_are_no_album() -> None:
    with pytest.raises(UserError, match="At least 3 good faces"):
        choose_album(faces_of(near_to(unit(1, 0, 0, 0), 2)))
    with pytest.raises(UserError, match="of 0 found"):
        choose_album([])


def test_copies_keep_the_sharper_picture() -> None:
    def blotches(seed: int) -> Tensor:
        coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        return torch.nn.functional.interpolate(coarse, 64)[0]

    picture, other = blotches(0), blotches(1)
    soft = torch.nn.functional.avg_pool2d(picture[None], 3, 1, 1)[0]
    assert copies([soft, other, picture]) == {0: 2}


def test_sharpness_of_a_checkerboard() -> None:
    """A checkerboard of 0 and 255: the Laplacian is +-4 * 255 everywhere."""
    board = torch.tensor([[(i + j) % 2 for j in range(10)] for i in range(10)]).float().mul(2).sub(1).expand(3, -1, -1)
    assert sharpness(board) == pytest.approx((4 * 255) ** 2)
    assert sharpness(torch.zeros(3, 10, 10)) == 0


def test_yaw_is_where_the_nose_lies_between_the_eyes() -> None:
    points = np.array([[10, 10], [30, 10], [20, 20], [12, 30], [28, 30]], float)
    assert yaw_of(points) == pytest.approx(0)
    points[2] = [30, 20]
    assert yaw_of(points) == pytest.approx(1)
    turned = points @ np.array([[0, 1], [-1, 0]])  # the same face, lying
    assert yaw_of(turned) == pytest.approx(1)


# -------------------------------------------------------------------------------------------------------- gate


class Pixels:
    """A recognition network whose embedding is the mean colour."""

    def embed(self, images: Tensor, window: object) -> Tensor:
        return torch.nn.functional.normalize(images.mean(dim=(2, 3)), dim=1)


def test_likeness_is_the_cosine_with_input_and_album() -> None:
    def plain(*colour: float) -> Tensor:
        return torch.tensor(colour).view(3, 1, 1).expand(3, 64, 64)

    found = likeness(plain(0.5, 0, 0), plain(0.3, 0.4, 0), unit(0, 1, 0)[None], Pixels(), WINDOW)  # type: ignore[arg-type]
    assert found.input == pytest.approx(0.6, abs=1e-6)
    assert found.at_input == pytest.approx(0.6, abs=1e-5)  # blurring a plain colour changes nothing
    assert found.album == pytest.approx(0, abs=1e-6)


def test_the_result_is_blurred_as_much_as_the_input() -> None:
    from scipy.ndimage import gaussian_filter

    sharp = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for sigma in (0.0, 1.0, 2.0):
        y = torch.from_numpy(gaussian_filter(sharp.numpy(), (0, sigma, sigma)))
        assert torch.allclose(blurred_like(sharp, y), y, atol=1e-6)


@pytest.mark.parametrize(
    ("found", "min_album", "says"),
    [
        (Likeness(0.96, 0.9, 0.95), 0.92, None),
        (Likeness(0.93, 0.99, 0.95), 0.92, "0.930 at the photo's sharpness, 0.935 wanted"),
        (Likeness(0.96, 0.9, 0.91), 0.92, "0.910 with the album, 0.92 wanted"),
        (Likeness(0.96, 0.9, 0.5), None, None),  # a generative album holds nobody to it
        (Likeness(0.96, 0.9, None), None, None),
    ],
)
def test_what_is_refused(found: Likeness, min_album: float | None, says: str | None) -> None:
    reason = refusal(found, min_input=0.935, min_album=min_album)
    assert (reason is None) == (says is None)
    assert says is None or says in (reason or "")


def test_the_best_candidate_is_the_most_like_and_of_equals_the_best_looking() -> None:
    candidates = [Likeness(0.90, 0, 0), Likeness(0.950, 0, 0), Likeness(0.947, 0, 0)]
    assert best_candidate(candidates) == 1
    assert best_candidate(candidates, [99, 10, 20]) == 2  # 0.947 is as good as 0.950, 0.90 is not
