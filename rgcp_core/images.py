"""File <-> pixels: the one module in which ranges change.

Everywhere else a picture is a float32 tensor (3,H,W) in [-1,1], RGB. Here are also `Photo`, which holds what
it takes to write a photograph back as it came but for the restored faces, and `find_photos`.
"""

import hashlib
import io
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageFile, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from . import containers
from .errors import UnitError, UserError

MAX_PIXELS = 2 * 89_478_485
"""Pillow's own limit: larger pictures are taken for decompression bombs."""

LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in the brightness of a pixel (Rec. 601)."""

READABLE = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "AVIF", "JPEG2000", "PPM")

PHOTO_SUFFIXES = frozenset(
    [
        ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".tif", ".tiff", ".bmp", ".dib", ".webp",
        ".gif", ".avif", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif",
    ]
)  # fmt: skip
"""What `find_photos` looks for. HEIC is listed though it cannot be read: better refused than overlooked."""

# ----------------------------------------------------------------------------------- tensors and 8-bit pixels


def from_uint8(pixels: NDArray[np.uint8]) -> Tensor:
    """Turn pixels (...,H,W,3) uint8 RGB into a float32 tensor (...,3,H,W) in [-1,1]."""
    if pixels.dtype != np.uint8 or pixels.ndim < 3 or pixels.shape[-1] != 3:
        raise UserError(f"Expected uint8 pixels (...,H,W,3), got {pixels.dtype} {pixels.shape}.")
    return (torch.tensor(np.ascontiguousarray(pixels)).movedim(-1, -3).float() / 127.5 - 1).contiguous()


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Turn a tensor (...,3,H,W) in [-1,1] into pixels (...,H,W,3) uint8 RGB, rounded; what is beyond is
    clipped.

    NaN or infinity is a `UnitError` with reason `not_finite`: such a result must not pass for a picture.
    """
    if images.ndim < 3 or images.shape[-3] != 3:
        raise UserError(f"Expected images (...,3,H,W), got {tuple(images.shape)}.")
    images = images.detach().float()
    if not torch.isfinite(images).all():
        raise UnitError("not_finite", "The picture holds NaN or infinity, so it is not written.")
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(pixels.movedim(-3, -1).cpu().numpy())


