"""Pictures to train a prior on: a folder of images, or Parquet with image bytes, as one uint8 tensor."""

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps
from torch import Tensor

from rgcp_core.errors import UserError
from rgcp_core.images import PHOTO_SUFFIXES, from_uint8

IN_MEMORY_BYTES = 8 * 2**30
"""Decoded pictures up to this size are held; beyond it they are decoded anew for every batch."""


@dataclass(frozen=True)
class Pictures:
    """Square pictures of one size, by row number."""

    source: str
    """Name of the file or folder they came from."""
    encoded: list[bytes] | list[Path]
    size: int
    decoded: Tensor | None
    """(N,S,S,3) uint8, or None when it would not fit."""

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Pictures at ``rows`` (M,) as float32 (M,3,S,S) in [-1,1]."""
        rows = rows.cpu()
        pixels = self.decoded[rows] if self.decoded is not None else _decode([self.encoded[i] for i in rows], self.size)
        return from_uint8(pixels.numpy())

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """All pictures in order, (<=batch_size,3,S,S) at a time."""
        for rows in torch.arange(len(self)).split(batch_size):
            yield self[rows]


def load_pictures(path: Path, size: int, on_step: Callable[[int, int], None] | None = None) -> Pictures:
    """Read a folder (all levels) or a Parquet file with a column ``image`` of encoded bytes.

    Pictures are cropped to their central square and resampled (Lanczos) to ``size`` pixels.

    Raises:
        UserError: nothing there, or a picture that cannot be decoded.
    """
    encoded: list[bytes] | list[Path]
    if path.is_dir():
        encoded = sorted(file for file in path.rglob("*") if file.suffix.lower() in PHOTO_SUFFIXES)
    elif path.suffix == ".parquet" and path.is_file():
        if "image" not in pq.read_schema(path).names:
            raise UserError(f"{path} has no column 'image' with the bytes of encoded pictures.")
        encoded = pq.read_table(path, columns=["image"])["image"].to_pylist()
    else:
        raise UserError(f"Expected a folder of pictures or a .parquet file with a column 'image'; got {path}.")
    if not encoded:
        raise UserError(f"No pictures in {path}.")
    decoded = None
    if len(encoded) * size * size * 3 <= IN_MEMORY_BYTES:
        decoded = _decode(encoded, size, on_step)
    return Pictures(path.name, encoded, size, decoded)


def _decode(encoded: list[bytes] | list[Path], size: int, on_step: Callable[[int, int], None] | None = None) -> Tensor:
    pixels = np.empty((len(encoded), size, size, 3), dtype=np.uint8)
    with ThreadPoolExecutor(8) as pool:  # Pillow decodes without the interpreter's lock
        for i, picture in enumerate(pool.map(lambda item: _decode_one(item, size), encoded)):
            pixels[i] = picture
            if on_step is not None:
                on_step(i + 1, len(encoded))
    return torch.from_numpy(pixels)


def _decode_one(item: bytes | Path, size: int) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(item) if isinstance(item, bytes) else item) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
            return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))
    except (OSError, ValueError, SyntaxError) as error:
        where = "a row of the Parquet file" if isinstance(item, bytes) else item
        raise UserError(f"Cannot decode {where}: {error}. Remove it and start again.") from error
