"""A folder of twelve mixed files, as an archive has them."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def portrait(astronaut: np.ndarray, width: int = 220) -> Image.Image:
    """The astronaut's portrait with a face of about 50 px."""
    return Image.fromarray(astronaut).resize((width, width), Image.Resampling.LANCZOS)


def write_mixed_folder(folder: Path, astronaut: np.ndarray) -> dict[str, str]:
    """Write the files; return the status that each must end with (of its first face)."""
    folder.mkdir()
    (folder / "inner").mkdir()
    picture = portrait(astronaut)
    picture.save(folder / "good.png")
    picture.convert("L").save(folder / "gray.png")
    picture.save(folder / "inner" / "Großmutter am 3. März.jpg", quality=90)

    exif = Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(folder / "rotated.jpg", quality=95, exif=exif)

    alpha = picture.convert("RGBA")
    alpha.putalpha(200)
    alpha.save(folder / "alpha.png")

    group = Image.new("RGB", (660, 220))
    for i in range(3):
        group.paste(picture if i != 1 else picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (i * 220, 0))
    group.save(folder / "three.png")

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)).save(folder / "noise.png")
    Image.new("RGB", (200, 150), (90, 120, 160)).save(folder / "sky.jpg")
    (folder / "empty.jpg").write_bytes(b"")
    data = io.BytesIO()
    picture.save(data, "JPEG")
    (folder / "truncated.jpg").write_bytes(data.getvalue()[: len(data.getvalue()) // 2])
    (folder / "letter.png").write_text("Dear Mary, ...")
    picture.resize((40, 40)).save(folder / "tiny.png")
    (folder / "notes.txt").write_text("not a photo and not named like one")
    return {
        "good.png": "restored",
        "gray.png": "restored",
        "inner/Großmutter am 3. März.jpg": "restored",
        "rotated.jpg": "restored",
        "alpha.png": "restored",
        "three.png": "restored",
        "noise.png": "no_face",
        "sky.jpg": "no_face",
        "empty.jpg": "failed:empty",
        "truncated.jpg": "failed:truncated",
        "letter.png": "failed:not_an_image",
        "tiny.png": "skipped:too_small",
    }


def digests(folder: Path) -> dict[str, bytes]:
    """Contents of all files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