def resize(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Resample images (...,3,H,W) to `size` (height, width; one number: a square), antialiased with Lanczos.

    The arithmetic is in float, and the result is clipped to [-1,1] because Lanczos overshoots at edges.
    """
    height, width = (size, size) if isinstance(size, int) else size
    planes = images.detach().float().cpu().reshape(-1, *images.shape[-2:]).numpy()
    resized = [Image.fromarray(plane).resize((width, height), Image.Resampling.LANCZOS) for plane in planes]
    stack = torch.from_numpy(np.stack([np.asarray(plane) for plane in resized]))
    return stack.clamp(-1, 1).reshape(*images.shape[:-2], height, width)


def load_image(path: Path | str, size: int | None = None) -> Tensor:
    """Read a picture as (3,H,W) in [-1,1]: upright, in sRGB, without alpha.

    With `size` it is resampled to (3,size,size); a picture that is not square is then a `UnitError` with
    reason `not_square`: an aligned face is square, and squeezing a face falsifies it. Other reasons: see
    `load_photo`.
    """
    image = from_uint8(load_photo(path).rgb)
    if size is None or image.shape[1:] == (size, size):
        return image
    if image.shape[1] != image.shape[2]:
        shape = f"{image.shape[2]} x {image.shape[1]}"
        raise UnitError("not_square", f"{path}: expected a square picture of an aligned face, got {shape}.")
    return resize(image, size)


def save_image(image: Tensor, path: Path | str) -> None:
    """Write (3,H,W) in [-1,1] as an 8-bit PNG, whole or not at all."""
    if image.ndim != 3:
        raise UserError(f"Expected one image (3,H,W), got {tuple(image.shape)}.")
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(image)).save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def write_atomically(path: Path | str, data: bytes) -> None:
    """Write a file so that nobody sees a part of it: a temporary file beside it, on the disk, then a rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or a power cut after the rename could leave an empty file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# ------------------------------------------------------------------------------------------------ photographs


@dataclass(frozen=True, eq=False)
class Photo:
    """A photograph: an upright RGB view for finding faces, and everything needed to write it back.

    `pixels` are as the file stores them, before EXIF orientation, in its own `mode` and depth: (H,W) or
    (H,W,C), bool for mode "1", uint16 for the 16-bit modes, otherwise uint8. Modes have Pillow's names, and
    two that Pillow lacks: "RGB;16" and "RGBA;16".
    """

    rgb: NDArray[np.uint8]
    """(H,W,3) upright, in sRGB; alpha is left out, not blended."""
    pixels: NDArray[Any]
    mode: str
    format: str
    """Pillow's name, and "WEBP lossless", "JPEG CMYK" or "BMP RGBA" where that decides how it is written."""
    orientation: int
    """EXIF orientation of `pixels`, 1..8; 1 is upright."""
    sha256: str
    """Of the file's bytes."""
    icc_profile: bytes | None = None
    exif: bytes | None = None
    """The EXIF block as stored; None for TIFF, where it is among `tiff_tags`."""
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    palette: NDArray[np.uint8] | None = None
    """(n,3), for mode "P" only."""
    transparency: bytes | int | tuple[int, ...] | None = None
    """The transparent colour, or the alpha of each palette entry, as Pillow gives it."""
    png_chunks: tuple[containers.PngChunk, ...] = ()
    """A PNG's metadata."""
    tiff_tags: tuple[containers.TiffTag, ...] = ()
    """A TIFF's metadata."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the upright photo."""
        return self.rgb.shape[1], self.rgb.shape[0]


def load_photo(path: Path | str, max_pixels: int = MAX_PIXELS) -> Photo:
    """Read a photograph.

    A `UnitError` says why one cannot be used: `unreadable` (missing, a folder, no permission), `empty`,
    `not_an_image` (or a kind not in `READABLE`), `truncated` (or damaged), `too_large` (more than
    `max_pixels`, which cannot lift Pillow's own limit), `multipage` (pages or animation, which one restored
    picture would lose; the previews behind a camera's JPEG do not count), `unsupported_mode` (such as 32-bit
    or Lab pixels).
    """
    path = Path(path)
    data = _read(path)
    image = _open(path, data, max_pixels)
    raw_mode = str(image.tile[0].args) if image.tile else ""  # forgotten when the pixels are loaded
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        orientation = orientation if orientation in range(1, 9) else 1
        tiff_tags = tuple(containers.tiff_metadata(image)) if image.format == "TIFF" else ()
        mode, pixels = _decode(path, image, raw_mode, data, orientation)
    except UnitError:
        raise
    except MemoryError as error:
        size = f"{image.width} x {image.height}"
        raise UnitError("too_large", f"{path}: not enough memory for {size} pixels.") from error
    except Exception as error:  # decoders fail on damaged data in any way there is
        raise UnitError("truncated", f"{path}: the file is cut short or damaged ({error}).") from error

    info, format = image.info, image.format or ""
    palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3) if mode == "P" else None
    xmp = info.get("xmp") or info.get("XML:com.adobe.xmp")
    view = _view(pixels, mode, palette, info.get("icc_profile"))
    return Photo(
        rgb=np.ascontiguousarray(turn_upright(view, orientation)),
        pixels=pixels,
        mode=mode,
        format=_format_name(format, mode, data),
        orientation=orientation,
        sha256=hashlib.sha256(data).hexdigest(),
        icc_profile=info.get("icc_profile"),
        exif=info.get("exif") if format != "TIFF" else None,
        xmp=xmp.encode() if isinstance(xmp, str) else xmp,
        dpi=(float(info["dpi"][0]), float(info["dpi"][1])) if "dpi" in info else None,
        palette=palette,
        transparency=info.get("transparency"),
        png_chunks=tuple(containers.png_metadata(data)) if format == "PNG" else (),
        tiff_tags=tiff_tags,
    )


_KEPT_FORMATS = {"PNG": "PNG", "TIFF": "TIFF", "BMP": "BMP", "WEBP lossless": "WEBP"}


def _written_as(format: str) -> str:
    return _KEPT_FORMATS.get(format, "TIFF" if format.endswith(" CMYK") else "PNG")


