"""What an unattended archive meets: signals, short memory, lost photos, a lost API; plans, load tests, deployments."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from rich.console import Console

import tasks.album
import tasks.constrain
from flows.archive import archive, prepare
from flows.inputs import chunks
from flows.one_run import only_run
from flows.plan import plan_archive
from flows.progress import to_ui
from flows.runners import on_runner
from rgcp_core.delta import read_delta
from rgcp_core.errors import UnitError, UserError
from rgcp_core.images import load_image, to_uint8
from rgcp_core.manifest import read_manifest
from rgcp_core.prior import Prior
from rgcp_core.randomness import stream
from rgcp_core.sampling import restore
from tasks.device import in_fitting_batches, in_groups, slot
from tasks.units import FaceFound

REPOSITORY = Path(__file__).parents[2]
QUICK: dict[str, Any] = {
    "preset": "fast",
    "framing": "window",
    "settings": {"album": {"size": 3, "steps": 4}, "constrain": {"iterations": 2}},
}
OUT_OF_MEMORY = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture
def crops(tmp_path: Path) -> Path:
    """Three aligned crops."""
    folder = tmp_path / "in"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


# Memory


def test_batches_are_halved_until_they_fit() -> None:
    tried: list[int] = []

    def draw(first: int, end: int) -> torch.Tensor:
        tried.append(end - first)
        if end - first > 2:
            raise OUT_OF_MEMORY
        return torch.arange(first, end)

    assert in_fitting_batches(draw, 7).tolist() == list(range(7))
    assert tried == [7, 4, 2, 2, 2, 1]


@pytest.mark.parametrize(
    ("count", "fit", "whole_only", "expected"),
    [
        (20, 8, False, [8, 8, 4]),
        (20, 8, True, [8, 8]),
        (17, 8, False, [8, 8]),  # one alone gains nothing
        (1, 8, False, []),
        (7, 3, False, [2, 2, 2]),
        (7, 3, True, []),
        (9, 3, True, [2, 2, 2, 2]),
        (9, 1, False, []),
    ],
)
def test_faces_are_taken_in_groups_that_fit(count: int, fit: int, whole_only: bool, expected: list[int]) -> None:
    done: list[int] = []
    faces = [FaceFound(str(i), 0, "key") for i in range(count)]

    def work(group: Sequence[FaceFound]) -> None:
        if len(group) > fit:
            raise OUT_OF_MEMORY
        assert [face.unit for face in group] == [str(sum(done) + i) for i in range(len(group))]
        done.append(len(group))

    in_groups(faces, work, whole_only=whole_only)
    assert done == expected


def test_one_face_that_does_not_fit_fails_alone(
    crops: Path, tiny_prior_dir: Path, prefect_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_memory, fine_tune = tasks.album.generate_album, tasks.constrain.constrain_prior
    units: list[str] = []

    def album_of_one(*arguments: Any, generators: Any, **named: Any) -> torch.Tensor:
        if len(generators) > 1:
            raise OUT_OF_MEMORY
        return small_memory(*arguments, generators=generators, **named)

    def not_the_second(*arguments: Any, unit: str, **named: Any) -> Any:
        units.append(unit)
        if len(units) == 2:
            raise OUT_OF_MEMORY
        return fine_tune(*arguments, unit=unit, **named)

    monkeypatch.setattr("tasks.album.generate_album", album_of_one)
    monkeypatch.setattr("tasks.constrain.constrain_prior", not_the_second)
    call = {"paths": [str(crops)], "prior": str(tiny_prior_dir), **QUICK}
    archive(out=str(tmp_path / "short"), **call)
    rows = read_manifest(tmp_path / "short").set_index("unit")
    assert rows.loc[units[1], "status"] == "failed:out_of_memory"
    assert "too little memory" in rows.loc[units[1], "reason"]
    assert sorted(rows["status"]) == ["failed:out_of_memory", "restored", "restored"]

    monkeypatch.undo()
    archive(out=str(tmp_path / "short"), **call)  # the next run tries the failed one again
    archive(out=str(tmp_path / "ample"), **call)
    assert (read_manifest(tmp_path / "short").status == "restored").all()
    for unit in units:  # one by one or all at once: the same picture up to the order of sums
        a, b = (
            np.asarray(Image.open(tmp_path / name / "faces" / unit / "restored.png"), int)
            for name in ("short", "ample")
        )
        assert np.abs(a - b).max() <= 1


# Photos that come and go


def test_a_photo_deleted_under_way_is_accounted_for(
    crops: Path, tiny_prior_dir: Path, prefect_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = tasks.album.generate_album

    def deleting(*arguments: Any, **named: Any) -> torch.Tensor:
        (crops / "1.png").unlink(missing_ok=True)
        return draw(*arguments, **named)

    monkeypatch.setattr("tasks.album.generate_album", deleting)
    call = {"paths": [str(crops)], "out": str(tmp_path / "out"), "prior": str(tiny_prior_dir), "chunk": 8, **QUICK}
    archive(**call)
    rows = read_manifest(tmp_path / "out").set_index("photo")["status"]
    assert rows["1.png"] == "failed:vanished"
    assert (rows.drop("1.png") == "restored").all()
    assert not (tmp_path / "out" / "photos" / "1.png").exists()
    archive(**call)
    assert read_manifest(tmp_path / "out")["photo"].tolist() == ["0.png", "2.png"]


def test_a_new_photo_changes_few_chunks(crops: Path, tiny_prior_dir: Path, tmp_path: Path) -> None:
    job, card = prepare([str(crops)], str(tmp_path / "out"), str(tiny_prior_dir))
    names = [f"{i:04d}.jpg" for i in range(1000)]
    before = [each.key for each in chunks(job, card, names, 4)]
    after = list(chunks(job, card, ["0000a.jpg", *names], 4))
    assert len({each.key for each in after} - set(before)) <= 2
    assert sum(len(each.photos) for each in after) == 1001
    assert max(len(each.photos) for each in after) <= 8


def test_the_watch_runs_again_when_photos_change(crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import flows.run

    runs, looks = [], []

    def sleep(_: float) -> None:
        looks.append(len(runs))
        if len(looks) == 2:
            (crops / "new.png").write_bytes(b"")
        if len(looks) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("flows.run.run_archive", lambda *_, **__: runs.append(1))
    monkeypatch.setattr("flows.run.prefect_api", nullcontext)
    monkeypatch.setattr("time.sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        flows.run.watch_archive([str(crops)], tmp_path / "out", Console(quiet=True), 60)
    assert looks == [1, 1, 2, 2]


# What is kept


def test_a_kept_prior_restores_the_same_picture(
    crops: Path, tiny_prior: Prior, tiny_prior_dir: Path, prefect_server: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    learning = {**QUICK["settings"], "constrain": {"iterations": 20, "learning_rate": 1e-3}}
    archive([str(crops)], str(out), prior=str(tiny_prior_dir), keep="all", **{**QUICK, "settings": learning})
    prior = Prior.load(tiny_prior_dir)
    settings = json.loads((out / "run.json").read_text())["settings"]["restore"]
    weights = (tiny_prior_dir / "model.safetensors").stat().st_size  # two bytes each
    for unit, noise_step in read_manifest(out)[["unit", "noise_step"]].itertuples(index=False):
        folder = out / "faces" / unit
        kept = read_delta(prior, folder / "constrained.delta")
        moved = [
            float((a - b).abs().max())
            for a, b in zip(kept.network.parameters(), prior.network.parameters(), strict=True)
        ]
        assert max(moved) > 1e-3, "it is the constrained prior and not the prior"
        again = restore(
            kept.network, load_image(folder / "input.png")[None], prior.schedule, noise_step=noise_step,
            steps=settings["steps"], generators=[stream(0, unit, "restore")],
        )  # fmt: skip
        kept_pixels = to_uint8(load_image(folder / "restored.png")).astype(int)
        assert np.abs(to_uint8(again[0]).astype(int) - kept_pixels).max() <= 2
        assert (folder / "constrained.delta").stat().st_size < 0.6 * weights
    other = replace(prior, card=prior.card.model_copy(update={"sha256": "0" * 64}))
    with pytest.raises(UserError, match="belongs to the prior"):
        read_delta(other, folder / "constrained.delta")
    (tmp_path / "text").write_text("no delta at all")
    with pytest.raises(UserError, match="is not the difference"):
        read_delta(prior, tmp_path / "text")


# Signals


def test_sigterm_stops_in_order(
    astronaut: np.ndarray, tiny_prior_dir: Path, prefect_server: str, tmp_path: Path
) -> None:
    """Exit code 143 within seconds although a face would take minutes, the folder free, no process left."""
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    Image.fromarray(astronaut).resize((220, 220)).save(source / "a.png")
    call = {
        "paths": [str(source)], "prior": str(tiny_prior_dir), "preset": "fast",
        "settings": {
            "album": {"size": 2, "steps": 4}, "constrain": {"iterations": 100_000},
            "faces": {"detector": "offline", "max_enlargement": 20},
        },
    }  # fmt: skip
    code = "import json, sys; from pathlib import Path; from rich.console import Console\n"
    code += "from flows.run import run_archive\n"
    code += "run_archive(**json.loads(sys.argv[1]), out=Path(sys.argv[2]), console=Console(stderr=True))"
    environment = os.environ | {"PREFECT_API_URL": prefect_server, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(call), str(out)], env=environment, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 120
    while not list(out.glob("faces/*/album")) and run.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)
    assert run.poll() is None
    children = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM
    assert "SIGTERM" in errors
    assert not psutil.wait_procs(children, timeout=10)[1]
    with only_run(out):
        pass


def test_a_killed_run_leaves_no_server(tmp_path: Path) -> None:
    code = "import time; from flows.server import *; print(start_server(free_port()).pid, flush=True); time.sleep(99)"
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    run = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment | {"PREFECT_HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    keeper = psutil.Process(int(run.stdout.readline()))
    end = time.monotonic() + 60
    while not keeper.children() and time.monotonic() < end:
        time.sleep(0.05)
    family = [keeper, *keeper.children(recursive=True)]
    assert len(family) >= 2
    run.kill()
    run.wait()
    assert not psutil.wait_procs(family, timeout=30)[1]


def test_the_next_run_tidies_up_after_a_killed_one(prefect_server: str, tmp_path: Path) -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.states import Running

    @flow
    def killed() -> None:
        """Never runs: only its record is wanted."""

    with get_client(sync_client=True) as client:
        run = client.create_flow_run(killed, state=Running())
        note = tmp_path / ".rgcp" / "running.json"
        note.parent.mkdir()
        note.write_text(json.dumps({"pid": 1, "host": "elsewhere", "flow_run_id": str(run.id)}))
        half = tmp_path / "faces" / "unit" / ".0123.tmp"
        half.parent.mkdir(parents=True)
        half.write_bytes(b"half a pict")
        with only_run(tmp_path):
            assert not half.exists()
            assert client.read_flow_run(run.id).state.is_crashed()  # type: ignore[union-attr]
        assert not note.exists()


# The Prefect API


def test_a_lost_api_does_not_stop_the_news(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def lost() -> None:
        calls.append(1)
        raise httpx.ConnectError("Connection refused")

    monkeypatch.setattr("flows.progress._lost_at", float("-inf"))
    assert to_ui(lost) is None
    assert to_ui(lost) is None
    assert len(calls) == 1, "an API that was lost is left alone for a while"


def test_one_slot_is_never_held_twice(prefect_server: str) -> None:
    inside, most = 0, 0
    count = threading.Lock()

    def work(_: int) -> None:
        nonlocal inside, most
        with slot("rgcp-test-cuda:0"):
            with count:
                inside += 1
                most = max(most, inside)
            time.sleep(0.3)
            with count:
                inside -= 1

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(work, range(2)))
    assert most == 1


def test_deployments(prefect_server: str, tmp_path: Path) -> None:
    from prefect.client.orchestration import get_client

    from flows.deploy import deploy

    text = (REPOSITORY / "prefect.yaml").read_text()
    assert str(REPOSITORY) not in text
    assert "/home" not in text
    names = deploy(tmp_path / "photos", tmp_path / "out", tmp_path / "benchmark", at_a_time=1)
    assert names == ["nightly-archive", "prior-training", "weekly-benchmark"]
    with get_client(sync_client=True) as client:
        nightly = client.read_deployment_by_name("archive/nightly-archive")
        assert nightly.parameters == {"paths": [str(tmp_path / "photos")], "out": str(tmp_path / "out")}
        assert [schedule.active for schedule in nightly.schedules] == [False]
        described = nightly.parameter_openapi_schema["properties"].values()  # type: ignore[index]
        assert all(each.get("description") for each in described), "the UI's form explains every parameter"
        automations = client.request("POST", "/automations/filter", json={}).json()
        assert [each["trigger"]["within"] for each in automations] == [90.0]


# Plans and load tests


def test_a_load_test_never_passes_for_a_restoration(
    crops: Path, tiny_prior_dir: Path, prefect_server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = {"prior": str(tiny_prior_dir), "chunk": 1, **QUICK}
    out = tmp_path / "out"
    plan = plan_archive([str(crops)], out, Console(quiet=True), **call)
    assert (plan.photos, plan.photos_done, plan.chunks, plan.faces) == (3, 0, 3, 3)
    assert plan.bytes_in == sum(path.stat().st_size for path in crops.iterdir())
    assert plan.hours > 0
    assert plan.bytes_out > plan.bytes_in
    listing = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[1:] for line in listing] == [["to do", "1", f"{i}.png"] for i in range(3)]
    assert not out.exists(), "a plan writes nothing"

    archive([str(crops)], str(out), device="stub", **call)
    rows = read_manifest(out)
    assert (rows.status == "skipped:stub").all()
    assert rows.reason.str.contains("not restored").all()
    assert plan_archive([str(crops)], out, Console(quiet=True), device="stub", **call).photos_done == 3
    assert plan_archive([str(crops)], out, Console(quiet=True), **call).photos_done == 0

    archive([str(crops)], str(out), **call)
    assert (read_manifest(out).status == "restored").all()
    unit = read_manifest(out).unit.iloc[0]
    a, b = (Image.open(out / "faces" / unit / name) for name in ("input.png", "restored.png"))
    assert not np.array_equal(np.asarray(a), np.asarray(b))


def test_a_plan_times_steps_as_the_run_will_compute_them(
    crops: Path, tiny_prior_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happens once, before the first step, is not multiplied by the number of steps."""
    clock = [0.0]
    computed: set[tuple[str, bool]] = set()

    def loop(seconds: float, on_step: Any) -> None:
        clock[0] += 100.0
        for i in range(3):
            clock[0] += seconds
            on_step(i + 1, 3)

    def fine_tuning(*_: Any, precision: str, compiled: bool, on_step: Any, **__: Any) -> None:
        computed.add((precision, compiled))
        loop(3.0, on_step)

    def network(_: Any, precision: str, compiled: bool) -> nullcontext[None]:
        computed.add((precision, compiled))
        return nullcontext()

    monkeypatch.setattr("flows.plan.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("flows.plan.computing", network)
    monkeypatch.setattr("flows.plan.constrain_prior", fine_tuning)
    monkeypatch.setattr(
        "flows.plan.generate_album",
        lambda *_, guidance_interval, on_step, **__: loop(2.0 + 5 * guidance_interval, on_step),
    )
    monkeypatch.setattr("flows.plan.restore", lambda *_, on_step, **__: loop(1.0, on_step))
    changes = {
        "precision": "tf32",
        "compiled": True,
        "album": {"size": 3, "noise_step": 40, "steps": 20, "guidance_interval": 10},
        "constrain": {"iterations": 50},
        "restore": {"noise_step": 30, "steps": None},
    }
    call = QUICK | {"settings": changes, "prior": str(tiny_prior_dir)}
    plan = plan_archive([str(crops)], tmp_path / "out", Console(quiet=True), **call)
    a_face = 16 * 2 + 4 * (2 + 5) + 50 * 3 + 30 * 1
    assert plan.hours * 3600 == pytest.approx(3 * a_face)
    assert computed == {("tf32", True)}


def test_runners_that_are_not_there_are_named() -> None:
    with pytest.raises(UserError, match="Unknown runner 'slurm'; there are: local, dask, ray"):
        on_runner(archive, "slurm")
    assert on_runner(archive, "local") is archive


@pytest.mark.skipif("RGCP_TEST_CLUSTERS" not in os.environ, reason="set RGCP_TEST_CLUSTERS=1: it takes two minutes")
def test_dask_goes_on_when_a_worker_is_killed(prefect_server: str) -> None:
    command = [sys.executable, "benchmarks/kills.py", "--photos", "8", "--kills", "1", "--runner", "dask"]
    subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"PREFECT_API_URL": prefect_server}, check=True)


def test_a_unit_error_in_a_small_batch_is_passed_on() -> None:
    def draw(first: int, end: int) -> torch.Tensor:
        raise UnitError("not_finite", "NaN")

    with pytest.raises(UnitError, match="NaN"):
        in_fitting_batches(draw, 4)
