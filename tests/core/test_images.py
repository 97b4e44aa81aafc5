"""Files in and out: expected pixels are made here or read by Pillow and tifffile, never by the code under test."""

import hashlib
import io
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from rgcp_core import images
from rgcp_core.errors import UnitError, UserError
from rgcp_core.images import (
    find_photos,
    from_uint8,
    load_image,
    load_photo,
    native_colours,
    resize,
    restored_name,
    save_image,
    save_photo,
    to_uint8,
    turn_back,
    turn_upright,
)

RNG = np.random.default_rng(0)
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a>1</a></x:xmpmeta>'


def noise(*shape, dtype=np.uint8):
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def exif_with(orientation, **tags):
    exif = Image.Exif()
    exif[274] = orientation
    for tag, value in tags.items():
        exif[int(tag[1:])] = value
    return exif


# --------------------------------------------------------------------------------------------------------- tensors


def test_uint8_levels_survive_a_round_trip_and_the_ends_are_the_ends():
    levels = np.stack([np.arange(256, dtype=np.uint8).reshape(16, 16)] * 3, axis=-1)
    image = from_uint8(levels)
    assert image.shape == (3, 16, 16)
    assert image.dtype == torch.float32
    assert (image[0, 0, 0].item(), image[0, -1, -1].item()) == (-1.0, 1.0)
    assert np.array_equal(to_uint8(image), levels)
    assert np.array_equal(to_uint8(from_uint8(levels[None, ::-1])), levels[None, ::-1])


def test_to_uint8_clips_and_refuses_what_is_no_number():
    image = torch.tensor([-3.0, 0.0, 3.0]).reshape(3, 1, 1)
    assert to_uint8(image).tolist() == [[[0, 128, 255]]]
    with pytest.raises(UnitError) as error:
        to_uint8(torch.full((3, 2, 2), torch.nan))
    assert error.value.reason == "not_finite"
    with pytest.raises(UserError):
        to_uint8(torch.zeros(1, 2, 2))


def test_resize_averages_stripes_away_and_keeps_ramps():
    stripes = (torch.arange(64) % 2 * 2.0 - 1).expand(3, 64, 64)
    assert resize(stripes, 16)[:, :, 2:-2].abs().max() < 0.02  # nearest neighbours would be -1 or 1
    ramp = ((torch.arange(64) + 0.5) / 64 * 2 - 1).expand(3, 48, 64)
    small = resize(ramp, (12, 16))
    expected = (torch.arange(16) + 0.5) / 16 * 2 - 1
    assert small.shape == (3, 12, 16)
    assert torch.allclose(small[:, :, 3:-3], expected[3:-3].expand(3, 12, 10), atol=1e-5)


def test_images_survive_a_round_trip_through_a_file(tmp_path):
    pixels = noise(8, 8, 3)
    save_image(from_uint8(pixels), tmp_path / "new" / "a.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "a.png")), pixels)
    assert torch.equal(load_image(tmp_path / "new" / "a.png"), from_uint8(pixels))
    assert load_image(tmp_path / "new" / "a.png", size=4).shape == (3, 4, 4)
    Image.new("RGB", (8, 9)).save(tmp_path / "b.png")
    with pytest.raises(UnitError) as error:
        load_image(tmp_path / "b.png", size=8)
    assert error.value.reason == "not_square"


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_image(torch.zeros(3, 4, 4), tmp_path / "a.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"old"


# ------------------------------------------------------------------------------------------------------- bad input


def encoded(format, image=None, **options):
    buffer = io.BytesIO()
    (image or Image.fromarray(noise(40, 50, 3))).save(buffer, format, **options)
    return buffer.getvalue()


def reason_of(path, **options):
    with pytest.raises(UnitError) as error:
        load_photo(path, **options)
    assert str(path) in str(error.value)
    return error.value.reason


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"Dear reader, this is text.", "not_an_image"),
        (b"%PDF-1.4 ......", "not_an_image"),
        *[(encoded("JPEG")[:cut], "truncated") for cut in (3, 20, 300, -100)],
        *[(encoded("PNG")[:cut], "truncated") for cut in (8, 30, 300, -100)],
        *[(encoded("TIFF", compression="tiff_lzw")[:cut], "truncated") for cut in (8, 300)],
        (encoded("WEBP")[:100], "truncated"),
        (encoded("TIFF", Image.fromarray(np.zeros((4, 4), np.float32))), "unsupported_mode"),
        (encoded("TIFF", Image.new("LAB", (4, 4))), "unsupported_mode"),
        *[
            (encoded(kind, save_all=True, append_images=[Image.new("RGB", (50, 40), "red")]), "multipage")
            for kind in ("TIFF", "GIF", "PNG", "WEBP")
        ],
    ],
)
def test_bad_files_are_refused_with_their_reason(tmp_path, data, reason):
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    assert reason_of(path) == reason