def restored_name(relative_path: str, format: str) -> str:
    """Name the restored copy of a photo of `Photo.format`: a/b.png stays a/b.png, a/b.jpg becomes
    a/b.jpg.png.

    A format that stores pixels unchanged is kept; any other becomes a PNG (a TIFF if it is CMYK), so that
    pixels outside the faces stay as they are. Two photos of a folder never get one name: a lossless b.jpg.png
    moves on to b.jpg.png.png, for its place belongs to b.jpg.
    """
    if format not in _KEPT_FORMATS:
        return relative_path + {"PNG": ".png", "TIFF": ".tif"}[_written_as(format)]
    stem, suffix = os.path.splitext(relative_path)
    taken = suffix.lower() in (".png", ".tif") and os.path.splitext(stem)[1].lower() in PHOTO_SUFFIXES
    return relative_path + suffix if taken else relative_path


def save_photo(photo: Photo, pixels: NDArray[Any], path: Path | str, xmp: bytes | None = None) -> None:
    """Write `pixels` with all the rest of `photo`: mode, size, orientation tag, profile, metadata,
    resolution.

    `pixels` have the shape and type of `photo.pixels`. The format is the photo's own, PNG or TIFF, as
    `restored_name` says. `xmp` takes the place of the photo's XMP packet (`photo.xmp`, if that should be
    merged into it); BMP cannot hold one. The file appears whole or not at all.
    """
    if pixels.shape != photo.pixels.shape or pixels.dtype != photo.pixels.dtype:
        expected, came = (f"{array.dtype} {array.shape}" for array in (photo.pixels, pixels))
        raise UserError(f"Expected pixels like the photo's own, {expected}, got {came}.")
    xmp = xmp or photo.xmp
    written_as = _written_as(photo.format)
    if written_as == "TIFF":
        data = _encode_tiff(photo, pixels, xmp)
    elif written_as == "PNG":
        data = _encode_png(photo, pixels, xmp)
    elif written_as == "WEBP":
        metadata = {"icc_profile": photo.icc_profile, "exif": photo.exif or b"", "xmp": xmp or b""}
        data = _encode(photo, pixels, "WEBP", lossless=True, exact=True, **metadata)
    else:
        data = _encode(photo, pixels, "BMP", **({"dpi": photo.dpi} if photo.dpi else {}))
    write_atomically(path, data)


def turn_upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn stored pixels (H,W) or (H,W,C) upright, by EXIF orientation 1..8; a view, not a copy."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def turn_back(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Undo `turn_upright`."""
    return np.ascontiguousarray(turn_upright(pixels, {6: 8, 8: 6}.get(orientation, orientation)))


# ---------------------------------------------------------------------------------------------------- reading

_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"BM", b"GIF8", b"RIFF")


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnitError("unreadable", f"{path}: cannot be read ({error.strerror or error}).") from error
    if not data:
        raise UnitError("empty", f"{path}: the file is empty.")
    return data


