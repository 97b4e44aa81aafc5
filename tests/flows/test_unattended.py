"""What a night brings: a disk that fills up, two runs that want one accelerator, other wishes about what is kept."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photos import digests
from PIL import Image

import tasks.album
import tasks.constrain
from flows.archive import archive
from flows.one_run import only_run
from rgcp_core.errors import RgcpError
from rgcp_core.manifest import read_manifest

REPOSITORY = Path(__file__).parents[2]
QUICK: dict[str, Any] = {
    "preset": "fast",
    "framing": "window",
    "settings": {"album": {"size": 2, "steps": 3}, "constrain": {"iterations": 1}},
}


@pytest.fixture
def crops(tmp_path: Path) -> Path:
    """Three aligned crops."""
    folder = tmp_path / "in"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"No disk can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, leave: int) -> None:
    """Leave only so many bytes free."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        for size in (65536, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
        file.truncate(file.tell() - leave)


@pytest.mark.parametrize(("stage", "leave"), [("album", 0), ("constrain", 200_000)])  # too little for weights
def test_a_full_disk_stops_the_run_in_order(
    stage: str,
    leave: int,
    crops: Path,
    small_disk: Path,
    tiny_prior_dir: Path,
    prefect_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One sentence, no torn file; when there is space again, the same call ends with what an ample disk gives."""
    monkeypatch.setattr("flows.archive.FREE_BYTES", 0)
    out, faces = small_disk / "out", []
    call = {"paths": [str(crops)], "prior": str(tiny_prior_dir), "chunk": 1, **QUICK}
    name, module = {"album": ("generate_album", tasks.album), "constrain": ("constrain_prior", tasks.constrain)}[stage]
    work = getattr(module, name)

    def filling(*arguments: Any, **named: Any) -> Any:
        result = work(*arguments, **named)
        faces.append(1)
        if len(faces) == 2:
            fill(small_disk, leave)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(module, name, filling)
        with pytest.raises(
            RgcpError, match=r"^The run stopped: .*No space left on device.* run the same command again\."
        ):
            archive(out=str(out), **call)
    assert len(faces) == 2
    assert len(list(out.glob(".rgcp/parts/*.parquet"))) == 1, "the chunk before is done, the ones after are not"
    for path in out.rglob("*"):
        if path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".json":
            json.loads(path.read_text())
    assert not list(out.rglob("*.tmp"))

    (small_disk / "ballast").unlink()
    archive(out=str(out), **call)
    archive(out=str(tmp_path / "ample"), **call)
    assert digests(out / "photos") == digests(tmp_path / "ample" / "photos")
    columns = ["photo", "unit", "status"]
    assert read_manifest(out)[columns].equals(read_manifest(tmp_path / "ample")[columns])
    assert (read_manifest(out).status == "restored").all()


def test_what_a_killed_worker_left_goes_with_the_end_of_the_run(prefect_server: str, tmp_path: Path) -> None:
    half, whole = tmp_path / "faces" / "unit" / ".0123.tmp", tmp_path / "faces" / "unit" / "restored.png"
    half.parent.mkdir(parents=True)
    with only_run(tmp_path):
        half.write_bytes(b"half a pict")
        whole.write_bytes(b"a picture")
    assert not half.exists()
    assert whole.exists()


HOLD = """
import sys, time
import torch
from tasks.device import device_slot
print("ready", flush=True)
sys.stdin.readline()
for _ in range(3):
    with device_slot(torch.device("cuda", 7)):
        start = time.monotonic()
        time.sleep(0.5)
        print(start, time.monotonic(), flush=True)
"""


def test_two_processes_never_hold_one_accelerator(prefect_server: str) -> None:
    """Both start at the same moment, when the limit does not exist yet; the clock is the machine's."""
    environment = os.environ | {"PREFECT_API_URL": prefect_server, "OMP_NUM_THREADS": "1"}
    holders = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD], cwd=REPOSITORY, env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    for holder in holders:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
    for holder in holders:
        assert holder.stdin is not None
        holder.stdin.write("\n")
        holder.stdin.flush()
    lines = [line for holder in holders for line in holder.communicate(timeout=120)[0].splitlines()]
    assert [holder.returncode for holder in holders] == [0, 0]
    held = sorted(tuple(map(float, line.split())) for line in lines)
    assert len(held) == 6
    gaps = [after[0] - before[1] for before, after in itertools.pairwise(held)]
    assert min(gaps) >= 0, f"held twice at the same time: {held}"


def test_a_resumed_run_keeps_the_constrained_priors(
    crops: Path, tiny_prior_dir: Path, prefect_server: str, tmp_path: Path
) -> None:
    """Also of faces that an earlier run restored and whose priors it dropped; never one of another picture."""
    out = tmp_path / "out"

    def run(**options: Any) -> dict[Path, int]:
        archive([str(crops)], str(out), prior=str(tiny_prior_dir), **(QUICK | options))
        return {path: path.stat().st_mtime_ns for path in out.glob("faces/*/constrained.delta")}

    assert run() == {}
    before = {path: path.read_bytes() for path in out.glob("faces/*/restored.png")}
    kept = run(keep="all")
    assert len(kept) == 3
    assert {path: path.read_bytes() for path in before} == before
    one = next(iter(kept))
    one.unlink()
    again = run(keep="all")
    assert set(again) == set(kept)
    assert {path for path in kept if again[path] != kept[path]} == {one}, "the others are not done again"
    assert run() == again, "what is kept stays"
    assert run(seed=1) == {}, "those belonged to other pictures"