def test_unreadable_and_too_large(tmp_path, monkeypatch):
    assert reason_of(tmp_path) == "unreadable"
    assert reason_of(tmp_path / "missing.png") == "unreadable"
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG"))
    assert load_photo(path, max_pixels=2000).size == (50, 40)
    assert reason_of(path, max_pixels=1999) == "too_large"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)  # Pillow refuses twice this
    assert reason_of(path) == "too_large"

    def forbid(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", forbid)
    assert reason_of(path) == "unreadable"


def test_the_previews_behind_a_cameras_jpeg_are_no_pages(tmp_path):
    first = Image.fromarray(noise(40, 50, 3))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (10, 8))])
    assert Image.open(tmp_path / "a.jpg").n_frames == 2
    assert load_photo(tmp_path / "a.jpg").size == (50, 40)


# ------------------------------------------------------------------------------------------ every mode, every format


def palette_image(colours=200):
    image = Image.fromarray(RNG.integers(0, colours, (20, 30), dtype=np.uint8)).convert("L")
    image.putpalette(noise(colours, 3).tobytes())
    return image


def pillow_image(mode):
    if mode == "1":
        return Image.fromarray(noise(20, 30) > 127)
    if mode == "P":
        return palette_image()
    if mode == "I;16":
        return Image.fromarray(noise(20, 30, dtype=np.uint16))
    return Image.frombytes(mode, (30, 20), noise(20, 30, len(mode)).tobytes())


LOSSLESS = [
    *[("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")],
    *[("TIFF", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")],
    *[("BMP", mode) for mode in ("1", "L", "P", "RGB")],
    *[("WEBP", mode) for mode in ("RGB", "RGBA")],
]


@pytest.mark.parametrize(("format", "mode"), LOSSLESS)
def test_a_lossless_photo_comes_back_as_it_was_but_for_what_was_changed(tmp_path, format, mode):
    original = pillow_image(mode)
    source, target = tmp_path / "in.x", tmp_path / "out.x"
    options = {"dpi": (300, 300)} if format != "WEBP" else {"lossless": True, "exact": True}
    original.save(source, format, **options)
    photo = load_photo(source)
    assert (photo.mode, photo.size, photo.orientation) == (mode, (30, 20), 1)
    assert photo.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert np.array_equal(photo.pixels, np.asarray(original))

    changed = photo.pixels.copy()
    changed[3:9, 4:10] = changed[9:15, 14:20]
    save_photo(photo, changed, target)
    written = Image.open(target)
    assert (written.format, written.mode, written.size) == (format, mode, (30, 20))
    assert np.array_equal(np.asarray(written), changed)
    if mode == "P":
        assert written.getpalette()[:600] == original.getpalette()
    if format != "WEBP":
        assert np.allclose(written.info["dpi"], 300, atol=0.1)
    if format == "TIFF" and mode != "P":
        assert np.array_equal(tifffile.imread(target), changed)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "big-endian TIFF"])