def _open(path: Path, data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    Image.init()
    try:
        image = Image.open(io.BytesIO(data), formats=[name for name in READABLE if name in Image.OPEN])
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except Image.DecompressionBombError as error:
        raise UnitError("too_large", f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        if data.startswith(_SIGNATURES) or data[4:12] == b"ftypavif":
            raise UnitError("truncated", f"{path}: a picture that is cut short or damaged.") from error
        kinds = ", ".join(READABLE)
        raise UnitError("not_an_image", f"{path}: no picture, or not one of {kinds}.") from error
    except Exception as error:
        raise UnitError("truncated", f"{path}: the file is cut short or damaged ({error}).") from error
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height}"
        raise UnitError("too_large", f"{path}: {size} pixels, more than {max_pixels} in all.")
    if frames > 1:
        raise UnitError("multipage", f"{path}: has {frames} pages or frames; split it first.")
    return image


def _decode(
    path: Path, image: ImageFile.ImageFile, raw_mode: str, data: bytes, orientation: int
) -> tuple[str, NDArray[Any]]:
    """Give the mode and the pixels as stored: both readers turn a TIFF upright, and nothing else."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if image.mode in ("RGB", "RGBA", "RGBX") and (";16" in raw_mode or tags.get(258, (8,))[0] == 16):
        pixels = _decode_deep(path, data, image.mode, raw_mode)
        return f"{image.mode};16", turn_back(pixels, tags.get(274, 1))
    image.load()
    mode = "I;16" if image.mode.startswith("I;16") else image.mode
    if mode not in containers.TIFF_LAYOUTS:
        raise UnitError("unsupported_mode", f"{path}: {mode} pixels; save it as RGB or gray.")
    pixels = np.array(image)
    pixels = pixels.astype(np.uint16) if mode == "I;16" else pixels  # whatever its byte order was
    return mode, turn_back(pixels, orientation) if tags else pixels


def _decode_deep(path: Path, data: bytes, mode: str, raw_mode: str) -> NDArray[np.uint16]:
    """Read 16-bit colour, which Pillow would cut to 8 bits."""
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None:
        raise UnitError("truncated", f"{path}: the file is cut short or damaged.")
    channels = {"RGB": 3, "RGBA": 4}.get(mode)
    if "LA;16" in raw_mode or decoded.dtype != np.uint16 or decoded.shape[2:] != (channels,):
        raise UnitError("unsupported_mode", f"{path}: 16-bit pixels as {raw_mode} cannot be kept.")
    return _swap_red_and_blue(decoded)


def _swap_red_and_blue(pixels: NDArray[Any]) -> NDArray[Any]:
    """Change between OpenCV's order of channels and ours."""
    return np.ascontiguousarray(pixels[..., [2, 1, 0, 3][: pixels.shape[-1]]])


def _format_name(format: str, mode: str, data: bytes) -> str:
    if format == "WEBP" and containers.webp_is_lossless(data):
        return "WEBP lossless"
    if mode == "CMYK" and format != "TIFF":  # PNG has no CMYK
        return f"{format} CMYK"
    if mode == "RGBA" and format == "BMP":  # Pillow does not read back the alpha of a BMP that it wrote
        return "BMP RGBA"
    return format


# ---------------------------------------------------------------------------------------------------- colours


def native_colours(photo: Photo, rgb: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turn sRGB colours (h,w,3) in [-1,1] into the photo's own: (h,w,C) in the units of its pixels, not
    rounded.

    C is 1 for gray (Rec. 601 luma, or the photo's gray profile), 4 for CMYK, 3 otherwise; a 16-bit photo has
    its full range, 0..65535. For a palette and for 1 bit they are the wanted colours, 0..255, not yet
    matched.
    """
    levels = ((rgb + 1) * 127.5).clip(0, 255).astype(np.float32)
    kind = _colour_kind(photo.mode)
    transforms = _icc_transforms(photo.icc_profile, kind)
    if transforms:
        converted = ImageCms.applyTransform(Image.fromarray(levels.round().astype(np.uint8)), transforms[1])
        colours = np.asarray(converted, np.float32).reshape(*rgb.shape[:2], -1)
    elif kind == "L":
        colours = levels @ np.array(LUMA, np.float32)[:, None]
    elif kind == "CMYK":  # as Pillow converts: no black ink
        colours = np.concatenate([255 - levels, np.zeros_like(levels[..., :1])], axis=-1)
    else:
        colours = levels
    return colours * np.float32(257) if photo.pixels.dtype == np.uint16 else colours


def _view(
    pixels: NDArray[Any], mode: str, palette: NDArray[np.uint8] | None, icc_profile: bytes | None
) -> NDArray[np.uint8]:
    """Give the 8-bit sRGB colours (H,W,3) of native pixels."""
    kind = _colour_kind(mode)
    if palette is not None:
        colours = np.resize(palette, (256, 3))[pixels]
    elif mode == "1":
        colours = pixels.astype(np.uint8) * np.uint8(255)
    else:
        colours = pixels if pixels.ndim == 2 else pixels[..., : len(kind)]
    if colours.dtype == np.uint16:
        colours = ((colours.astype(np.uint32) + 128) // 257).astype(np.uint8)
    size = colours.shape[1], colours.shape[0]
    image = Image.frombytes(kind, size, np.ascontiguousarray(colours).tobytes())
    transforms = _icc_transforms(icc_profile, kind)
    return np.asarray(ImageCms.applyTransform(image, transforms[0]) if transforms else image.convert("RGB"))


def _colour_kind(mode: str) -> str:
    """Name a mode's colours without alpha and depth: "L", "RGB" or "CMYK", a letter a channel."""
    if mode in ("1", "L", "LA", "I;16"):
        return "L"
    return "CMYK" if mode == "CMYK" else "RGB"


@lru_cache(maxsize=8)
def _icc_transforms(
    icc_profile: bytes | None, kind: str
) -> tuple[ImageCms.ImageCmsTransform, ImageCms.ImageCmsTransform] | None:
    """Give the transforms from the profile to sRGB and back; None if there is nothing to do or it is
    unusable.

    Both or none: a face converted one way only would come back in other colours.
    """
    if not icc_profile:
        return None
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        if "srgb" in ImageCms.getProfileDescription(profile).lower():
            return None
        srgb = ImageCms.createProfile("sRGB")
        return (
            ImageCms.buildTransform(profile, srgb, kind, "RGB", intent, flags),
            ImageCms.buildTransform(srgb, profile, "RGB", kind, intent, flags),
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


# ---------------------------------------------------------------------------------------------------- writing


def _encode(photo: Photo, pixels: NDArray[Any], format: str, **options: Any) -> bytes:
    """Encode with Pillow any mode but 16-bit colour."""
    if photo.mode == "1":
        image = Image.fromarray(pixels)
    else:
        stored = pixels.astype(pixels.dtype.newbyteorder("<"))
        image = Image.frombytes(photo.mode, (pixels.shape[1], pixels.shape[0]), stored.tobytes())
    if photo.palette is not None:
        image.putpalette(photo.palette.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _encode_png(photo: Photo, pixels: NDArray[Any], xmp: bytes | None) -> bytes:
    if photo.mode in ("RGB;16", "RGBA;16"):
        done, encoded = cv2.imencode(".png", _swap_red_and_blue(pixels))
        if not done:
            raise UserError(f"16-bit pixels {pixels.shape} could not be encoded as PNG.")
        data = encoded.tobytes()
    else:
        options: dict[str, Any] = {"transparency": photo.transparency}
        if photo.format != "PNG":  # what a PNG brought is in its chunks
            options |= {"icc_profile": photo.icc_profile, "exif": photo.exif, "dpi": photo.dpi}
        options = {key: value for key, value in options.items() if value is not None}
        data = _encode(photo, pixels, "PNG", **options)
    return containers.insert_png_metadata(data, photo.png_chunks, xmp)


def _encode_tiff(photo: Photo, pixels: NDArray[Any], xmp: bytes | None) -> bytes:
    tags: Iterable[containers.TiffTag] = photo.tiff_tags
    if photo.exif:  # from a JPEG in CMYK
        holder = Image.new("L", (1, 1))
        holder.info["exif"] = photo.exif
        tags = containers.tiff_metadata(holder)
    metadata: dict[str, Any] = {"icc_profile": photo.icc_profile, "xmp": xmp, "dpi": photo.dpi}
    return containers.encode_tiff(pixels, photo.mode, tags, palette=photo.palette, **metadata)


# ---------------------------------------------------------------------------------------------------- finding


def find_photos(paths: Iterable[Path | str], exclude: Iterable[Path | str] = ()) -> Iterator[tuple[Path, str]]:
    """Find the photos in files and folders, sorted within a folder: (root, path below it with forward
    slashes).

    The root is the folder given, or the folder of a file given. In folders the files with one of
    `PHOTO_SUFFIXES` are photos; a file named itself always is. Hidden entries, those in `exclude` with all
    below, and links that lead back up are left out. A folder that cannot be listed is yielded as if it were a
    photo: `load_photo` then says `unreadable`, and it is not lost. A path that does not exist is a
    `UserError`, at once.
    """
    roots = [Path(path) for path in paths]
    missing = [str(root) for root in roots if not root.exists()]
    if missing:
        raise UserError(f"No such file or folder: {', '.join(missing)}.")
    return _find_photos(roots, frozenset(os.path.realpath(path) for path in exclude))


def _find_photos(roots: list[Path], exclude: frozenset[str]) -> Iterator[tuple[Path, str]]:
    for root in roots:
        if not root.is_dir():
            yield root.parent, root.name
            continue
        for path in _walk(root, exclude, ()):
            yield (root, path.relative_to(root).as_posix()) if path != root else (root.parent, root.name)


def _walk(folder: Path, exclude: frozenset[str], above: tuple[str, ...]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in exclude or real in above:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        yield folder
        return
    for entry in entries:
        path = folder / entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(path, exclude, (*above, real))
        elif path.suffix.lower() in PHOTO_SUFFIXES and not (exclude and os.path.realpath(path) in exclude):
            yield path
