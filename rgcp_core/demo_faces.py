"""A few clean faces for the demo benchmark: held-out ones of ../shared where they are, public-domain ones otherwise.

python -m rgcp_core.demo_faces OUT --count 4 --prior faces64
"""

import argparse
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

import rgcp_core
from rgcp_core.errors import UserError
from rgcp_core.faces.align import align_face, crop_face
from rgcp_core.faces.detect import gate_faces, load_detector
from rgcp_core.images import from_uint8, save_image
from rgcp_core.prior import find_prior, read_card

SHARED_DIR = "RGCP_SHARED_DIR"
"""Folder of the shared data; `../shared`, seen from the repository, when it is not set."""
Source = Literal["auto", "shared", "public"]
SHARED_WINDOW = (0.195, 0.285, 0.835, 0.925)
"""The part of the FFHQ square that the shared crops show."""
SIZE = 128


def shared_dir() -> Path:
    """Where the shared data are, if they are."""
    return Path(os.environ.get(SHARED_DIR) or Path(rgcp_core.__file__).parents[2] / "shared")


def write_demo_faces(out: Path, count: int, prior: str = "faces64", source: Source = "auto") -> str:
    """Write `count` clean crops of 128 px, framed as the prior's pictures, and say which source they are from.

    The public-domain source has two faces (NASA's portrait of Eileen Collins, the US Navy's of Grace Hopper).

    Raises:
        UserError: the source that was asked for is not here, or the prior frames faces otherwise than the shared crops.
    """
    window = read_card(find_prior(prior)).crop_window
    parquet = shared_dir() / "data" / "faces" / "faces128-val.parquet"
    if source == "auto":
        source = "shared" if parquet.is_file() and window == SHARED_WINDOW else "public"
    if source == "shared" and window != SHARED_WINDOW:
        raise UserError(f"The shared crops show the window {SHARED_WINDOW}, the prior {prior} wants {window}.")
    faces = _shared_faces(parquet, count) if source == "shared" else _public_faces(window)
    for name, crop in faces:
        save_image(from_uint8(crop), out / f"{name}.png")
    return source


def write_demo_people(out: Path, count: int) -> None:
    """Write the crops of the first `count` people of the shared data, a folder a person.

    Raises:
        UserError: the shared data are not here.
    """
    parquet = shared_dir() / "data" / "people" / "people128.parquet"
    if not parquet.is_file():
        raise UserError(f"The shared people {parquet} are not here. Set {SHARED_DIR} to the folder of the shared data.")
    rows = pq.read_table(parquet, columns=["image", "person", "name"]).to_pylist()
    chosen = sorted({row["person"] for row in rows})[:count]
    for row in rows:
        if row["person"] in chosen:
            with Image.open(io.BytesIO(row["image"])) as image:
                name = Path(row["name"]).stem
                save_image(from_uint8(np.asarray(image.convert("RGB"))), out / row["person"] / f"{name}.png")


def _shared_faces(parquet: Path, count: int) -> Iterator[tuple[str, np.ndarray]]:
    """Held-out crops, evenly spread over the file and thus over its sources."""
    try:
        table = pq.read_table(parquet, columns=["image"])
    except OSError as error:
        message = f"The shared faces {parquet} cannot be read. Set {SHARED_DIR}, or use --source public."
        raise UserError(message) from error
    for row in np.linspace(0, len(table) - 1, count).round().astype(int):
        with Image.open(io.BytesIO(table["image"][int(row)].as_py())) as image:
            yield f"heldout-{row:04d}", np.asarray(image.convert("RGB").resize((SIZE, SIZE)))


def _public_faces(window: tuple[float, float, float, float]) -> Iterator[tuple[str, np.ndarray]]:
    from matplotlib.cbook import get_sample_data
    from skimage.data import astronaut

    from rgcp_core.images import to_uint8

    with Image.open(str(get_sample_data("grace_hopper.jpg", asfileobj=False))) as image:
        hopper = np.asarray(image.convert("RGB"))
    detector = load_detector("offline")
    for name, photo in (("collins", astronaut()), ("hopper", hopper)):
        size = (photo.shape[1], photo.shape[0])
        gated = gate_faces(detector(photo), size, crop_window=window)
        face = next(face for face, reason in gated if reason is None)
        yield name, to_uint8(crop_face(photo, align_face(face.landmarks, SIZE, window)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the clean faces of the demo benchmark.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--prior", default="faces64")
    parser.add_argument("--people", action="store_true", help="people of the shared data instead, a folder a person")
    parser.add_argument("--source", choices=("auto", "shared", "public"), default="auto")
    arguments = parser.parse_args()
    if arguments.people:
        write_demo_people(arguments.out, arguments.count)
        raise SystemExit
    print("source:", write_demo_faces(arguments.out, arguments.count, arguments.prior, arguments.source))