def test_16_bit_colour_keeps_its_depth(tmp_path, format, channels):
    pixels = noise(20, 30, channels, dtype=np.uint16)
    source, target = tmp_path / "in.x", tmp_path / "out.x"
    if format == "PNG":
        bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR if channels == 3 else cv2.COLOR_RGBA2BGRA)
        source.write_bytes(cv2.imencode(".png", bgr)[1].tobytes())
    else:
        extra = ["unassalpha"] if channels == 4 else None
        order = ">" if "big" in format else "<"
        tags = [(274, "H", 1, 6, True), (270, "s", 0, "caption", True)]
        options = {"photometric": "rgb", "byteorder": order, "metadata": None, "extratags": tags}
        tifffile.imwrite(source, pixels, extrasamples=extra, **options)
    photo = load_photo(source)
    assert photo.mode == ("RGB;16" if channels == 3 else "RGBA;16")
    assert np.array_equal(photo.pixels, pixels)
    view = np.round(pixels[..., :3] / 257.0)
    assert np.array_equal(photo.rgb, view if format == "PNG" else np.rot90(view, -1))

    changed = photo.pixels.copy()
    changed[:5] = 65535
    save_photo(photo, changed, target, xmp=XMP)
    if format == "PNG":
        code = cv2.COLOR_BGR2RGB if channels == 3 else cv2.COLOR_BGRA2RGBA
        assert np.array_equal(cv2.cvtColor(cv2.imread(str(target), -1), code), changed)
    else:
        with tifffile.TiffFile(target) as written:
            page = written.pages[0]
            assert np.array_equal(page.asarray(), changed)
            assert (page.tags[274].value, page.tags[270].value) == (6, "caption")
    assert Image.open(target).info["xmp"] == XMP


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_photos_are_turned_upright_and_written_as_they_were_stored(tmp_path, format, orientation):
    source, target = tmp_path / "in.x", tmp_path / "out.x"
    pixels = noise(20, 30, 3)
    options = {"lossless": True} if format == "WEBP" else {}
    Image.fromarray(pixels).save(source, format, exif=exif_with(orientation), **options)
    photo = load_photo(source)
    with Image.open(source) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    assert photo.orientation == orientation
    assert np.array_equal(photo.rgb, expected)
    assert photo.pixels.shape == (20, 30, 3)
    if format != "JPEG":
        assert np.array_equal(photo.pixels, pixels)
    assert np.array_equal(turn_upright(photo.pixels, orientation), expected)
    assert np.array_equal(turn_back(expected, orientation), photo.pixels)

    save_photo(photo, photo.pixels, target)
    with Image.open(target) as written:
        assert written.getexif().get(274, 1) == orientation
        assert np.array_equal(np.asarray(ImageOps.exif_transpose(written)), expected)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_lossy_photo_is_written_without_loss_and_with_its_metadata(tmp_path, mode):
    source = tmp_path / "a.jpg"
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = exif_with(6, t270="a caption", t306="2001:02:03 04:05:06").tobytes()
    metadata = {"exif": exif, "icc_profile": icc, "xmp": XMP, "dpi": (200, 200)}
    pillow_image(mode).save(source, "JPEG", **metadata)
    photo = load_photo(source)
    name = restored_name("a.jpg", photo.format)
    assert name == ("a.jpg.tif" if mode == "CMYK" else "a.jpg.png")
    save_photo(photo, photo.pixels, tmp_path / name)
    with Image.open(tmp_path / name) as written, Image.open(source) as original:
        assert (written.format, written.mode) == ("TIFF" if mode == "CMYK" else "PNG", mode)
        kept = written.getexif()
        assert (kept[274], kept[270], kept[306]) == (6, "a caption", "2001:02:03 04:05:06")
        assert written.info["icc_profile"] == icc
        assert written.info["xmp"] == XMP
        assert np.allclose(written.info["dpi"], 200, atol=0.1)
        assert np.array_equal(np.asarray(ImageOps.exif_transpose(original)), turn_upright(photo.pixels, 6))
        written.load()
        upright = written if mode == "CMYK" else ImageOps.exif_transpose(written)  # Pillow turns TIFFs itself
        assert np.array_equal(np.asarray(upright), turn_upright(photo.pixels, 6))


