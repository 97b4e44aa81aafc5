"""Studies: conditions differ in what they say, cells are found again, and verdicts can go either way."""

import numpy as np
import pandas as pd
import pytest
import torch

from rgcp_core.ablation import Condition, cell_key, restore_conditions
from rgcp_core.errors import UserError
from rgcp_core.prior import Prior
from rgcp_core.randomness import stream
from rgcp_core.sampling import generate_album, restore
from rgcp_core.settings import load_settings
from rgcp_core.studies import (
    ALONE,
    STUDIES,
    Claim,
    Difference,
    alone,
    build_study,
    conditions_for,
    damaged_cases,
    equality,
    judge,
    personal_cases,
)
from rgcp_core.study_page import equality_table

SHORT = {
    "precision": "float32",
    "album": {"size": 2, "steps": 3, "noise_step": 20},
    "constrain": {"iterations": 2, "learning_rate": 1e-3},
    "restore": {"steps": 2, "noise_step": 10},
}


@pytest.fixture(scope="module")
def faces(tiny_prior: Prior) -> dict[str, torch.Tensor]:
    size = tiny_prior.card.image_size
    return {f"face{i}": torch.rand(3, size, size, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in range(3)}


def condition(prior: Prior, **facts: object) -> Condition:
    return Condition(**{"name": "x", "settings": load_settings("fast", prior.card, SHORT), "t_end": 10, **facts})


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_builds_at_the_priors_size(tiny_prior: Prior, name: str) -> None:
    study = build_study(name, tiny_prior.card, "fast", {"album": {"size": 2}})  # type: ignore[arg-type]
    assert study.conditions
    assert study.kinds
    assert len({c.name for c in study.conditions}) == len(study.conditions)
    for claim in study.claims:
        for side in (claim.difference.better, claim.difference.worse):
            wanted = {key: side[key] for key in ("series", "condition", "level") if key in side}
            if wanted.get("series") == "input":
                continue
            values = [{"series": c.series, "condition": c.name, "level": c.level} for c in study.conditions]
            assert any(wanted.items() <= value.items() for value in values), f"no condition for {claim.text}"


def test_a_condition_without_iterations_is_a_plain_restoration(tiny_prior: Prior, faces: dict) -> None:
    case = damaged_cases(faces, "jpeg", 0)[0]
    settings = load_settings("fast", tiny_prior.card, SHORT)
    [made] = restore_conditions(
        tiny_prior, case, [Condition(name="alone", settings=alone(settings), t_end=None)], seed=1
    )
    expected = restore(
        tiny_prior.network, case.y[None], tiny_prior.schedule, noise_step=10, steps=2,
        generators=[stream(1, case.face, "restore")],
    )  # fmt: skip
    torch.testing.assert_close(made.picture, expected[0])
    assert made.anchors is None


def test_fine_tuning_moves_the_picture_and_the_control_sees_the_other_face(tiny_prior: Prior, faces: dict) -> None:
    case = damaged_cases(faces, "jpeg", 0)[0]
    assert case.other is not None
    without = load_settings("fast", tiny_prior.card, SHORT)
    conditions = [
        condition(tiny_prior),
        condition(tiny_prior, anchors="other"),
        Condition(name="alone", settings=alone(without), t_end=None),
    ]
    own, other, plain = restore_conditions(tiny_prior, case, conditions, seed=0)
    assert own.anchors is not None
    assert other.anchors is not None
    album = generate_album(
        tiny_prior.network, case.other.y, tiny_prior.schedule, noise_step=20, steps=3,
        guidance_interval=without.album.guidance_interval, guidance_scale=0.3,
        generators=[stream(0, case.other.face, f"album:{i}") for i in range(2)],
    )  # fmt: skip
    torch.testing.assert_close(other.anchors, album)
    assert not torch.equal(own.picture, plain.picture), "fine-tuning did nothing"
    assert not torch.equal(own.picture, other.picture)
    assert own.loss_start != own.loss_end


def test_sharing_an_album_changes_nothing(tiny_prior: Prior, faces: dict) -> None:
    case = damaged_cases(faces, "jpeg", 0)[0]
    late = load_settings("fast", tiny_prior.card, {**SHORT, "restore": {"steps": 2, "noise_step": 15}})
    both = [condition(tiny_prior), condition(tiny_prior, settings=late)]
    together = [made.picture for made in restore_conditions(tiny_prior, case, both, seed=0)]
    apart = [next(restore_conditions(tiny_prior, case, [one], seed=0)).picture for one in both]
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b)


def test_the_key_of_a_cell_follows_what_decides_it(tiny_prior: Prior, faces: dict) -> None:
    case, second, _ = damaged_cases(faces, "jpeg", 0)
    base = condition(tiny_prior)
    key = cell_key(tiny_prior, case, base, 0)
    assert key == cell_key(tiny_prior, case, base.model_copy(update={"name": "other label", "level": 3.0}), 0)
    others = [
        (case, base, 1),
        (second, base, 0),
        (case, base.model_copy(update={"anchors": "other"}), 0),
        (case, base.model_copy(update={"t_end": 11}), 0),
        (case, base.model_copy(update={"unconditional": True}), 0),
        (case, condition(tiny_prior, settings=load_settings("fast", tiny_prior.card, {**SHORT, "album": {}})), 0),
    ]
    keys = [cell_key(tiny_prior, one, how, seed) for one, how, seed in others]
    assert len({key, *keys}) == len(keys) + 1


