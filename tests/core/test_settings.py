import pytest

from rgcp_core.errors import UserError
from rgcp_core.prior import Card
from rgcp_core.settings import PRESETS, Settings, load_settings
from rgcp_core.unet import UNetConfig


def card(size: int = 64, noise_step: int | None = None) -> Card:
    architecture = UNetConfig(image_size=size)
    return Card(name="p", architecture=architecture, noise_step=noise_step, sha256="", licence="none", source="nowhere")


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
    settings = load_settings("paper", card(size))
    assert (settings.restore.noise_step, settings.album.noise_step) == (restore, album)
    assert settings.album.noise_step / settings.album.guidance_interval == pytest.approx(30, rel=0.06)


def test_a_card_may_know_its_own_noise_step() -> None:
    assert load_settings("paper", card(64, noise_step=160)).restore.noise_step == 160


def test_overrides_replace_single_settings_and_are_taken_as_they_are() -> None:
    settings = load_settings("fast", card(64), {"seed": 3, "album": {"size": 5}, "restore": {"noise_step": 123}})
    assert (settings.seed, settings.album.size, settings.restore.noise_step) == (3, 5, 123)
    assert settings.album.steps == PRESETS["fast"].album.steps


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("best", {}, "Unknown preset 'best'; there are: paper, balanced, fast"),
        ("fast", {"albums": {}}, "albums: Extra inputs are not permitted"),
        ("fast", {"album": {"sizes": 3}}, "album.sizes"),
        ("fast", {"album": {"size": 0}}, "album.size"),
        ("fast", {"restore": {"noise_step": "many"}}, "restore.noise_step"),
        ("fast", {"restore": {"noise_step": 1200}}, "T = 1000; got 1200"),
    ],
)
def test_unusable_settings_name_what_is_wrong(preset: str, overrides: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_settings(preset, card(), overrides)


def test_every_setting_has_a_sentence() -> None:
    def check(model: type) -> None:
        for name, field in model.model_fields.items():  # type: ignore[attr-defined]
            assert field.description, name
            if hasattr(field.annotation, "model_fields"):
                check(field.annotation)

    check(Settings)


def test_digest_changes_with_any_setting() -> None:
    base = load_settings("fast", card())
    assert base.digest() == load_settings("fast", card()).digest()
    assert base.digest() != load_settings("fast", card(), {"constrain": {"iterations": 151}}).digest()


def test_only_compiled_code_has_a_key_of_its_own() -> None:
    """Pictures made before the setting existed are those of the network as it is written."""
    plain, compiled = (load_settings("fast", card(), {"compiled": value}) for value in (False, True))
    assert "compiled" not in plain.deciding()
    assert plain.arithmetic() == ["bfloat16"]
    assert compiled.arithmetic() == ["bfloat16", "compiled"]
    assert plain.digest() != compiled.digest()
