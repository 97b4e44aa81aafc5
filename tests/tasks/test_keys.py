"""A stage is done again when anything that decides what it notes has changed."""

from dataclasses import replace
from pathlib import Path

import pytest

from rgcp_core.prior import Prior
from rgcp_core.settings import load_settings
from tasks.job import Job
from tasks.keys import constrain_key
from tasks.units import FaceFound


@pytest.mark.parametrize("person_sha256", [None, "abc"])
@pytest.mark.parametrize("times", ["all", "below_noise_step"])
def test_another_noise_step_is_another_constrained_stage(
    tiny_prior: Prior, person_sha256: str | None, times: str
) -> None:
    """The stage notes the K that the restoration then uses: under an old key it would be the old K."""
    face = FaceFound("unit", 0, "key", person_sha256=person_sha256)

    def key(noise_step: int | str, prior: Prior = tiny_prior) -> str:
        changes = {"restore": {"noise_step": noise_step}, "constrain": {"times": times}}
        settings = load_settings("fast", prior.card, changes)
        out = Path("out")
        job = Job(run_id="r", base=out, out=out, prior="tiny", settings=settings, code_version="0")
        return constrain_key(job, prior, face)

    assert len({key(10), key(20), key("auto")}) == 3
    assert key(10) == key(10)
    detail = tiny_prior.card.detail
    assert detail is not None
    measured_anew = detail.model_copy(update={"missing": 2 * detail.missing})
    other = replace(tiny_prior, card=tiny_prior.card.model_copy(update={"detail": measured_anew}))
    assert key(10, other) == key(10)
    assert key("auto", other) != key("auto")  # it would pick another K
