"""Photos and results at addresses: what is stored must be what a local run makes, through stops and other machines."""

import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from photos import digests
from PIL import Image

from flows.archive import archive
from flows.storage import Place, find_storage
from rgcp_core.errors import RgcpError, UserError
from rgcp_core.manifest import read_manifest, read_table


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Crops in two folders, a file that is no photo, a hidden one, and a broken one."""
    folder = tmp_path / "scans"
    draw = np.random.default_rng(0)
    for name in ("0.png", "1.png", "2.png", "inner/3 ä.png", "inner/4.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / name)
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no photo")
    return folder


@pytest.fixture
def run(tiny_prior_dir: Path, prefect_server: str) -> Any:
    """Run the flow without a network: what is stored does not hang on what a restoration looks like."""

    def call(source: str, out: str, work: Path | None = None, **options: Any) -> dict[str, int]:
        options = {"prior": str(tiny_prior_dir), "framing": "window", "device": "stub", "chunk": 2} | options
        return archive([source], out, work=str(work) if work else None, **options).counts

    return call


def check_same(stored: Path, local: Path) -> None:
    """The same photos and faces, byte for byte but for the times in records, and the same rows."""
    assert digests(stored / "photos") == digests(local / "photos")
    faces = [{k: v for k, v in digests(out / "faces").items() if k.endswith(".png")} for out in (stored, local)]
    assert faces[0] == faces[1]
    assert set(digests(stored / "faces")) == set(digests(local / "faces"))
    rows = [read_manifest(out)[["photo", "photo_sha256", "unit", "status"]] for out in (stored, local)]
    assert rows[0].equals(rows[1])
    assert (stored / "report.html").is_file()
    assert not list(stored.rglob("*.tmp"))


def test_a_stop_and_another_machine(run: Any, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, stored, local = f"file://{scans}", tmp_path / "stored", tmp_path / "local"
    counts = run(str(scans), str(local))
    assert counts["photos"] == 6

    put, done = Place.put, []

    def torn(self: Place, path: Path, name: str) -> None:
        if len(done) == 1:
            raise RgcpError("The connection is gone.")
        put(self, path, name)
        done.extend([name] if name.endswith(".parquet") else [])

    monkeypatch.setattr(Place, "put", torn)
    with pytest.raises(RgcpError, match="connection is gone"):
        run(source, f"file://{stored}", tmp_path / "work")
    monkeypatch.undo()
    assert len(list(stored.glob(".rgcp/parts/*"))) == 1
    times = {path: path.stat().st_mtime_ns for path in stored.rglob("*.png")}

    assert run(source, f"file://{stored}", tmp_path / "another") == counts
    check_same(stored, local)
    assert {path: path.stat().st_mtime_ns for path in times} == times, "what was stored is not stored again"
    assert not list((tmp_path / "another" / "in").rglob("*.png")), "photos go when they are done"

    # The one that failed is tried again, a new one is done; both in their chunks only.
    Image.new("RGB", (16, 16)).save(scans / "broken.png")
    Image.new("RGB", (16, 16), (9, 9, 9)).save(scans / "inner" / "5.png")
    assert run(source, f"file://{stored}", tmp_path / "third")["photos"] == 7
    run(str(scans), str(local))
    check_same(stored, local)
    parts = {path.name for path in stored.glob(".rgcp/parts/*")}
    assert parts == {path.name for path in (tmp_path / "third" / "out" / ".rgcp" / "parts").iterdir()}


def test_results_that_were_not_stored_are_stored_by_the_next_run(
    run: Any, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Done here and killed before it was stored: nothing is done again, all is there in the end."""
    call = (f"file://{scans}", f"file://{tmp_path / 'stored'}", tmp_path / "work")
    monkeypatch.setattr("flows.storage.Transfer.store", lambda *_: None)
    run(*call)
    assert not (tmp_path / "stored" / "photos").exists()
    monkeypatch.undo()
    (scans / "broken.png").unlink()  # the others are done, and finished chunks are not even fetched
    faces = {path: path.stat().st_mtime_ns for path in (tmp_path / "work/out/faces").rglob("*.png")}
    run(*call)
    assert {path: path.stat().st_mtime_ns for path in faces} == faces
    assert len(list((tmp_path / "stored" / "photos").rglob("*.png"))) == 5


def test_a_zip_file_is_read_and_memory_is_written(run: Any, scans: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "scans.zip", "w") as file:
        for path in scans.rglob("*"):
            file.write(path, path.relative_to(scans))
    source, local = f"zip://::file://{tmp_path / 'scans.zip'}", tmp_path / "local"
    run(source, "memory://rgcp-test", tmp_path / "work")
    run(str(scans), str(local))
    fsspec.filesystem("memory").get("/rgcp-test/", str(tmp_path / "stored"), recursive=True)
    check_same(tmp_path / "stored", local)


def test_a_photo_that_goes_under_way_is_accounted_for(
    run: Any, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = Place.get

    def too_late(self: Place, name: str, path: Path) -> None:
        if name == "1.png":
            (scans / name).unlink()
        get(self, name, path)

    monkeypatch.setattr(Place, "get", too_late)
    out = tmp_path / "out"
    run(f"file://{scans}", str(out), tmp_path / "work")
    assert dict(read_table(out, ["photo", "status"]).to_pandas().to_numpy())["1.png"] == "failed:vanished"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server on the loopback with an empty bucket."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = moto.ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    url = f"http://127.0.0.1:{port}"
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "ENDPOINT_URL": url, "REGION": "eu-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("archive")
    yield "s3://archive"
    server.stop()


def test_s3(run: Any, scans: Path, tmp_path: Path, bucket: str) -> None:
    (scans / "broken.png").unlink()  # would be tried again
    s3 = fsspec.filesystem("s3", skip_instance_cache=True)
    s3.put(f"{scans}/", "archive/in/", recursive=True)
    counts = run(f"{bucket}/in", f"{bucket}/out", tmp_path / "work")
    run(str(scans), str(tmp_path / "local"))
    s3.invalidate_cache()
    s3.get("archive/out/", str(tmp_path / "stored"), recursive=True)
    check_same(tmp_path / "stored", tmp_path / "local")
    before = {path: entry["LastModified"] for path, entry in s3.find("archive/out/faces", detail=True).items()}
    assert run(f"{bucket}/in", f"{bucket}/out", tmp_path / "another") == counts
    s3.invalidate_cache()
    after = {path: entry["LastModified"] for path, entry in s3.find("archive/out/faces", detail=True).items()}
    assert len(before) >= 3 * 5, "of each face its input, its result and its record"
    assert after == before, "what is stored is not stored again"
    with pytest.raises(UserError, match="There is no folder s3://no-such-bucket/in"):
        run("s3://no-such-bucket/in", str(tmp_path / "out"), tmp_path / "work2")


def test_wrong_addresses_are_refused(tmp_path: Path) -> None:
    work = str(tmp_path)
    fsspec.filesystem("memory").pipe("/in/a.png", b"")
    with pytest.raises(UserError, match="There is no folder"):
        find_storage(["memory://nowhere"], "out", work)
    with pytest.raises(UserError, match="--work"):
        find_storage(["memory://in"], "out", None)
    with pytest.raises(UserError, match="one address"):
        find_storage(["memory://a", "memory://b"], "out", work)
    with pytest.raises(UserError, match="inside each other"):
        find_storage(["memory://in"], "memory://in/out", work)
    with pytest.raises(UserError, match="no address that fsspec knows"):
        find_storage(["gopher://in"], "out", work)
    assert find_storage(["memory://in"], "memory://inner", work).out == str(tmp_path / "out")
