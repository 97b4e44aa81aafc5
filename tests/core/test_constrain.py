import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rgcp_core.constrain import (
    RANK,
    Parameters,
    _merge_low_rank,
    _prepare,
    album_loss,
    can_share,
    constrain_prior,
    constrain_together,
    draft_of,
)
from rgcp_core.errors import UserError
from rgcp_core.loss import denoising_loss
from rgcp_core.prior import Prior

ARGUMENTS = {"batch_size": 4, "learning_rate": 1e-3, "seed": 0, "unit": "face"}


@pytest.fixture(scope="module")
def anchors() -> Tensor:
    torch.manual_seed(1)
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 3, 3), size=16, mode="bilinear") * 2 - 1
    return (smooth + 0.1 * torch.randn(6, 3, 16, 16)).clamp(-1, 1)


def test_constraining_fits_the_anchors_and_leaves_the_prior_alone(tiny_prior: Prior, anchors: Tensor) -> None:
    before = {name: value.clone() for name, value in tiny_prior.network.state_dict().items()}
    constrained = constrain_prior(tiny_prior, anchors, iterations=30, **ARGUMENTS)
    assert constrained.loss_end < 0.9 * constrained.loss_start
    assert constrained.loss_start == album_loss(tiny_prior, anchors, 1000)
    assert len(constrained.losses) == 30
    for name, value in tiny_prior.network.state_dict().items():
        assert torch.equal(value, before[name])


def test_other_anchors_do_not_help(tiny_prior: Prior, anchors: Tensor) -> None:
    """A control: fitting to something else must not fit these anchors as well."""
    own = constrain_prior(tiny_prior, anchors, iterations=30, **ARGUMENTS).prior
    other = constrain_prior(tiny_prior, torch.rand_like(anchors) * 2 - 1, iterations=30, **ARGUMENTS).prior
    assert album_loss(own, anchors, 1000) < 0.9 * album_loss(other, anchors, 1000)


def test_no_iteration_changes_nothing(tiny_prior: Prior, anchors: Tensor) -> None:
    constrained = constrain_prior(tiny_prior, anchors, iterations=0, **ARGUMENTS)
    assert constrained.prior is tiny_prior
    assert constrained.loss_start == constrained.loss_end


def test_the_same_seed_and_unit_give_the_same_weights(tiny_prior: Prior, anchors: Tensor) -> None:
    def weights(**changes: object) -> Tensor:
        prior = constrain_prior(tiny_prior, anchors, iterations=3, **(ARGUMENTS | changes)).prior
        return torch.cat([p.flatten() for p in prior.network.parameters()])

    base = weights()
    torch.rand(7)  # other random numbers drawn meanwhile do not matter
    assert torch.equal(base, weights())
    assert not torch.equal(base, weights(unit="another face"))
    assert not torch.equal(base, weights(seed=1))