def test_personal_albums_use_what_there_is(tiny_prior: Prior, faces: dict) -> None:
    people = {"ann": faces, "bob": {"p0": faces["face0"], "p1": faces["face1"]}}
    ann, bob = personal_cases(people, "jpeg", 0)
    assert ann.personal is not None
    assert bob.stranger is not None
    assert len(ann.personal) == 2
    assert torch.equal(ann.personal, bob.stranger)
    assert torch.equal(ann.clean, faces["face0"])
    assert not any(torch.equal(p, ann.clean) for p in ann.personal)
    darker = {**faces, "print": faces["face0"] * 0.8 - 0.1}
    case, _ = personal_cases({"ann": darker, "bob": people["bob"]}, "jpeg", 0)
    assert case.personal is not None
    assert torch.equal(case.personal, ann.personal)  # another print of the damaged photo is no album
    study = build_study("album-size", tiny_prior.card, "fast")
    counts = [c.anchor_count for c in conditions_for(study, ann) if c.anchors == "personal"]
    assert counts == [1, 2]
    with pytest.raises(UserError, match="two photos"):
        personal_cases({"ann": faces, "bob": {"p0": faces["face0"]}}, "jpeg", 0)


def rows_of(better: list[float], worse: list[float]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"face": str(face), "seed": seed, "series": series, "condition": series, "psnr": value + 0.01 * seed}
            for series, values in (("a", better), ("b", worse))
            for face, value in enumerate(values)
            for seed in (0, 1)
        ]
    )


CLAIM = Claim("a beats b", "test", "psnr", Difference({"series": "a"}, {"series": "b"}), higher=True)


def test_a_claim_can_hold_fail_and_stay_open() -> None:
    base = [20.0, 25.0, 22.0, 27.0, 21.0]
    better = [value + gain for value, gain in zip(base, [1.0, 1.2, 0.8, 1.1, 0.9], strict=True)]
    assert judge(CLAIM, rows_of(better, base)).result == "held"
    assert judge(CLAIM, rows_of(base, better)).result == "the opposite"
    mixed = [value + gain for value, gain in zip(base, [1.0, -1.2, 0.8, -1.1, 0.3], strict=True)]
    assert judge(CLAIM, rows_of(mixed, base)).result == "not shown"
    interval = judge(CLAIM, rows_of(better, base)).interval
    assert interval is not None
    assert interval.mean == pytest.approx(1.0)
    assert interval.n == 5


def test_a_claim_about_what_was_not_measured_is_not_held() -> None:
    rows = rows_of([1.0, 2.0], [0.0, 1.0])
    rows["psnr"] = np.nan
    assert judge(CLAIM, rows).result == "not measured"


def test_equality_needs_a_difference_within_the_spread_of_paper() -> None:
    spread = {0: -0.5, 1: 0.0, 2: 0.5}  # of paper over its seeds: a standard deviation of 0.5
    rows = pd.DataFrame(
        [
            {"face": str(face), "seed": seed, "condition": name, "psnr": 20 + face + change + shift + face * wobble}
            for name, shift, wobble in (("paper", 0, 0), ("near", 0.05, 0.01), ("far", 1.0, 0.01))
            for face in range(6)
            for seed, change in spread.items()
        ]
    )
    found = {test.preset: test for test in equality(rows, ["psnr"])}
    assert found["near"].margin == pytest.approx(0.5)
    assert found["near"].equal
    assert not found["far"].equal
    with pytest.raises(UserError, match="two seeds"):
        equality(rows[rows["seed"] == 0], ["psnr"])


@pytest.mark.parametrize(("control", "expected"), [(False, "`fast` is equal to `paper`"), (True, "nothing is shown")])
def test_a_preset_is_equal_by_all_metrics_and_only_where_the_controls_are_not(control: bool, expected: str) -> None:
    def test(preset: str, metric: str, equal: bool) -> dict:
        interval = {"mean": 0.1, "low": 0.0, "high": 0.2}
        facts = {"margin": 0.3, "low": 0.0, "high": 0.2, "equal": equal}
        return {"preset": preset, "metric": metric, "interval": interval, **facts}

    tests = [test("fast", metric, True) for metric in ("psnr", "lpips_alex")]
    tests += [test("balanced", "psnr", True), test("balanced", "lpips_alex", False)]
    tests += [test(ALONE, "psnr", control), test(ALONE, "lpips_alex", True)]
    page = "\n".join(equality_table(tests))
    assert expected in page
    assert "`balanced` is not shown to be equal to `paper`: LPIPS" in page