def test_a_pngs_texts_gamma_transparency_and_profile_are_carried_over(tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Description", "K\xf6ln 1912")
    texts.add_itxt("Author", "\u0141ukasz")
    texts.add(b"gAMA", (45455).to_bytes(4, "big"))
    image = palette_image(8)
    image.save(tmp_path / "a.png", pnginfo=texts, transparency=bytes([0, 128]), dpi=(96, 96))
    photo = load_photo(tmp_path / "a.png")
    save_photo(photo, photo.pixels, tmp_path / "b.png", xmp=XMP)
    save_photo(load_photo(tmp_path / "b.png"), photo.pixels, tmp_path / "c.png", xmp=XMP.replace(b"1", b"2"))
    with Image.open(tmp_path / "c.png") as written:
        written.load()
        assert written.text["Description"] == "K\xf6ln 1912"
        assert written.text["Author"] == "\u0141ukasz"
        assert written.info["gamma"] == pytest.approx(0.45455)
        assert written.info["transparency"] == bytes([0, 128])
        assert written.info["xmp"] == XMP.replace(b"1", b"2")
        assert (tmp_path / "c.png").read_bytes().count(b"com.adobe.xmp") == 1
        assert np.array_equal(np.asarray(written), np.asarray(image))


def test_a_tiffs_tags_are_carried_over(tmp_path):
    tags = [
        (270, "s", 0, b"Stra\xdfe, 1912", True),  # Latin-1, as old scanners wrote
        (315, "s", 0, "Archive", True),
        (33723, "B", 6, b"\x1c\x02\x00\x00\x02\x00", True),
        (274, "H", 1, 8, True),
    ]
    pixels = noise(20, 30)
    options = {"photometric": "miniswhite", "resolution": (118, 118), "resolutionunit": 3, "metadata": None}
    tifffile.imwrite(tmp_path / "a.tif", pixels, extratags=tags, **options)
    photo = load_photo(tmp_path / "a.tif")
    assert np.array_equal(photo.pixels, 255 - pixels)
    save_photo(photo, photo.pixels, tmp_path / "b.tif", xmp=XMP)
    assert b"Stra\xdfe, 1912\0" in (tmp_path / "b.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "b.tif") as written:
        page = written.pages[0]
        assert np.array_equal(page.asarray(), 255 - pixels)
        assert page.tags[315].value == "Archive"
        assert bytes(page.tags[33723].value) == b"\x1c\x02\x00\x00\x02\x00"
        assert (page.tags[274].value, page.tags[296].value, page.tags[282].value) == (8, 3, (118, 1))
        assert bytes(page.tags[700].value) == XMP


def test_exif_and_gps_groups_survive_in_a_tiff(tmp_path):
    exif = exif_with(1)
    exif.get_ifd(0x8769)[36867] = "2001:01:01 00:00:00"
    exif.get_ifd(0x8825)[1] = "N"
    block = exif.tobytes()
    Image.new("CMYK", (8, 8)).save(tmp_path / "a.jpg", exif=block)
    for source, target in (("a.jpg", "b.tif"), ("b.tif", "c.tif")):
        photo = load_photo(tmp_path / source)
        save_photo(photo, photo.pixels, tmp_path / target)
    kept = Image.open(tmp_path / "c.tif").getexif()
    assert kept.get_ifd(0x8769)[36867] == "2001:01:01 00:00:00"
    assert kept.get_ifd(0x8825)[1] == "N"


def test_save_photo_wants_pixels_like_the_photos(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    photo = load_photo(tmp_path / "a.png")
    for wrong in (np.zeros((8, 9), np.uint8), np.zeros((8, 8), np.uint16)):
        with pytest.raises(UserError):
            save_photo(photo, wrong, tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


# ---------------------------------------------------------------------------------------------------------- colours


def profile_with_red_and_blue_exchanged():
    """Make a profile whose red light is sRGB's blue and the reverse; its tags name offsets that are easy to swap."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    entries = {bytes(data[i : i + 4]): i for i in range(132, 132 + 12 * data[131], 12)}
    red, blue = entries[b"rXYZ"], entries[b"bXYZ"]
    data[red + 4 : red + 12], data[blue + 4 : blue + 12] = data[blue + 4 : blue + 12], data[red + 4 : red + 12]
    return bytes(data).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


def test_a_profile_is_applied_to_the_view_and_undone_for_what_is_pasted(tmp_path):
    pixels = noise(20, 30, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile_with_red_and_blue_exchanged())
    photo = load_photo(tmp_path / "a.png")
    assert np.array_equal(photo.pixels, pixels)
    assert np.abs(photo.rgb.astype(int) - pixels[..., ::-1]).max() <= 2
    back = native_colours(photo, from_uint8(photo.rgb).permute(1, 2, 0).numpy())
    assert np.abs(back - pixels).max() <= 3


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_bad_profile_is_kept_but_not_used(tmp_path, mode):
    image = pillow_image(mode)
    image.save(tmp_path / "a.tif", icc_profile=b"not a profile" * 20)
    photo = load_photo(tmp_path / "a.tif")
    assert np.array_equal(photo.rgb, np.asarray(image.convert("RGB")))
    save_photo(photo, photo.pixels, tmp_path / "b.tif")
    assert Image.open(tmp_path / "b.tif").info["icc_profile"] == b"not a profile" * 20


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_the_view_shows_pillows_colours(tmp_path, mode):
    image = pillow_image(mode)
    image.save(tmp_path / "a.tif")
    assert np.array_equal(load_photo(tmp_path / "a.tif").rgb, np.asarray(image.convert("RGB")))


def test_native_colours_of_gray_deep_and_cmyk(tmp_path):
    rgb = np.array([[[1, 1, 1], [-1, -1, -1], [1, -1, -1]]], np.float32)
    expected = {
        "L": [255, 0, 0.299 * 255],
        "I;16": [65535, 0, 0.299 * 65535],
        "CMYK": [[0, 0, 0, 0], [255, 255, 255, 0], [0, 255, 255, 0]],
    }
    for mode, colours in expected.items():
        pillow_image(mode).save(tmp_path / "a.tif")
        got = native_colours(load_photo(tmp_path / "a.tif"), rgb)
        assert np.allclose(got, np.reshape(colours, (1, 3, -1)), atol=0.01), mode


# ------------------------------------------------------------------------------------------------- names and folders


def test_restored_names_cannot_collide():
    assert restored_name("a/b.png", "PNG") == "a/b.png"
    assert restored_name("a/b.TIF", "TIFF") == "a/b.TIF"
    assert restored_name("a/b.jpg", "JPEG") == "a/b.jpg.png"
    assert restored_name("a/b.webp", "WEBP") == "a/b.webp.png"
    assert restored_name("a/b.webp", "WEBP lossless") == "a/b.webp"
    formats = {".png": "PNG", ".tif": "TIFF", ".jpg": "JPEG", ".webp": "WEBP", ".jpeg": "JPEG CMYK"}
    names = ["b", "b.png", "b.jpg", "b.jpg.png", "b.jpg.png.png", "b.jpeg", "b.jpeg.tif", "b.webp", "b.webp.png"]
    restored = [restored_name(name, formats.get(os.path.splitext(name)[1], "JPEG")) for name in names[1:]]
    assert len(set(restored)) == len(restored)


def test_find_photos_in_order_by_suffix_without_hidden_and_excluded(tmp_path):
    for name in ("b.JPG", "a.png", "z.txt", ".hidden.png", "s/c.tiff", ".git/d.png", "out/e.png", "s/t/f.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "s" / "up").symlink_to(tmp_path)
    (tmp_path / "s" / "link.png").symlink_to(tmp_path / "missing")
    found = list(find_photos([tmp_path, tmp_path / "z.txt"], exclude=[tmp_path / "out"]))
    below = ["a.png", "b.JPG", "s/c.tiff", "s/link.png", "s/t/f.webp"]
    assert found == [(tmp_path, name) for name in below] + [(tmp_path, "z.txt")]
    with pytest.raises(UserError, match="nowhere"):
        find_photos([tmp_path / "nowhere"])


def test_a_folder_that_cannot_be_listed_is_not_lost(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "z.png").touch()
    scandir = os.scandir

    def guarded(folder):
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(images.os, "scandir", guarded)
    found = list(find_photos([tmp_path]))
    assert found == [(tmp_path, "locked"), (tmp_path, "z.png")]
    assert reason_of(tmp_path / "locked") == "unreadable"
    assert list(find_photos([tmp_path / "locked"])) == [(tmp_path, "locked")]
