"""What PNG, TIFF and WebP files hold besides pixels, carried from a photo to its restored copy.

Pillow's writers lose some of it (text that is not ASCII, 16-bit colour, unknown tags), so a PNG keeps its
metadata chunks byte for byte, and a TIFF is written here.
"""

import io
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

# -------------------------------------------------------------------------------------------------------- PNG

PngChunk = tuple[bytes, bytes]
"""(type, body)"""

_PNG_METADATA = (b"cHRM", b"cICP", b"gAMA", b"iCCP", b"sRGB", b"pHYs", b"eXIf", b"tEXt", b"zTXt", b"iTXt")
_PNG_XMP = b"XML:com.adobe.xmp\0"


def png_metadata(data: bytes) -> Iterator[PngChunk]:
    """Give the metadata chunks of a PNG: colour space, resolution, EXIF, texts."""
    position = 8  # behind the signature
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind in _PNG_METADATA:
            yield kind, data[position + 8 : position + 8 + length]
        position += 12 + length


def insert_png_metadata(data: bytes, chunks: Iterable[PngChunk], xmp: bytes | None) -> bytes:
    """Put chunks into a PNG that has none of them; `xmp` replaces an XMP packet among them."""
    chunks = [chunk for chunk in chunks if not (xmp and chunk[1].startswith(_PNG_XMP))]
    if xmp:
        chunks.append((b"iTXt", _PNG_XMP + bytes(4) + xmp))  # not compressed, no language, no translation
    inserted = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    header = 8 + 25  # the signature and IHDR; every one of these chunks may follow at once
    return data[:header] + inserted + data[header:]


# ------------------------------------------------------------------------------------------------------- WebP


def webp_is_lossless(data: bytes) -> bool:
    """Say whether a WebP's pixels are stored unchanged (chunk VP8L), not lossily (VP8)."""
    position = 12  # behind "RIFF", the length and "WEBP"
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        if kind in (b"VP8 ", b"VP8L"):
            return bool(kind == b"VP8L")
        position += 8 + length + length % 2
    return False


# ------------------------------------------------------------------------------------------------------- TIFF


class TiffTag(NamedTuple):
    """One entry; `kind` is TIFF's type number, or None for the usual type of that tag."""

    tag: int
    kind: int | None
    value: Any


class TiffLayout(NamedTuple):
    """How TIFF stores a mode; `extra` is the meaning of the sample behind the colours (0 none, 2 alpha)."""

    photometric: int
    samples: int
    bits: int
    extra: int | None = None


TIFF_LAYOUTS = {
    "1": TiffLayout(1, 1, 1),
    "L": TiffLayout(1, 1, 8),
    "LA": TiffLayout(1, 2, 8, 2),
    "P": TiffLayout(3, 1, 8),
    "RGB": TiffLayout(2, 3, 8),
    "RGBX": TiffLayout(2, 4, 8, 0),
    "RGBA": TiffLayout(2, 4, 8, 2),
    "CMYK": TiffLayout(5, 4, 8),
    "I;16": TiffLayout(1, 1, 16),
    "RGB;16": TiffLayout(2, 3, 16),
    "RGBA;16": TiffLayout(2, 4, 16, 2),
}
"""Every mode a photo may have: Pillow's names, and two for 16-bit colour."""

_STRUCTURE = frozenset(
    [
        *range(254, 260), 262, 266, 273, *range(277, 282), 284, 288, 289, 292, 293, 317, 320,
        *range(322, 326), 330, 332, 336, 338, 339, 340, 341, 347, *range(512, 522), *range(529, 533),
    ]
)  # fmt: skip
"""Tags that say how the pixels are stored. They belong to a file; all others belong to the photo."""

_EXIF_AND_GPS = (0x8769, 0x8825)
_LONG = 4


def tiff_metadata(image: Image.Image) -> Iterator[TiffTag]:
    """Give the tags of a TIFF, or of another format's EXIF, that are not the file's structure.

    To be called before the pixels are loaded: with them Pillow drops the orientation.
    """
    exif = image.getexif()
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else exif
    kinds = getattr(tags, "tagtype", {})
    for tag in tags:
        if tag in _EXIF_AND_GPS:
            entries = exif.get_ifd(tag).items()
            group = {key: _stored(value) for key, value in entries if not isinstance(value, dict)}
            yield TiffTag(tag, _LONG, group)
        elif tag not in _STRUCTURE:
            yield TiffTag(tag, kinds.get(tag), _stored(tags[tag]))


def _stored(value: Any) -> Any:
    """Turn text back into the bytes it was: Pillow reads Latin-1, but would write ASCII and question marks."""
    return value.encode("latin-1", "replace") if isinstance(value, str) and not value.isascii() else value


def encode_tiff(
    pixels: NDArray[Any],
    mode: str,
    tags: Iterable[TiffTag],
    *,
    palette: NDArray[np.uint8] | None = None,
    icc_profile: bytes | None = None,
    xmp: bytes | None = None,
    dpi: tuple[float, float] | None = None,
) -> bytes:
    """Encode pixels (H,W) or (H,W,C) of `mode` as a TIFF with one deflated strip, and the metadata given."""
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, kind, value in tags:
        if kind:
            directory.tagtype[tag] = kind
        directory[tag] = value
    if icc_profile:
        directory[34675] = icc_profile
    if xmp:
        directory.tagtype[700] = 1  # bytes
        directory[700] = xmp
    if dpi and 282 not in directory:
        directory[282], directory[283], directory[296] = dpi[0], dpi[1], 2

    layout = TIFF_LAYOUTS[mode]
    height, width = pixels.shape[:2]
    stored = np.packbits(pixels, axis=1) if mode == "1" else pixels.astype(pixels.dtype.newbyteorder("<"))
    strip = zlib.compress(stored.tobytes())
    structure: dict[int, Any] = {
        256: width,
        257: height,
        258: (layout.bits,) * layout.samples,
        259: 8,  # deflate
        262: layout.photometric,
        273: 0,  # where the strip starts: behind the directory, which adds its own length
        277: layout.samples,
        278: height,
        279: len(strip),
        284: 1,  # samples of a pixel lie together
    }
    if layout.extra is not None:
        structure[338] = layout.extra
    if palette is not None:
        colours = np.zeros((256, 3), np.uint16)
        colours[: len(palette)] = palette.astype(np.uint16) * 257
        structure[320] = tuple(colours.T.ravel().tolist())
    for tag, value in structure.items():
        directory[tag] = value
    buffer = io.BytesIO()
    directory.save(buffer)
    return buffer.getvalue() + strip
