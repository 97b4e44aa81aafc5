import pytest

from rgcp_core.errors import UserError
from rgcp_core.schedule import Schedule
from rgcp_core.settings import PRESETS, Settings, load_settings


def test_paper_preset_is_table_1() -> None:
    paper = PRESETS["paper"]
    assert (paper.album.size, paper.album.noise_step, paper.album.guidance_interval) == (16, 600, 20)
    assert paper.album.steps is None
    constrain = paper.constrain
    assert (constrain.batch_size, constrain.iterations, constrain.learning_rate) == (4, 3000, 1e-5)
    assert constrain.times == "all"
    assert paper.restore.noise_step == 200


@pytest.mark.parametrize(
    ("size", "restore", "album"), [(512, 300, 704), (256, 200, 600), (128, 106, 480), (64, 52, 344)]
)
def test_noise_steps_follow_the_size(size: int, restore: int, album: int) -> None:
    """Equal SNR x size^2; at 512 px the restoration keeps the paper's own 300."""
    settings = PRESETS["paper"].for_size(size, Schedule.linear())
    assert (settings.restore.noise_step, settings.album.noise_step) == (restore, album)
    assert settings.album.noise_step / settings.album.guidance_interval == pytest.approx(30, rel=0.06)


def test_overrides_replace_single_settings() -> None:
    settings = load_settings("fast", {"seed": 3, "album": {"size": 5}})
    assert (settings.seed, settings.album.size) == (3, 5)
    assert settings.album.steps == PRESETS["fast"].album.steps


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("best", {}, "Unknown preset 'best'; there are: paper, balanced, fast"),
        ("fast", {"albums": {}}, "albums: Extra inputs are not permitted"),
        ("fast", {"album": {"sizes": 3}}, "album.sizes"),
        ("fast", {"album": {"size": 0}}, "album.size"),
        ("fast", {"restore": {"noise_step": "many"}}, "restore.noise_step"),
    ],
)
def test_unusable_settings_name_what_is_wrong(preset: str, overrides: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_settings(preset, overrides)


def test_noise_step_beyond_t_is_refused() -> None:
    with pytest.raises(UserError, match="T = 1000; got 1200"):
        load_settings("fast", {"restore": {"noise_step": 1200}}).for_size(64, Schedule.linear())


def test_every_setting_has_a_sentence() -> None:
    def check(model: type) -> None:
        for name, field in model.model_fields.items():  # type: ignore[attr-defined]
            assert field.description, name
            if hasattr(field.annotation, "model_fields"):
                check(field.annotation)

    check(Settings)


def test_digest_changes_with_any_setting() -> None:
    base = load_settings("fast")
    assert base.digest() == load_settings("fast").digest()
    assert base.digest() != load_settings("fast", {"constrain": {"iterations": 151}}).digest()
