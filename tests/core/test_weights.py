import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rgcp_core import weights
from rgcp_core.errors import UserError

CONTENT = b"the weights of a network"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """An empty weights folder and an empty torch hub, in place of this machine's."""
    monkeypatch.setenv("RGCP_WEIGHTS_DIR", str(tmp_path / "weights"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "weights", tmp_path / "hub" / "checkpoints"


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Weights of which `CONTENT` is the published file, at a URL of this machine."""
    source = tmp_path / "source.bin"
    source.write_bytes(CONTENT)
    entry = weights.Weights(
        name="stub",
        file="stub.bin",
        purpose="a test",
        without="nothing",
        licence="none",
        url=source.as_uri(),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    monkeypatch.setattr(weights, "WEIGHTS", (*weights.WEIGHTS, entry))
    return source


def test_the_table_is_complete():
    names = [entry.name for entry in weights.WEIGHTS]
    assert len(set(names)) == len(names)
    for entry in weights.WEIGHTS:
        assert entry.url is not None or entry.package is not None
        assert entry.sha256 is None or len(bytes.fromhex(entry.sha256)) == 32
        # torch hub's convention: the name ends in the first eight digits of the sha256
        digits = Path(entry.file).stem.rsplit("-", 1)[-1]
        if entry.sha256 and len(digits) == 8 and entry.file.endswith(".pth"):
            assert entry.sha256.startswith(digits)


def test_own_folder_comes_before_the_hub(folders):
    own, hub = folders
    assert weights.find_weights("musiq_koniq") is None
    for folder in (hub, own):
        folder.mkdir(parents=True)
        (folder / "musiq_koniq_ckpt-e95806b9.pth").write_bytes(b"x")
        assert weights.find_weights("musiq_koniq") == folder / "musiq_koniq_ckpt-e95806b9.pth"


def test_both_names_of_one_network_are_found(folders):
    own, _ = folders
    own.mkdir()
    for file in ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"):
        (own / file).write_bytes(b"x")
        assert weights.require_weights("fid_inception") == own / file
        (own / file).unlink()


def test_packages_are_searched_without_being_imported(folders):
    # face_recognition_models imports pkg_resources, which a current setuptools no longer has
    assert weights.require_weights("dlib_resnet_v1").is_file()
    assert weights.require_weights("dlib_landmarks5").is_file()
    assert "face_recognition_models" not in sys.modules


def test_what_is_missing_is_named(folders):
    with pytest.raises(UserError, match=r"recognition_arcface_ir_se50\.pth.*RGCP_WEIGHTS_DIR"):
        weights.require_weights("arcface_ir_se50")
    with pytest.raises(UserError, match="Known: retinaface_resnet50"):
        weights.find_weights("vgg")


def test_status_tells_published_from_other_files(folders, published):
    own, _ = folders
    by_name = {state.weights.name: state for state in weights.status()}
    assert by_name["stub"].path is None
    assert by_name["stub"].intact is None
    assert by_name["dlib_resnet_v1"].intact is True  # from its package
    own.mkdir()
    for content, intact in ((CONTENT, True), (b"other", False)):
        (own / "stub.bin").write_bytes(content)
        state = weights.status()[-1]
        assert (state.path, state.intact) == (own / "stub.bin", intact)


def test_download(folders, published):
    own, hub = folders
    seen = []
    path = weights.download("stub", progress=lambda done, total: seen.append((done, total)))
    assert path == own / "stub.bin"
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    del os.environ["RGCP_WEIGHTS_DIR"]  # the fixture puts it back
    assert weights.download("stub") == hub / "stub.bin"


@pytest.mark.parametrize("content", [b"another network", b"", None])
def test_a_bad_download_leaves_nothing(folders, published, content):
    own, _ = folders
    if content is None:
        published.unlink()
    else:
        published.write_bytes(content)
    with pytest.raises(UserError, match=r"could not be downloaded" if content is None else r"expected sha256"):
        weights.download("stub")
    assert list(own.iterdir()) == []


@pytest.mark.parametrize("name", ["niqe", "dlib_resnet_v1"])
def test_nothing_is_downloaded_without_a_sha256_or_a_place(folders, name, monkeypatch):
    monkeypatch.setattr(weights, "_fetch", lambda *_: pytest.fail("it was fetched"))
    with pytest.raises(UserError, match=r"put the file|pip install face_recognition_models"):
        weights.download(name)


class Malicious:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_only_tensors_are_loaded(tmp_path):
    state = {"a": torch.arange(3.0)}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pth")
    for file in ("a.safetensors", "a.pth"):
        assert torch.equal(weights.load_state_dict(tmp_path / file)["a"], state["a"])
    torch.save({"a": Malicious()}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="plain tensors"):
        weights.load_state_dict(tmp_path / "bad.pth")


def test_importing_and_looking_touch_no_network(tmp_path):
    code = """
import socket
def refuse(*args, **kwargs): raise AssertionError("something reached for the network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import torch
import rgcp_core.metrics as metrics
from rgcp_core import weights
weights.status()
faces = torch.zeros(1, 3, 64, 64)
values, unavailable = metrics.measure_faces(
    faces, faces, faces, which=metrics.METRICS + metrics.INPUT_METRICS, crop_window=(0, 0, 1, 1))
from rgcp_core.metrics.distribution import inception_extractor
try: inception_extractor()
except Exception as error: print(type(error).__name__, sorted(unavailable))
"""
    environment = os.environ | {"RGCP_WEIGHTS_DIR": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("UserError")
    assert "lpips_alex" in done.stdout
    assert list(tmp_path.iterdir()) == []
