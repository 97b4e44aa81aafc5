"""Squares of a photo for priors of other things than faces: its middle, or where a table says.

Nothing is found and nothing is turned: the square is the prior's whole picture. Coordinates are those of
`rgcp_core.faces.align`: continuous pixels of the upright photo.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .errors import UnitError, UserError
from .faces.align import Alignment

COLUMNS = ("photo", "x", "y", "width", "height")


class Box(NamedTuple):
    """A rectangle of a photo in pixels; (x, y) is its upper left corner."""

    x: float
    y: float
    width: float
    height: float


def read_boxes(path: Path) -> dict[str, list[Box]]:
    """Read a table of boxes: CSV with the columns photo, x, y, width, height; several rows a photo are allowed.

    `photo` is the name below the folder that is restored, with forward slashes. Raises `UserError` naming the line
    where the file is no such table.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
            if missing:
                expected, got = ",".join(COLUMNS), ",".join(rows.fieldnames or ())
                raise UserError(f"{path}: expected the columns {expected} in its first line, got {got or 'nothing'}.")
            boxes: dict[str, list[Box]] = {}
            for row in rows:
                box = _box(row, f"{path}, line {rows.line_num}")
                of_photo = boxes.setdefault(row["photo"], [])
                if box not in of_photo:
                    of_photo.append(box)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"The table of boxes {path} cannot be read: {error}.") from error
    return boxes


def _box(row: dict[str, str], place: str) -> Box:
    try:
        box = Box(*(float(row[name]) for name in COLUMNS[1:]))
    except (TypeError, ValueError):
        values = ",".join(str(row[name]) for name in COLUMNS[1:])
        raise UserError(f"{place}: expected four numbers x,y,width,height, got {values}.") from None
    if not (np.isfinite(box).all() and box.width > 0 and box.height > 0):
        raise UserError(f"{place}: expected a box with a width and a height above 0, got {tuple(box)}.")
    return box


def centre_box(photo_size: Sequence[int]) -> Box:
    """The largest square in the middle of a photo of (width, height) pixels."""
    width, height = photo_size
    side = min(width, height)
    return Box((width - side) / 2, (height - side) / 2, side, side)


def frame_box(box: Box, photo_size: Sequence[int], size: int) -> Alignment:
    """The square crop of `size` pixels around a box of a photo of (width, height) pixels.

    Its side is the box's longer one and its centre the box's, but where it would reach beyond the photo it is moved
    inside if it fits; if not, `crop_face` reflects the photo. A box that does not lie in the photo is a `UnitError`
    `bad_box`.
    """
    inside = box.x >= 0 and box.y >= 0 and box.x + box.width <= photo_size[0] and box.y + box.height <= photo_size[1]
    if not inside:
        width, height = photo_size
        raise UnitError(
            "bad_box",
            f"Expected a box inside the upright photo of {width} x {height} pixels, got x {box.x:g}, y {box.y:g}, "
            f"width {box.width:g}, height {box.height:g}. Correct the table of boxes.",
        )
    side = max(box.width, box.height)
    corner = [
        _start(box.x + box.width / 2, side, photo_size[0]),
        _start(box.y + box.height / 2, side, photo_size[1]),
    ]
    scale = side / size
    return Alignment(np.array([[scale, 0, corner[0]], [0, scale, corner[1]]], np.float64), size)


def _start(centre: float, side: float, length: int) -> float:
    """Where a side with this centre begins, moved into 0..length if it fits."""
    start = centre - side / 2
    return float(np.clip(start, 0, length - side)) if side <= length else start
