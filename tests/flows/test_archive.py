"""The archive flow on real files, with a tiny prior."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from photos import digests, portrait, write_mixed_folder
from PIL import Image, ImageOps

from flows.archive import archive, prepare
from rgcp_core.constrain import constrain_together
from rgcp_core.errors import RgcpError, UserError
from rgcp_core.images import load_image
from rgcp_core.manifest import read_manifest
from rgcp_core.prior import Prior
from rgcp_core.sampling import generate_album
from rgcp_core.unet import UNet

QUICK: dict[str, Any] = {
    "preset": "fast",
    "settings": {
        "album": {"size": 2, "steps": 4},
        "constrain": {"iterations": 2},
        "faces": {"detector": "offline", "max_enlargement": 20},
    },
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, astronaut: np.ndarray) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("mixed") / "photos with spaces"
    return folder, write_mixed_folder(folder, astronaut)


@pytest.fixture(scope="module")
def run(
    mixed: tuple[Path, dict[str, str]],
    tiny_prior_dir: Path,
    prefect_server: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, pd.DataFrame]:
    """The run that most tests look at."""
    out = tmp_path_factory.mktemp("run") / "out"
    before = digests(mixed[0])
    archive([str(mixed[0])], str(out), prior=str(tiny_prior_dir), **QUICK)
    assert digests(mixed[0]) == before, "inputs are never changed"
    return out, read_manifest(out)


def test_every_photo_is_accounted_for(run: tuple[Path, pd.DataFrame], mixed: tuple[Path, dict[str, str]]) -> None:
    manifest = run[1]
    first = manifest.sort_values("face_index", na_position="last").groupby("photo")["status"].first().to_dict()
    assert first == mixed[1]
    restored = manifest[manifest.status == "restored"].groupby("photo").size()
    assert restored["three.png"] == 3
    left_out = manifest[manifest.status.str.contains(":")]
    assert left_out["reason"].str.len().min() > 10


def test_restored_photos_keep_place_size_and_mode(
    run: tuple[Path, pd.DataFrame], mixed: tuple[Path, dict[str, str]]
) -> None:
    out, manifest = run
    for _, row in manifest[manifest.status == "restored"].iterrows():
        source, result = Image.open(mixed[0] / row.photo), Image.open(out / row.output)
        assert (result.size, result.mode) == (source.size, source.mode)
        assert row.output.startswith(f"photos/{row.photo}")
        assert result.getexif().get(0x0112) == source.getexif().get(0x0112)


def test_pixels_away_from_the_faces_are_identical(
    run: tuple[Path, pd.DataFrame], mixed: tuple[Path, dict[str, str]]
) -> None:
    out, manifest = run
    for photo, rows in manifest[manifest.status == "restored"].groupby("photo"):
        source = ImageOps.exif_transpose(Image.open(mixed[0] / str(photo)))
        result = ImageOps.exif_transpose(Image.open(out / rows.output.iloc[0]))
        outside = np.ones((source.height, source.width), bool)
        for box in rows.box:  # the crop reaches about one box beyond the box
            x0, y0, x1, y1 = box
            width, height = x1 - x0, y1 - y0
            outside[max(0, int(y0 - height)) : int(y1 + height), max(0, int(x0 - width)) : int(x1 + width)] = False
        a, b = np.asarray(source), np.asarray(result)
        assert outside.any()
        assert np.array_equal(a[outside], b[outside])
        assert not np.array_equal(a, b)


def test_a_gray_photo_gets_no_colours_from_the_prior(run: tuple[Path, pd.DataFrame]) -> None:
    out, manifest = run
    units = manifest.set_index("photo").unit
    gray, colour = (
        np.asarray(Image.open(out / "faces" / units[name] / "restored.png")).astype(int)
        for name in ("gray.png", "good.png")
    )
    assert np.ptp(gray, axis=-1).max() <= 1
    assert np.ptp(colour, axis=-1).max() > 20


def test_the_run_says_what_it_did(run: tuple[Path, pd.DataFrame], tiny_prior_dir: Path) -> None:
    out, manifest = run
    facts = json.loads((out / "run.json").read_text())
    assert facts["prior"]["name"] == "tiny"
    assert facts["settings"]["album"]["size"] == 2
    assert facts["counts"]["photos"] == 12
    restored = manifest[manifest.status == "restored"]
    assert (restored.album_size == 2).all()
    assert restored.prior_sha256.nunique() == 1
    assert (restored[["seconds_album", "seconds_constrain", "seconds_restore"]] >= 0).all(axis=None)
    assert restored.loss_end.notna().all()
    report = (out / "report.html").read_text()
    assert "Großmutter" in report
    assert not list((out / ".rgcp").glob("work/*")), "constrained weights are dropped"


def test_every_face_has_the_noise_step_that_its_damage_asks_for(
    run: tuple[Path, pd.DataFrame], tiny_prior: Prior
) -> None:
    out, manifest = run
    restored = manifest[manifest.status == "restored"]
    assert restored.noise_step.nunique() > 1
    for _, row in restored.iterrows():
        y = load_image(out / "faces" / row.unit / "input.png")
        assert row.noise_step == tiny_prior.noise_step_for("auto", y)


def test_the_same_command_again_does_nothing(
    run: tuple[Path, pd.DataFrame], mixed: tuple[Path, dict[str, str]], tiny_prior_dir: Path
) -> None:
    out, manifest = run
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    archive([str(mixed[0])], str(out), prior=str(tiny_prior_dir), **QUICK)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == before
    again = read_manifest(out)
    columns = ["photo", "face_index", "status", "unit", "output"]
    pd.testing.assert_frame_equal(again[columns], manifest[columns])


def test_chunking_changes_no_pixel(
    run: tuple[Path, pd.DataFrame], mixed: tuple[Path, dict[str, str]], tiny_prior_dir: Path, tmp_path: Path
) -> None:
    archive([str(mixed[0])], str(tmp_path / "out"), prior=str(tiny_prior_dir), chunk=1, **QUICK)
    assert digests(tmp_path / "out" / "photos") == digests(run[0] / "photos")


def test_an_api_knows_every_task_run(
    mixed: tuple[Path, dict[str, str]], tiny_prior_dir: Path, prefect_server: str, tmp_path: Path
) -> None:
    from flows.server import wait_until_recorded

    source = tmp_path / "in"
    source.mkdir()
    for i in range(4):
        (source / f"{i}.jpg").write_bytes(b"")
    state = archive(
        [str(source)], str(tmp_path / "out"), prior=str(tiny_prior_dir), chunk=1, **QUICK, return_state=True
    )
    outcome = state.result()
    assert outcome.task_runs == 4 * 7 + 1
    known = wait_until_recorded(state.state_details.flow_run_id, outcome.task_runs, seconds=60)
    assert known == outcome.task_runs


SCRIPT = """
import json, sys
from flows.archive import archive
archive(**json.loads(sys.argv[1]))
"""


def test_a_killed_run_goes_on_where_it_was(
    astronaut: np.ndarray, tiny_prior_dir: Path, prefect_server: str, tmp_path: Path
) -> None:
    """SIGKILL in the middle; the resumed run ends with the files of an undisturbed one and redoes little."""
    source = tmp_path / "in"
    source.mkdir()
    for i in range(6):
        portrait(astronaut, 200 + 4 * i).save(source / f"{i}.png")
    arguments = {"paths": [str(source)], "prior": str(tiny_prior_dir), "chunk": 1, **QUICK}
    archive(out=str(tmp_path / "undisturbed"), **arguments)

    out = tmp_path / "killed"
    command = [sys.executable, "-c", SCRIPT, json.dumps({"out": str(out), **arguments})]
    environment = os.environ | {"PREFECT_API_URL": prefect_server, "OMP_NUM_THREADS": "1"}
    victim = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while len(list(out.glob("faces/*/restored.png"))) < 2 and victim.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    assert victim.poll() is None, "the run must be killed in the middle"
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    done = {path: path.stat().st_mtime_ns for path in out.glob("faces/*/restored.png")}
    assert 2 <= len(done) < 6

    archive(out=str(out), **arguments)
    redone = [path for path, time_ns in done.items() if path.stat().st_mtime_ns != time_ns]
    assert len(redone) <= 1
    assert digests(out / "photos") == digests(tmp_path / "undisturbed" / "photos")
    columns = ["photo", "face_index", "status", "reason", "unit", "output", "loss_end", "identity_input_dlib"]
    pd.testing.assert_frame_equal(read_manifest(out)[columns], read_manifest(tmp_path / "undisturbed")[columns])
    assert not list(out.rglob("*.tmp"))


def test_a_full_disk_stops_the_run_in_order(
    astronaut: np.ndarray,
    tiny_prior_dir: Path,
    prefect_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    portrait(astronaut).save(source / "a.png")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    arguments = {"paths": [str(source)], "out": str(tmp_path / "out"), "prior": str(tiny_prior_dir), **QUICK}
    with monkeypatch.context() as patch:
        patch.setattr("tasks.restore.save_image", full)
        with pytest.raises(RgcpError, match=r"No space left.*run the same command again"):
            archive(**arguments)
    archive(**arguments)
    assert (read_manifest(tmp_path / "out").status == "restored").all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "best"}, "Unknown preset 'best'"),
        ({"prior": "nobody"}, "No prior 'nobody'"),
        ({"settings": {"restore": {"noise_step": 5000}}}, "T = 1000; got 5000"),
        ({"device": "cuda:7"}, "no CUDA device"),
        ({"paths": ["nowhere"]}, "No such file or folder"),
        ({"out": "in/restored"}, "lies inside the input"),
        ({"out": "."}, "lies inside the output"),
    ],
)
def test_wrong_calls_are_refused_before_any_work(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_prior_dir: Path
) -> None:
    from flows.archive import prepare

    if "cuda" in message.lower() and __import__("torch").cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    arguments: dict[str, Any] = {
        "paths": ["in"],
        "out": "out",
        "prior": str(tiny_prior_dir),
        "preset": "fast",
        "seed": 0,
        "settings": None,
        "framing": "photos",
        "keep": "albums",
        "device": "cpu",
    }
    with pytest.raises(UserError, match=message):
        prepare(**(arguments | changes))


def test_two_runs_on_one_folder_refuse_each_other(tmp_path: Path) -> None:
    from flows.archive import only_run

    with only_run(tmp_path), pytest.raises(UserError, match="Another run is working on"), only_run(tmp_path):
        pass


def test_weights_that_do_not_match_their_card_are_refused(tiny_prior_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_prior_dir, broken)
    data = bytearray((broken / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (broken / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="do not match its card"):
        Prior.load(broken)


@pytest.mark.parametrize("fit", [8, 2], ids=["enough memory", "memory for two"])
def test_faces_that_share_a_batch_are_restored_as_each_alone(
    mixed: tuple[Path, dict[str, str]],
    tiny_prior_dir: Path,
    prefect_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fit: int,
) -> None:
    """An accelerator takes several faces in a step; where they do not fit into its memory, fewer."""
    batches: dict[str, list[int]] = {"album": [], "constrain": []}

    def noted(what: str, faces: int) -> None:
        if faces > fit:
            raise torch.cuda.OutOfMemoryError("out of memory")
        batches[what].append(faces)

    def albums(*arguments: Any, generators: list[Any], **options: Any) -> Any:
        noted("album", len(generators) // 2)
        return generate_album(*arguments, generators=generators, **options)

    def fine_tunings(prior: Prior, albums: list[Any], **options: Any) -> Any:
        noted("constrain", len(albums))
        return constrain_together(prior, albums, **options)

    changes = {"precision": "float32", "constrain": {"iterations": 3, "parameters": "norms", "learning_rate": 1e-2}}
    options = QUICK | {"settings": QUICK["settings"] | changes, "prior": str(tiny_prior_dir)}
    monkeypatch.setattr("tasks.album.generate_album", albums)
    monkeypatch.setattr("tasks.constrain.constrain_together", fine_tunings)
    for name in ("alone", "together"):
        for task in ("album", "constrain"):
            monkeypatch.setattr(f"tasks.{task}.gains_by_sharing", lambda device, name=name: name == "together")
        archive([str(mixed[0] / "three.png"), str(mixed[0] / "gray.png")], str(tmp_path / name), **options)
    alone, together = (read_manifest(tmp_path / name).sort_values("unit") for name in ("alone", "together"))
    shared = [4] if fit == 8 else [2, 2]
    assert batches == {"album": [1] * 4 + shared, "constrain": shared}
    assert list(alone.status) == ["restored"] * 4
    assert list(together.constrain_iterations) == [3] * 4
    np.testing.assert_allclose(together.loss_end, alone.loss_end, rtol=1e-4)
    assert (alone.loss_start != alone.loss_end).all()
    for unit in alone.unit:
        for picture in ("album/01.png", "restored.png"):
            assert most_apart(*(tmp_path / name / "faces" / unit / picture for name in ("alone", "together"))) <= 1


def most_apart(a: Path, b: Path) -> int:
    """Largest difference of two pictures, in levels of 255."""
    return int(abs(np.asarray(Image.open(a), int) - np.asarray(Image.open(b), int)).max())


def test_a_compiled_run_keeps_to_one_network_and_restores_the_same(
    mixed: tuple[Path, dict[str, str]],
    tiny_prior_dir: Path,
    prefect_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is compiled belongs to that network: its weights are set anew for every face, in place."""
    networks: list[UNet] = []

    def forward(network: UNet, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        networks.append(network)
        return network(x_t, t)

    monkeypatch.setattr("rgcp_core.compute._compiled_forward", lambda cuda_graphs: forward)
    for name, compiled in (("plain", False), ("compiled", True)):
        options = QUICK | {"settings": QUICK["settings"] | {"compiled": compiled}, "prior": str(tiny_prior_dir)}
        archive([str(mixed[0] / "three.png")], str(tmp_path / name), **options)
        # the prior's, which draws the albums, and the one that works
        assert len({id(network) for network in networks}) == (2 if compiled else 0)
    units = list(read_manifest(tmp_path / "compiled").unit)
    assert len(units) == 3
    for unit in units:
        assert most_apart(*(tmp_path / name / "faces" / unit / "restored.png" for name in ("plain", "compiled"))) == 0


def test_a_run_that_cannot_be_compiled_does_not_start(
    mixed: tuple[Path, dict[str, str]], tiny_prior_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rgcp_core.compute.shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        prepare([str(mixed[0])], str(tmp_path / "out"), str(tiny_prior_dir), settings={"compiled": True})