def test_times_stay_below_the_end(tiny_prior: Prior, anchors: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def spy(model, x_0, t, eps, schedule):  # type: ignore[no-untyped-def]
        seen.append(t)
        return denoising_loss(model, x_0, t, eps, schedule)

    monkeypatch.setattr("rgcp_core.constrain.denoising_loss", spy)
    constrain_prior(tiny_prior, anchors, iterations=20, t_end=25, **ARGUMENTS)
    times = torch.cat(seen)
    assert int(times.max()) in range(20, 25)
    constrain_prior(tiny_prior, anchors, iterations=20, **ARGUMENTS)
    assert int(torch.cat(seen).max()) > 800


def test_global_random_state_is_left_alone(tiny_prior: Prior, anchors: Tensor) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    constrain_prior(tiny_prior, anchors, iterations=2, **ARGUMENTS)
    assert torch.equal(torch.rand(3), expected)


def test_wrong_anchors_and_divergence_are_explained(tiny_prior: Prior, anchors: Tensor) -> None:
    with pytest.raises(UserError, match=r"\(N,3,16,16\) with N > 0; got \(0, 3, 16, 16\)"):
        constrain_prior(tiny_prior, anchors[:0], iterations=1, **ARGUMENTS)
    with pytest.raises(UserError, match="Lower the learning rate"):
        constrain_prior(tiny_prior, anchors * float("nan"), iterations=1, **ARGUMENTS)


@pytest.mark.parametrize("parameters", ["norms", "low_rank"])
def test_fewer_parameters_fit_the_anchors_and_move_only_what_they_say(
    tiny_prior: Prior, anchors: Tensor, parameters: str
) -> None:
    constrained = constrain_prior(tiny_prior, anchors, iterations=30, parameters=parameters, **ARGUMENTS)
    assert constrained.loss_end < 0.97 * constrained.loss_start
    before, after = tiny_prior.network.state_dict(), constrained.prior.network.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        if parameters == "norms" and value.ndim == 4:
            assert torch.equal(after[name], value), name
        if parameters == "low_rank":
            change = (after[name] - value).flatten(1) if value.ndim == 4 else after[name] - value
            if value.ndim == 4 and value.shape[-1] == 3:
                assert torch.linalg.matrix_rank(change, rtol=1e-3) <= RANK, name
            else:
                assert not change.any(), name


def test_low_rank_changes_are_merged_exactly(tiny_prior: Prior) -> None:
    """The network with the thin convolutions beside it, and the one that they were merged into, are one function."""
    network = copy.deepcopy(tiny_prior.network)
    trained = _prepare(network, "low_rank", torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    x, t = torch.rand(2, 3, 16, 16) * 2 - 1, torch.tensor([3, 500])
    with torch.no_grad():
        beside = network(x, t)
        _merge_low_rank(network)
        assert torch.allclose(network(x, t), beside, atol=1e-4 * float(beside.abs().max()))
        assert not torch.allclose(tiny_prior.network(x, t), beside, atol=1e-2 * float(beside.abs().max()))


def test_patience_stops_and_returns_the_best_weights(
    tiny_prior: Prior, anchors: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The held-out loss falls at the first two looks and then rises: the weights of the second look come back."""
    looks = iter([9.0, 3.0, 2.0, 4.0, 5.0, 6.0, 7.0])  # the first is the prior's own loss on all anchors
    seen: list[int] = []

    def scripted(prior: Prior, pictures: Tensor, t_end: int) -> float:
        seen.append(len(pictures))
        return next(looks)

    monkeypatch.setattr("rgcp_core.constrain.CHECK_EVERY", 2)
    monkeypatch.setattr("rgcp_core.constrain.album_loss", scripted)
    stopped = constrain_prior(tiny_prior, anchors, iterations=30, patience=4, **ARGUMENTS)
    assert len(stopped.losses) == 4 + 4
    assert seen == [6, 4, 4, 4, 4, 6]  # one of six anchors is held out, and looked at in four noises
    monkeypatch.setattr("rgcp_core.constrain.album_loss", lambda *_: 0.0)
    four = constrain_prior(tiny_prior, anchors[:-1], iterations=4, **ARGUMENTS)
    for a, b in zip(stopped.prior.network.parameters(), four.prior.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_patience_needs_anchors_to_hold_out(tiny_prior: Prior, anchors: Tensor) -> None:
    with pytest.raises(UserError, match="at least 2"):
        constrain_prior(tiny_prior, anchors[:1], iterations=1, patience=10, **ARGUMENTS)


def test_it_stops_when_the_draft_has_settled(
    tiny_prior: Prior, anchors: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looks at steps 2, 4, 6, 8: the draft moves by 20, 3 and 0.9 levels; below 1 is the end."""
    levels = iter([0.0, 20.0, 23.0, 23.9, 99.0])
    monkeypatch.setattr("rgcp_core.constrain.CHECK_EVERY", 2)
    watched = {"settled": 1.0, "draft": lambda model: torch.full((1, 3, 4, 4), next(levels) / 127.5)}
    stopped = constrain_prior(tiny_prior, anchors, iterations=30, **watched, **ARGUMENTS)
    assert len(stopped.losses) == 8
    eight = constrain_prior(tiny_prior, anchors, iterations=8, **ARGUMENTS)
    for a, b in zip(stopped.prior.network.parameters(), eight.prior.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_draft_follows_the_model_alone(tiny_prior: Prior, anchors: Tensor) -> None:
    draft = draft_of(anchors[0], tiny_prior.schedule, 50, 0, "face")
    tuned = constrain_prior(tiny_prior, anchors, iterations=5, **ARGUMENTS).prior
    assert torch.equal(draft(tiny_prior.network), draft(tiny_prior.network))
    assert not torch.equal(draft(tiny_prior.network), draft(tuned.network))


def test_nothing_to_look_at_is_explained(tiny_prior: Prior, anchors: Tensor) -> None:
    with pytest.raises(UserError, match="settled"):
        constrain_prior(tiny_prior, anchors, iterations=1, settled=1.0, **ARGUMENTS)


@pytest.mark.parametrize("parameters", ["norms", "low_rank"])
def test_faces_that_share_their_steps_end_as_each_alone(
    tiny_prior: Prior, anchors: Tensor, parameters: Parameters
) -> None:
    albums, units, t_ends = [anchors, anchors.flip(0)[:4], -anchors], ["a", "b", "c"], [None, 40, 200]
    common = {"iterations": 6, "batch_size": 3, "learning_rate": 1e-3, "seed": 0, "parameters": parameters}
    common["learning_rate_decay"] = "linear"
    together = constrain_together(tiny_prior, albums, units=units, t_ends=t_ends, **common)
    x, t = torch.rand(2, 3, 16, 16) * 2 - 1, torch.tensor([3, 500])
    unmodified = tiny_prior.network(x, t)
    for i, (album, unit, t_end) in enumerate(zip(albums, units, t_ends, strict=True)):
        alone = constrain_prior(tiny_prior, album, unit=unit, t_end=t_end, **common)
        torch.testing.assert_close(together[i].losses, alone.losses, rtol=1e-4, atol=1e-5)
        assert together[i].loss_start == alone.loss_start
        moved = alone.prior.network(x, t) - unmodified
        assert moved.abs().max() > 1e-3
        difference = together[i].prior.network(x, t) - unmodified - moved
        assert difference.abs().max() < 1e-3 * moved.abs().max()


def test_what_cannot_be_shared_is_refused(tiny_prior: Prior, anchors: Tensor) -> None:
    arguments = {"iterations": 1, "batch_size": 2, "learning_rate": 1e-3, "seed": 0, "units": ["a"], "t_ends": [None]}
    assert not can_share(tiny_prior, "all")
    with pytest.raises(UserError, match="norms or low_rank"):
        constrain_together(tiny_prior, [anchors], parameters="all", **arguments)
    dropping = tiny_prior.card.architecture.model_copy(update={"dropout": 0.1})
    with_dropout = replace(tiny_prior, card=tiny_prior.card.model_copy(update={"architecture": dropping}))
    assert not can_share(with_dropout, "norms")
