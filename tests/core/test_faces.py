"""Faces: geometry against closed forms, decoding against facexlib, detections against marks made by hand."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from rgcp_core.errors import UnitError, UserError
from rgcp_core.faces import Alignment, Face, align_face, crop_face, gate_faces, load_detector, paste_face
from rgcp_core.faces import detect as detection
from rgcp_core.images import from_uint8, load_photo, save_photo, turn_upright

RNG = np.random.default_rng(0)
SHARED = Path(__file__).parents[2] / "../shared"
WINDOW = (0.195, 0.285, 0.835, 0.925)

# Marked by eye in an enlarged view: pupils, tip of the nose, corners of the mouth.
ASTRONAUT = np.array([[203, 101.5], [246.5, 103.5], [223.5, 127], [202.5, 139.5], [248, 139.5]])
HOPPER = np.array([[221, 190], [305, 187], [266, 241], [227, 281], [301, 277]])


def astronaut():
    import skimage.data

    return skimage.data.astronaut()


def hopper():
    from matplotlib.cbook import get_sample_data

    with Image.open(get_sample_data("grace_hopper.jpg")) as image:
        return np.asarray(image.convert("RGB"))


def reduced(rgb, longer):
    """Give the photo with its longer side `longer` pixels wide, and the factor."""
    factor = longer / max(rgb.shape[:2])
    size = round(rgb.shape[1] * factor), round(rgb.shape[0] * factor)
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.LANCZOS)), factor


def similarity(scale, degrees, x, y, size=64):
    """Give the alignment that turns and scales a crop and puts its corner at (x,y)."""
    cos, sin = scale * np.cos(np.radians(degrees)), scale * np.sin(np.radians(degrees))
    return Alignment(np.array([[cos, -sin, x], [sin, cos, y]], float), size)


# -------------------------------------------------------------------------------------------------------- alignment

# In a picture of side 1, with the eyes d apart and the mouth m below them: the square's side is max(4 d, 3.6 m) = 1
# for d = 0.25, m = 0.25, and its centre (0.5, 0.5) is 0.1 m below the eyes: these are at y = 0.475, the mouth at
# 0.725.
TEMPLATE = np.array([[0.375, 0.475], [0.625, 0.475], [0.5, 0.6], [0.4, 0.725], [0.6, 0.725]])


def test_landmarks_of_an_aligned_picture_give_the_picture_itself():
    alignment = align_face(TEMPLATE * 1024, size=1024)
    assert np.allclose(alignment.matrix, [[1, 0, 0], [0, 1, 0]], atol=1e-9)
    assert np.allclose(align_face(TEMPLATE * 1024, 256).corners, [[0, 0], [1024, 0], [1024, 1024], [0, 1024]])
    assert align_face(TEMPLATE * 1024, 256).scale == pytest.approx(4)


def test_a_long_face_is_measured_from_eyes_to_mouth():
    long = TEMPLATE + np.array([[0, 0], [0, 0], [0, 0], [0, 0.15], [0, 0.15]])  # m = 0.4, so the side is 1.44
    corners = align_face(long, 64).corners
    assert np.allclose(corners[0], [0.5 - 0.72, 0.475 + 0.04 - 0.72])
    assert np.allclose(corners[2] - corners[0], 1.44)


def test_the_window_is_that_part_of_the_square():
    corners = align_face(TEMPLATE * 1000, 64, WINDOW).corners
    assert np.allclose(corners, [[195, 285], [835, 285], [835, 925], [195, 925]])


def test_a_face_that_is_turned_scaled_and_moved_turns_scales_and_moves_the_crop():
    alignment = align_face(TEMPLATE, 64, WINDOW)
    moved = similarity(37, 25, 300, -20)
    turned = align_face(TEMPLATE @ moved.matrix[:, :2].T + moved.matrix[:, 2], 64, WINDOW)
    expected = alignment.corners @ moved.matrix[:, :2].T + moved.matrix[:, 2]
    assert np.allclose(turned.corners, expected)


def test_landmarks_that_span_no_face_are_refused():
    for landmarks in (np.zeros((5, 2)), np.full((5, 2), np.nan)):
        with pytest.raises(UnitError) as error:
            align_face(landmarks, 64)
        assert error.value.reason == "bad_landmarks"
    with pytest.raises(UserError):
        align_face(TEMPLATE, 64, (0.5, 0, 0.4, 1))


def test_alignments_survive_json_to_the_last_bit():
    alignment = similarity(1 / 3, 12.3, np.pi, -np.e)
    copy = Alignment.from_json(json.loads(json.dumps(alignment.to_json())))
    assert np.array_equal(copy.matrix, alignment.matrix)
    assert copy.size == alignment.size


@pytest.mark.skipif(not (SHARED / "data/faces").is_dir(), reason="../shared/data/faces is not there")
def test_real_aligned_faces_are_cropped_as_they_are():
    import pyarrow.parquet as pq

    table = pq.read_table(SHARED / "data/faces/faces128-val.parquet", columns=["image"])
    detector = load_detector("offline")
    found = []
    for data in table["image"].to_pylist()[:10]:
        faces = detector(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        alignment = align_face(max(faces, key=lambda face: face.score).landmarks, 128, WINDOW)
        turned = np.degrees(np.arctan2(alignment.matrix[1, 0], alignment.matrix[0, 0]))
        found.append([alignment.scale, turned, *(alignment.corners.mean(0) - 64)])
    scale, turned, x, y = np.median(found, axis=0)
    assert scale == pytest.approx(1, abs=0.06)
    assert abs(turned) < 2
    assert max(abs(x), abs(y)) < 2  # of 128 pixels


# --------------------------------------------------------------------------------------------------------- cropping


def ramps():
    """Give a picture (250,250,3) whose red is x - 0.5 and whose green is y - 0.5 at (x,y), exactly; blue is 100."""
    y, x = np.mgrid[:250, :250].astype(np.uint8)
    return np.stack([x, y, np.full_like(x, 100)], axis=-1)


@pytest.mark.parametrize(
    ("scale", "degrees", "x", "y"),
    [(0.3, 10, 200.3, 90.1), (1, 0, 100.25, 60.5), (1.4, -35, 60.2, 150.7), (4, 100, 150, 60), (9, 2, 55, 45)],
)
def test_each_pixel_of_a_crop_is_taken_from_where_the_matrix_says(scale, degrees, x, y):
    alignment = similarity(scale, degrees, x, y, size=16)
    crop = crop_face(ramps(), alignment)
    u, v = np.meshgrid(np.arange(16) + 0.5, np.arange(16) + 0.5)
    x, y = np.tensordot(alignment.matrix, np.stack([u, v, np.ones_like(u)]), axes=1)
    expected = np.stack([x - 0.5, y - 0.5, np.full_like(x, 100)]) / 127.5 - 1
    assert np.abs(crop.numpy() - expected).max() < 1e-4  # a hundredth of a pixel


def test_an_upright_crop_on_whole_pixels_is_exact():
    photo = RNG.integers(0, 256, (90, 100, 3), dtype=np.uint8)
    crop = crop_face(photo, similarity(1, 0, 20, 13))
    assert torch.equal(crop, from_uint8(photo[13 : 13 + 64, 20 : 20 + 64]))


def test_beyond_the_border_the_photo_is_reflected():
    photo = RNG.integers(0, 256, (50, 40, 3), dtype=np.uint8)
    crop = crop_face(photo, similarity(1, 0, -30, 10))
    reflected = np.pad(photo, ((0, 50), (30, 40), (0, 0)), mode="symmetric")
    assert torch.equal(crop, from_uint8(reflected[10 : 10 + 64, :64]))


@pytest.mark.parametrize(("period", "scale"), [(2, 2.0), (2, 4.0), (4, 6.5), (2, 16.0)])
def test_what_is_finer_than_the_crops_pixels_does_not_alias(period, scale):
    stripes = (np.arange(600) // (period // 2) % 2 * 255).astype(np.uint8)
    photo = np.broadcast_to(stripes[None, :, None], (600, 600, 3))
    crop = crop_face(photo, similarity(scale, 0, 40.3, 40.3, size=32))
    assert crop.abs().max() < 0.05  # gray; the pixels nearest to each centre would be -1 or 1


# ---------------------------------------------------------------------------------------------------------- pasting


def stored(tmp_path, image, name="photo.tif", **options):
    image.save(tmp_path / name, **options)
    return load_photo(tmp_path / name)


def smooth_photo(width=160, height=140):
    y, x = np.mgrid[:height, :width] + 0.5
    waves = [np.sin(x / 23), np.cos(y / 19), np.sin((x + y) / 31)]
    return np.round(127.5 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


@pytest.mark.parametrize(("scale", "size"), [(1, 64), (1.3, 64), (0.4, 128), (3.1, 32)])
def test_a_crop_that_was_not_changed_changes_nothing_to_be_seen(tmp_path, scale, size):
    photo = stored(tmp_path, Image.fromarray(smooth_photo()))
    alignment = similarity(scale, 15, 50.3, 20.7, size)
    pasted, mask = paste_face(photo, photo.pixels, crop_face(photo.rgb, alignment), alignment)
    difference = np.abs(pasted.astype(int) - photo.pixels)[mask > 0]
    assert (mask > 0).sum() > 1000
    assert difference.mean() < 1
    assert difference.max() <= 6


def test_the_mask_is_whole_in_the_middle_and_nothing_at_the_crops_border(tmp_path):
    photo = stored(tmp_path, Image.fromarray(smooth_photo()))
    alignment = similarity(1, 0, 40, 30)
    pasted, mask = paste_face(photo, photo.pixels, torch.ones(3, 64, 64), alignment)
    inside = mask[30:94, 40:104]
    assert inside.sum() == mask.sum()
    assert max(inside[0].max(), inside[-1].max(), inside[:, 0].max(), inside[:, -1].max()) == 0
    assert inside[24:40, 24:40].min() == 1
    assert np.abs(np.diff(inside, axis=1)).max() < 0.205  # half a cosine over 0.12 x 64 pixels: pi / 2 / 7.68
    assert np.allclose(inside, inside.T)
    assert np.allclose(inside, inside[::-1, ::-1])
    assert np.array_equal(pasted[mask == 0], photo.pixels[mask == 0])
    assert (pasted[mask == 1] == 255).all()
    half = (mask > 0.45) & (mask < 0.55)
    expected = photo.pixels[half] * (1 - mask[half][:, None]) + 255 * mask[half][:, None]
    assert np.abs(pasted[half] - expected).max() <= 0.51


def test_a_pasted_pixel_lies_where_the_matrix_says(tmp_path):
    photo = stored(tmp_path, Image.fromarray(np.zeros((250, 250, 3), np.uint8)))
    for scale in (0.5, 3.0):
        alignment = similarity(scale, 20, 60, 30)
        u, v = np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5)
        face = torch.tensor(np.stack([u, v, 0 * u]), dtype=torch.float32) * 4 / 127.5 - 1  # red 4 u, green 4 v
        pasted, mask = paste_face(photo, photo.pixels, face, alignment)
        rows, columns = np.nonzero(mask == 1)
        points = np.stack([columns + 0.5, rows + 0.5])
        u, v = np.linalg.solve(alignment.matrix[:, :2], points - alignment.matrix[:, 2:])
        assert np.abs(pasted[rows, columns, 0] - 4 * u).max() < 0.6  # rounding to 8 bits
        assert np.abs(pasted[rows, columns, 1] - 4 * v).max() < 0.6


def photo_in_mode(tmp_path, mode):
    rgb = Image.fromarray(smooth_photo())
    if mode == "I;16":
        return stored(tmp_path, Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257))
    if mode == "RGB;16":
        import tifffile

        tifffile.imwrite(tmp_path / "photo.tif", smooth_photo().astype(np.uint16) * 257 + 3, photometric="rgb")
        return load_photo(tmp_path / "photo.tif")
    if mode == "P":
        return stored(tmp_path, rgb.quantize(32))
    image = rgb.convert("LA" if mode == "LA" else mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(RNG.integers(0, 256, (140, 160), dtype=np.uint8)))
    return stored(tmp_path, image)


RED = torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 64, 64)
RED_IN_MODE = {
    "L": [76],  # 0.299 x 255 = 76.2
    "LA": [76],
    "I;16": [19595],  # 0.299 x 65535 = 19594.97
    "RGB": [255, 0, 0],
    "RGBA": [255, 0, 0],
    "RGB;16": [65535, 0, 0],
    "CMYK": [0, 255, 255, 0],
}


@pytest.mark.parametrize("mode", ["1", "P", *RED_IN_MODE])
def test_outside_the_mask_nothing_changes_and_inside_it_is_the_photos_own_mode(tmp_path, mode):
    photo = photo_in_mode(tmp_path, mode)
    assert photo.mode == mode
    before = photo.pixels.copy()
    pasted, mask = paste_face(photo, photo.pixels, RED, similarity(1, 30, 80, 20))
    assert np.array_equal(photo.pixels, before)
    assert pasted.shape == before.shape
    assert pasted.dtype == before.dtype
    assert np.array_equal(pasted[mask == 0], before[mask == 0])
    whole = pasted[mask == 1]
    assert len(whole) > 1000
    if mode == "1":
        assert whole.mean() == pytest.approx(0.299, abs=0.03)  # dithered
    elif mode == "P":
        distances = ((photo.palette.astype(int) - [255, 0, 0]) ** 2).sum(1)
        assert (distances[whole] == distances.min()).all()
    else:
        colours = RED_IN_MODE[mode]
        flat = whole.reshape(len(whole), -1)
        assert (flat[:, : len(colours)] == colours).all()
        assert np.array_equal(flat[:, len(colours) :], before[mask == 1].reshape(len(whole), -1)[:, len(colours) :])
    save_photo(photo, pasted, tmp_path / "pasted.tif")
    again = load_photo(tmp_path / "pasted.tif")
    assert again.mode == mode
    assert np.array_equal(again.pixels, pasted)


def test_transparent_palette_colours_are_neither_used_nor_covered(tmp_path):
    image = Image.fromarray(np.tile(np.arange(4, dtype=np.uint8), (80, 20)))
    image.putpalette([250, 0, 0, 0, 0, 0, 180, 0, 0, 255, 255, 255])
    photo = stored(tmp_path, image, "photo.png", transparency=bytes([0, 255, 255, 255]))
    pasted, mask = paste_face(photo, photo.pixels, RED, similarity(1, 0, 8, 8))
    assert set(np.unique(pasted[mask == 1])) == {0, 2}
    assert np.array_equal(pasted == 0, photo.pixels == 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_stored_turned_gets_its_face_at_the_same_place(tmp_path, orientation):
    pixels = smooth_photo()
    exif = Image.Exif()
    exif[274] = orientation
    turned = stored(tmp_path, Image.fromarray(pixels), "turned.png", exif=exif)
    upright = stored(tmp_path, ImageOps.exif_transpose(Image.open(tmp_path / "turned.png")), "upright.png")
    alignment = similarity(1.2, 20, 60, 10)
    face = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pasted, mask = paste_face(turned, turned.pixels, face, alignment)
    expected, expected_mask = paste_face(upright, upright.pixels, face, alignment)
    assert pasted.shape == pixels.shape
    assert np.allclose(turn_upright(mask, orientation), expected_mask, atol=1e-6)
    assert np.abs(turn_upright(pasted, orientation).astype(int) - expected).max() <= 1


def test_faces_are_pasted_one_after_the_other_and_beyond_the_border(tmp_path):
    photo = stored(tmp_path, Image.fromarray(smooth_photo()))
    first, mask_1 = paste_face(photo, photo.pixels, RED, similarity(1, 0, -20, 10))
    both, mask_2 = paste_face(photo, first, RED.flip(0), similarity(1, 0, 120, 90))
    assert (both[mask_1 == 1] == [255, 0, 0]).all()
    assert (both[mask_2 == 1] == [0, 0, 255]).all()
    outside = (mask_1 == 0) & (mask_2 == 0)
    assert np.array_equal(both[outside], photo.pixels[outside])
    gone, mask = paste_face(photo, photo.pixels, RED, similarity(1, 0, 500, 500))
    assert mask.max() == 0
    assert np.array_equal(gone, photo.pixels)


def test_a_face_that_cannot_be_pasted_is_refused(tmp_path):
    photo = stored(tmp_path, Image.fromarray(smooth_photo()))
    with pytest.raises(UnitError) as error:
        paste_face(photo, photo.pixels, torch.full((3, 64, 64), torch.nan), similarity(1, 0, 0, 0))
    assert error.value.reason == "not_finite"
    with pytest.raises(UserError):
        paste_face(photo, photo.pixels, torch.zeros(3, 32, 32), similarity(1, 0, 0, 0))


# ---------------------------------------------------------------------------------------------------------- finding


def test_anchors_and_decoding_agree_with_facexlib():
    retinaface_utils = pytest.importorskip("facexlib.detection.retinaface_utils")
    from facexlib.detection.retinaface import generate_config

    config = generate_config("resnet50")
    width, height = 96, 64
    theirs = retinaface_utils.PriorBox(config, image_size=(height, width)).forward()
    ours = detection.anchors(width, height)
    unit = np.array([width, height])
    assert np.allclose(ours[:, :2], theirs[:, :2].numpy() * unit, atol=1e-4)
    assert np.allclose(ours[:, 2:] / unit, theirs[:, 2:].numpy(), atol=1e-6)

    boxes = torch.tensor(RNG.normal(size=(len(ours), 4)), dtype=torch.float32)
    landmarks = torch.tensor(RNG.normal(size=(len(ours), 10)), dtype=torch.float32)
    our_boxes, our_landmarks = detection.decode(boxes.numpy(), landmarks.numpy(), ours)
    their_boxes = retinaface_utils.decode(boxes, theirs, config["variance"]).numpy() * np.tile(unit, 2)
    their_landmarks = retinaface_utils.decode_landm(landmarks, theirs, config["variance"]).numpy()
    assert np.allclose(our_boxes, their_boxes, atol=2e-3)
    assert np.allclose(our_landmarks.reshape(-1, 10), their_landmarks * np.tile(unit, 5), atol=2e-3)


def test_the_offline_network_gives_what_its_package_gives_but_not_cut_to_integers():
    import retinaface

    photo = astronaut()[:320, :320]
    theirs = retinaface.detect_faces(photo)
    boxes, scores, landmarks = detection.run_network(detection._offline_network, photo)
    best = scores.argmax()
    assert len(theirs) == 1
    assert scores[best] == pytest.approx(theirs[0].score, abs=1e-3)
    corner = np.array([theirs[0].x, theirs[0].y])
    assert np.abs(boxes[best, :2] - 0.5 - corner).max() < 1.5
    points = np.array([[point.x, point.y] for point in theirs[0].landmarks])
    assert np.abs(landmarks[best] - 0.5 - points).max() < 1.5
    assert not np.allclose(landmarks[best], landmarks[best].round())


@pytest.mark.parametrize("longer", [None, 160])
@pytest.mark.parametrize(("photo", "marks"), [(astronaut, ASTRONAUT), (hopper, HOPPER)])
def test_the_faces_of_real_photos_are_found_where_they_are(photo, marks, longer):
    rgb, factor = reduced(photo(), longer) if longer else (photo(), 1)
    detector = load_detector("offline")
    assert detector.name == "offline"
    (face,) = [face for face in detector(rgb) if face.score > 0.8]
    eye_distance = np.hypot(*(marks[1] - marks[0]))
    errors = np.hypot(*(face.landmarks / factor - marks).T) / eye_distance
    assert errors.max() < 0.16
    assert errors.mean() < 0.09
    assert (face.box[:2] / factor < marks.min(0)).all()
    assert (face.box[2:] / factor > marks.max(0)).all()


def test_small_faces_of_large_photos_are_found_and_the_largest_comes_first():
    photo = np.full((1200, 1800, 3), 128, np.uint8)
    small, _ = reduced(astronaut()[:256, 100:356], 96)
    large, _ = reduced(hopper(), 700)
    photo[1000:1096, 1600:1696] = small
    photo[50 : 50 + large.shape[0], 50 : 50 + large.shape[1]] = large
    faces = [face for face in load_detector("offline")(photo) if face.score > 0.8]
    assert len(faces) == 2
    assert faces[0].area > faces[1].area
    assert 1600 < faces[1].landmarks[2, 0] < 1696
    assert 1000 < faces[1].landmarks[2, 1] < 1096


def test_a_photo_without_a_face_gives_none_to_restore():
    x = np.random.default_rng(1).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    faces = load_detector("offline")(x)
    assert all(reason for _, reason in gate_faces(faces, (300, 200)))
    with pytest.raises(UserError):
        load_detector("offline")(x.astype(np.float32))


# ------------------------------------------------------------------------------------------------------------ gates


def face_at(x, y, side, score=0.99):
    """Give a face whose FFHQ square has its corner at (x,y), and whose box is the middle half of that."""
    box = np.array([x + side / 4, y + side / 4, x + side * 3 / 4, y + side * 3 / 4])
    return Face(box, TEMPLATE * side + [x, y], score)


def test_every_gate_gives_its_reason_and_no_face_is_dropped():
    good = face_at(100, 100, 200)
    flat = Face(good.box + 400, np.zeros((5, 2)), 0.99)
    faces = {
        None: good,
        "low_score": face_at(500, 100, 200, score=0.79),
        "duplicate": face_at(110, 105, 200, score=0.98),
        "too_small": face_at(500, 500, 31),
        "out_of_frame": face_at(-90, 600, 200),  # 45 % of it
        "larger_than_prior": face_at(400, 300, 300),
        "bad_landmarks": flat,
    }
    gated = gate_faces(list(faces.values()), (1000, 1000), prior_size=64)
    assert [face for face, _ in gated] == list(faces.values())
    assert [reason for _, reason in gated] == list(faces)


def test_the_gates_stand_where_they_are_said_to_stand():
    def reason(face, **options):
        return gate_faces([face], (1000, 1000), **options)[0][1]

    assert reason(face_at(100, 100, 32)) is None  # a box of 16 pixels
    assert reason(face_at(100, 100, 100, score=0.8)) is None
    assert reason(face_at(-68, 100, 200)) is None  # 34 % outside
    assert reason(face_at(-72, 100, 200)) == "out_of_frame"  # 36 %
    assert reason(face_at(-72, 100, 200), crop_window=(0.4, 0.4, 0.9, 0.9)) is None
    assert reason(face_at(100, 100, 255), prior_size=64) is None
    assert reason(face_at(100, 100, 257), prior_size=64) == "larger_than_prior"
    assert reason(face_at(100, 100, 257), prior_size=64, max_scale=None) is None
    assert reason(face_at(100, 100, 257)) is None
    assert reason(face_at(100, 100, 257), prior_size=64, crop_window=WINDOW) is None  # 0.64 of it
    twins = [face_at(100, 100, 200), face_at(100, 100, 200)]
    assert [reason for _, reason in gate_faces(twins, (1000, 1000))] == [None, "duplicate"]


# --------------------------------------------------------------------------------------------------------- detectors


def test_without_its_weights_facexlib_is_refused_and_auto_is_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("RGCP_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(UserError, match=r"detection_Resnet50_Final\.pth.*RGCP_WEIGHTS_DIR"):
        load_detector("facexlib")
    assert load_detector("auto").name == "offline"
    with pytest.raises(UserError, match="mtcnn"):
        load_detector("mtcnn")
    (tmp_path / "detection_Resnet50_Final.pth").write_bytes(b"a page that says: not found")
    with pytest.raises(UserError, match="not the weight file"):
        load_detector("auto")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_facexlibs_network_is_run_as_facexlib_runs_it(tmp_path, monkeypatch):
    retinaface = pytest.importorskip("facexlib.detection.retinaface")
    torch.manual_seed(0)
    theirs = retinaface.RetinaFace(network_name="resnet50", device="cpu")
    photo = RNG.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    with torch.inference_mode():  # untrained, it is linear in its first layer: scale that to outputs of about 1
        theirs.body.conv1.weight /= theirs(torch.from_numpy(photo).permute(2, 0, 1)[None] - 120.0)[0].abs().max()
    weights = {f"module.{key}": value for key, value in theirs.state_dict().items()}
    torch.save(weights, tmp_path / "detection_Resnet50_Final.pth")
    monkeypatch.setenv("RGCP_WEIGHTS_DIR", str(tmp_path))
    detector = load_detector("auto")
    assert detector.name == "facexlib"

    boxes, scores, landmarks = detection.run_network(detector.network, photo)
    with torch.inference_mode():
        expected = theirs.detect_faces(photo[..., ::-1].copy(), conf_threshold=0, nms_threshold=0.99)[0]
    best = scores.argmax()
    assert scores[best] == pytest.approx(expected[4], abs=1e-4)
    assert np.allclose(boxes[best], expected[:4], atol=0.01)
    assert np.allclose(landmarks[best].ravel(), expected[5:], atol=0.01)
