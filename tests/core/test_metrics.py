import io
import math
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.metrics import structural_similarity
from skimage.transform import SimilarityTransform

from rgcp_core import metrics
from rgcp_core.errors import UserError
from rgcp_core.metrics import distribution, fidelity, identity, quality
from rgcp_core.weights import load_state_dict

SHARED = Path(__file__).parents[2] / ".." / "shared"
ALEXNET = SHARED / "weights" / "alexnet_features.safetensors"
PEOPLE = SHARED / "data" / "people" / "people128.parquet"
WINDOW = (0.195, 0.285, 0.835, 0.925)
NET_CACHES = (metrics._lpips, metrics._identity, metrics._quality)


@pytest.fixture
def pictures():
    """Two batches (2,3,48,64) in [-1,1], smooth and then disturbed."""
    generator = torch.Generator().manual_seed(0)
    clean = F.interpolate(torch.rand(2, 3, 6, 8, generator=generator) * 2 - 1, (48, 64), mode="bilinear")
    return clean, (clean + 0.2 * torch.randn(clean.shape, generator=generator)).clamp(-1, 1)


@pytest.fixture
def no_weights(tmp_path, monkeypatch):
    """No downloads and no networks left in memory by other tests."""
    monkeypatch.setenv("RGCP_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for cached in NET_CACHES:
        cached.cache_clear()
    yield tmp_path
    for cached in NET_CACHES:
        cached.cache_clear()


@pytest.fixture
def alexnet(monkeypatch):
    if not ALEXNET.is_file():
        pytest.skip("needs ../shared/weights/alexnet_features.safetensors")
    monkeypatch.setenv("RGCP_WEIGHTS_DIR", str(ALEXNET.parent))
    metrics._lpips.cache_clear()
    return load_state_dict(ALEXNET)


@pytest.fixture(scope="module")
def people():
    if not PEOPLE.is_file():
        pytest.skip("needs ../shared/data/people/people128.parquet")
    table = pd.read_parquet(PEOPLE).groupby("person").head(3)
    pixels = [np.asarray(Image.open(io.BytesIO(data))) for data in table["image"]]
    return torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1, table["person"].to_numpy()


# ------------------------------------------------------------------------------------------------------ fidelity


def test_psnr_closed_form():
    reference = torch.zeros(3, 3, 5, 7)
    images = torch.zeros(3, 3, 5, 7)
    images[0] += 0.2  # MSE 0.04, peak 2: 10 log10(4 / 0.04) = 20 dB
    images[1, 0, 0, 0] = 2  # one value of 105 off by the whole range: 10 log10(105)
    expected = [20.0, 10 * math.log10(105), math.inf]
    assert fidelity.psnr(images, reference).tolist() == pytest.approx(expected, rel=1e-6)


def test_ssim_is_that_of_scikit_image(pictures):
    clean, disturbed = pictures
    expected = [
        structural_similarity(
            *(((image.double() + 1) / 2).numpy() for image in pair),
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for pair in zip(disturbed, clean, strict=True)
    ]
    assert fidelity.ssim(disturbed, clean).tolist() == pytest.approx(expected, abs=1e-9)
    assert max(expected) < 0.9
    assert fidelity.ssim(clean, clean).tolist() == pytest.approx([1, 1])


def test_lpips_by_hand(alexnet, pictures):
    """The definition (Zhang et al. 2018, Eq. 1) on torchvision's own layers, with the linear layers of lpips."""
    import lpips
    from torchvision.models import alexnet as torchvision_alexnet

    net = torchvision_alexnet(weights=None).features[:12].eval()  # without the last pooling
    net.load_state_dict({key.removeprefix("features."): value for key, value in alexnet.items()})
    linear = load_state_dict(Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth")
    shift = torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1)

    def activations(x):
        found = []
        for layer in net:
            x = layer(x)
            if isinstance(layer, torch.nn.ReLU):
                x = x.clone()  # in-place layers follow
                found.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return found

    clean, disturbed = pictures
    with torch.no_grad():
        pairs = zip(activations((clean - shift) / scale), activations((disturbed - shift) / scale), strict=True)
        expected = sum(
            F.conv2d((a - b).square(), linear[f"lin{i}.model.1.weight"]).mean(dim=(1, 2, 3))
            for i, (a, b) in enumerate(pairs)
        )
    distance = fidelity.Lpips()
    assert distance(disturbed, clean).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert expected.min() > 0.01
    assert distance(clean, clean).tolist() == [0, 0]


def test_lpips_is_the_packages_own(alexnet, pictures):
    """The module that lpips builds itself, with its own way of reading its linear layers."""
    import lpips

    theirs = lpips.LPIPS(net="alex", pnet_rand=True, pretrained=True, verbose=False)
    backbone = lpips.pretrained_networks.alexnet(pretrained=False)
    for name, layer in backbone.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            index = name.split(".")[1]
            layer.weight.data, layer.bias.data = (alexnet[f"features.{index}.{p}"] for p in ("weight", "bias"))
    theirs.net = backbone
    with torch.no_grad():
        expected = theirs(*pictures).flatten()
    assert fidelity.Lpips()(*pictures).tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_pairs_must_match():
    with pytest.raises(UserError, match=r"\(2, 3, 8, 8\) and \(1, 3, 8, 8\)"):
        fidelity.psnr(torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match="11 x 11"):
        fidelity.ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


# ------------------------------------------------------------------------------------------------------ identity


def test_face_chip_cuts_the_right_place():
    """In this picture each pixel tells where it is."""
    side = 200
    centres = (torch.arange(side) + 0.5) / side
    x = (WINDOW[0] + centres * 0.64).expand(side, side)
    y = (WINDOW[1] + centres * 0.64)[:, None].expand(side, side)
    image = torch.stack([x, y, torch.zeros_like(x)])[None]
    chip = (0.3, 0.4, 0.7, 0.8)
    cut = identity.face_chip(image, WINDOW, chip, 50)[0]  # reduced 2.5 times, so antialiased too
    expected = (torch.arange(50) + 0.5) / 50 * 0.4
    # an eighth of a pixel of the chip: torch's bicubic kernel bends a straight line by 0.04 pixels
    assert torch.allclose(cut[0], (0.3 + expected).expand(50, 50), atol=0.001)
    assert torch.allclose(cut[1], (0.4 + expected)[:, None].expand(50, 50), atol=0.001)


def test_face_chip_fills_beyond_the_crop_with_its_border():
    chips = identity.face_chip(torch.full((1, 3, 64, 64), 0.3), WINDOW, identity.DLIB_CHIP, 150)
    assert torch.allclose(chips, torch.tensor(0.3), atol=1e-5)
    whole = identity.face_chip(torch.zeros(2, 3, 32, 32), (0, 0, 1, 1), (0, 0, 1, 1), 32)
    assert whole.shape == (2, 3, 32, 32)


def test_dlib_chip_is_where_dlib_cuts():
    import dlib

    # Median of five landmarks in 600 aligned crops, in fractions of the FFHQ square, in dlib's order.
    landmarks = [(0.6725, 0.475), (0.5738, 0.4813), (0.3263, 0.475), (0.4250, 0.4813), (0.5013, 0.6644)]
    side = 10_000
    points = dlib.points([dlib.point(round(x * side), round(y * side)) for x, y in landmarks])
    box = dlib.rectangle(0, 0, side, side)
    cut = dlib.get_face_chip_details(dlib.full_object_detection(box, points), 150, 0.25)
    found = [v / side for v in (cut.rect.left(), cut.rect.top(), cut.rect.right(), cut.rect.bottom())]
    assert found == pytest.approx(identity.DLIB_CHIP, abs=0.005)
    assert abs(math.degrees(cut.angle)) < 1


def test_arcface_chip_is_its_template_on_an_average_ffhq_face():
    # Five points: the template of ArcFace in its 112 px chip, and an average FFHQ face of 512 px.
    template = [
        (38.2946, 51.6963),
        (73.5318, 51.5014),
        (56.0252, 71.7366),
        (41.5493, 92.3655),
        (70.7299, 92.2041),
    ]
    ffhq = [(192.98, 239.95), (318.90, 240.19), (256.63, 314.02), (201.26, 371.41), (313.09, 371.15)]
    fit = SimilarityTransform()
    fit.estimate(np.array(template) / 112, np.array(ffhq) / 512)
    assert abs(math.degrees(fit.rotation)) < 0.1
    assert fit(np.array([[0, 0], [1, 1]])).flatten() == pytest.approx(identity.ARCFACE_CHIP, abs=0.002)


@pytest.mark.parametrize("size", [64, 128])
def test_dlib_tells_people_apart(people, size):
    faces, names = people
    faces = F.interpolate(faces, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    model = identity.load_identity("dlib")
    embeddings = model.embed(faces[:: 128 // size], WINDOW)  # all at 128 px, every second at 64 px
    names = names[:: 128 // size]
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(len(names)), atol=1e-5)
    i, j = np.triu_indices(len(names), 1)
    cosine, same = identity.similarity(embeddings[i], embeddings[j]).numpy(), names[i] == names[j]
    area = (cosine[same][:, None] > cosine[~same]).mean()  # under the ROC curve
    assert area > 0.995
    assert (cosine[~same] > model.threshold).mean() < 0.03
    assert (cosine[same] > model.threshold).mean() > 0.95


def test_arcface_with_random_weights(no_weights):
    """Right file, right network, right chip and channel order: against facexlib's module itself."""
    from facexlib.recognition.arcface_arch import Backbone

    theirs = Backbone(num_layers=50, drop_ratio=0.6, mode="ir_se").eval()
    torch.save(theirs.state_dict(), no_weights / "recognition_arcface_ir_se50.pth")
    model = identity.load_identity("auto")
    assert (model.name, model.threshold) == ("arcface_ir_se50", None)
    faces = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        chips = identity.face_chip(faces, WINDOW, identity.ARCFACE_CHIP, 112)
        expected = F.normalize(theirs(chips[:, [2, 1, 0]]))
    assert torch.allclose(model.embed(faces, WINDOW), expected, atol=1e-5)


def test_identity_falls_back_to_dlib_and_says_why_not(no_weights):
    assert identity.load_identity("auto").name == "dlib_resnet_v1"
    with pytest.raises(UserError, match="recognition_arcface_ir_se50"):
        identity.load_identity("arcface")
    torch.save({"conv.weight": torch.zeros(1)}, no_weights / "recognition_arcface_ir_se50.pth")
    with pytest.raises(UserError, match="expected facexlib's ArcFace"):
        identity.load_identity("arcface")


# -------------------------------------------------------------------------------------------------- distribution


def test_frechet_distance_of_known_gaussians():
    """Commuting covariances: |m1 - m2|^2 + sum (sqrt(a) - sqrt(b))^2 over the eigenvalues."""
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double()).Q
    a, b = torch.tensor([1.0, 4.0, 9.0, 0.0]).double(), torch.tensor([4.0, 4.0, 1.0, 16.0]).double()
    cov_a, cov_b = rotation * a @ rotation.T, rotation * b @ rotation.T
    mean = torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = 9 + (1 + 0 + 4 + 16)
    moved = mean + torch.tensor([0.0, 3.0, 0.0, 0.0])
    assert distribution.frechet_distance(mean, cov_a, moved, cov_b) == pytest.approx(expected, abs=1e-6)
    assert distribution.frechet_distance(mean, cov_b, mean, cov_b) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_with_covariances_that_do_not_commute():
    linalg = pytest.importorskip("scipy.linalg")
    x = np.random.default_rng(0).normal(size=(2, 30, 5)) @ np.diag([1, 2, 3, 4, 5])
    means, covs = x.mean(axis=1), [np.cov(sample.T) for sample in x]
    root = linalg.sqrtm(covs[0] @ covs[1]).real
    expected = np.sum((means[0] - means[1]) ** 2) + np.trace(covs[0] + covs[1] - 2 * root)
    sets = [distribution.FeatureSet("stub", "none", torch.tensor(sample), "") for sample in x]
    (one, two) = (features.stats for features in sets)
    found = distribution.frechet_distance(one.mean, one.cov, two.mean, two.cov)
    assert found == pytest.approx(expected, rel=1e-6)


def test_kid_by_a_double_loop():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(7, 3, generator=generator), torch.randn(7, 3, generator=generator) + 1

    def kernel(x, y):
        return (sum(float(p) * float(q) for p, q in zip(x, y, strict=True)) / 3 + 1) ** 3

    within = sum(kernel(s[i], s[j]) for s in (a, b) for i in range(7) for j in range(7) if i != j) / (7 * 6)
    across = sum(kernel(x, y) for x in a for y in b) / 49
    value, spread = distribution.kid(a, b)
    assert value == pytest.approx(within - 2 * across, rel=1e-5)
    assert spread is None


def test_kid_is_unbiased_over_subsets():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(400, 8, generator=generator) for _ in range(2))
    whole, _ = distribution.kid(a, b)
    value, spread = distribution.kid(a, b, subsets=200, subset_size=50)
    assert spread is not None
    assert value == pytest.approx(whole, abs=4 * spread / math.sqrt(200))
    assert abs(whole) < 0.02 < distribution.kid(a, b + 0.5)[0]
    assert distribution.kid(a, b, subset_size=50) == distribution.kid(a, b, subset_size=50)


@pytest.fixture
def extractor():
    """Mean and standard deviation of each channel: six features."""

    def network(images):
        return torch.cat([images.mean(dim=(2, 3)), images.std(dim=(2, 3))], dim=1)

    return distribution.FeatureExtractor("stub", "none", network)


def test_a_distance_carries_what_it_depends_on(extractor):
    images = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    reference = distribution.extract_features([images[:5], images[5:]], extractor)
    assert reference.features.shape == (12, 6)
    assert distribution.extract_features([images.flip(0)], extractor).sha256 == reference.sha256
    assert distribution.extract_features([images[1:]], extractor).sha256 != reference.sha256

    frechet, kernel = distribution.compare(reference, reference)
    assert (frechet.metric, kernel.metric) == ("frechet_stub", "kernel_stub")  # no FID without its network
    assert frechet.value == pytest.approx(0, abs=1e-6)
    brighter = distribution.extract_features([images[:10] + 0.5], extractor)
    frechet, _ = distribution.compare(brighter, reference)
    assert frechet.value == pytest.approx(3 * 0.25, abs=0.02)  # three means moved by 0.5
    assert (frechet.count, frechet.reference_count) == (10, 12)
    assert (frechet.extractor, frechet.resize_mode) == ("stub", "none")
    assert frechet.reference_sha256 == reference.sha256


def test_sets_that_cannot_be_compared(extractor):
    images = torch.zeros(3, 3, 8, 8)
    features = distribution.extract_features([images], extractor)
    other = distribution.FeatureSet("stub", "bilinear", features.features, features.sha256)
    with pytest.raises(UserError, match=r"stub \(none\) and stub \(bilinear\)"):
        distribution.compare(features, other)
    with pytest.raises(UserError, match="empty"):
        distribution.extract_features([], extractor)
    one = distribution.extract_features([images[:1]], extractor)
    with pytest.raises(UserError, match="at least 2 pictures, got 1"):
        distribution.compare(one, features)


def test_inception_pooling():
    """The blocks where FID's network is not torchvision's: average without the border's zeros, and a maximum."""
    net = distribution.fid_inception_network().to_empty(device="cpu").eval()
    x = torch.rand(1, 192, 5, 5, generator=torch.Generator().manual_seed(0))
    for name, channels, pool in (
        ("Mixed_5b", 192, lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)),
        ("Mixed_7c", 2048, lambda x: F.max_pool2d(x, 3, 1, 1)),
    ):
        block = getattr(net, name)
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        block.apply(lambda m: isinstance(m, torch.nn.BatchNorm2d) and m.reset_parameters())
        picture = x.repeat(1, math.ceil(channels / 192), 1, 1)[:, :channels]
        with torch.no_grad():
            expected = block.branch_pool(pool(picture))
            assert torch.allclose(block(picture)[:, -expected.shape[1] :], expected, atol=1e-6)


def test_inception_from_its_file(no_weights):
    with pytest.raises(UserError, match="pt_inception-2015-12-05-6726825d"):
        distribution.inception_extractor()
    net = distribution.fid_inception_network().to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            fan_in = module.weight[0].numel()
            module.weight.data = torch.randn(module.weight.shape, generator=generator) * (2 / fan_in) ** 0.5
    net.fc.bias.data.zero_()
    torch.save(net.state_dict(), no_weights / "pt_inception-2015-12-05-6726825d.pth")
    images = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
    features = {}
    for mode in ("bilinear", "bicubic-antialias"):
        extractor = distribution.inception_extractor(mode)
        assert (extractor.name, extractor.resize_mode) == (distribution.FID_INCEPTION, mode)
        features[mode] = extractor.network(images)
        assert features[mode].shape == (1, 2048)
    # features are what comes before the classes, and at 299 px nothing is resized
    large = F.interpolate(images, (299, 299), mode="bilinear")
    with torch.no_grad():
        logits = net.eval()(large)
    assert torch.allclose(F.linear(features["bilinear"], net.fc.weight), logits, atol=1e-3)
    assert not torch.allclose(features["bilinear"], features["bicubic-antialias"], atol=1e-3)


# ------------------------------------------------------------------------------------------------------- quality


@pytest.fixture
def stub_pyiqa(monkeypatch):
    """A pyiqa whose MUSIQ is one linear layer on the mean colour; it notes how it was asked."""
    calls = []

    class Metric:
        def __init__(self):
            self.net = torch.nn.Linear(3, 1)

        def __call__(self, images):
            assert images.shape[0] == 1
            assert images.min() >= 0
            assert images.max() <= 1
            return self.net(images.mean(dim=(2, 3)))

    def create_metric(name, **options):
        calls.append((name, options))
        return Metric()

    monkeypatch.setitem(sys.modules, "pyiqa", types.SimpleNamespace(create_metric=create_metric))
    return calls


def test_musiq_is_loaded_from_its_file(no_weights, stub_pyiqa):
    with pytest.raises(UserError, match="musiq_koniq_ckpt-e95806b9"):
        quality.load_quality("musiq_koniq")
    state = {"weight": torch.tensor([[10.0, 20.0, 30.0]]), "bias": torch.tensor([1.0])}
    torch.save(state, no_weights / "musiq_koniq_ckpt-e95806b9.pth")
    images = torch.stack([torch.full((3, 8, 8), -1.0), torch.full((3, 8, 8), 1.0)])
    assert quality.load_quality("musiq_koniq")(images).tolist() == pytest.approx([1.0, 61.0])
    assert stub_pyiqa == [("musiq", {"device": torch.device("cpu"), "pretrained": False})]  # never downloads


def test_niqe_reads_its_file_and_refuses_small_pictures(no_weights, stub_pyiqa):
    path = no_weights / "niqe_modelparameters.mat"
    path.write_bytes(b"x")
    niqe = quality.load_quality("niqe")
    assert stub_pyiqa[0][1]["pretrained_model_path"] == str(path)
    assert niqe(torch.zeros(2, 3, 192, 192)).shape == (2,)
    with pytest.raises(UserError, match="192 x 192"):
        niqe(torch.zeros(1, 3, 128, 128))


def test_without_pyiqa_the_reason_names_its_licence(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)  # as if it were not installed
    with pytest.raises(UserError, match="non-commercial"):
        quality.load_quality("niqe")


# -------------------------------------------------------------------------------------------------- measure_faces


def test_measure_faces_fills_columns_or_gives_reasons(people, alexnet):
    clean = people[0][:2]
    restored, damaged = clean * 0.9, clean * 0.5
    which = metrics.METRICS + metrics.INPUT_METRICS
    values, unavailable = metrics.measure_faces(restored, damaged, clean, which=which, crop_window=WINDOW)
    assert sorted([*values, *unavailable]) == sorted(which)
    assert all(len(column) == 2 for column in values.values())
    assert "arcface" in unavailable["identity_arcface"]
    # damage by a factor f: MSE (1 - f)^2 mean(x^2), so the input's PSNR lies 20 log10(5) below
    gains = [a - b for a, b in zip(values["psnr"], values["input_psnr"], strict=True)]
    assert gains == pytest.approx([20 * math.log10(5)] * 2, rel=1e-5)
    assert values["input_lpips_alex"] == fidelity.Lpips()(damaged, clean).tolist()
    model = identity.load_identity("dlib")
    r, d, c = (model.embed(x, WINDOW) for x in (restored, damaged, clean))
    for column, pair in (
        ("identity_dlib", (r, c)),
        ("identity_input_dlib", (r, d)),
        ("input_identity_dlib", (d, c)),
    ):
        assert values[column] == pytest.approx(identity.similarity(*pair).tolist(), abs=1e-6)


def test_measure_faces_against_an_album(people):
    faces, _ = people
    values, unavailable = metrics.measure_faces(
        faces[:1],
        which=("identity_dlib", "identity_input_dlib", "psnr"),
        crop_window=WINDOW,
        album=faces[1:3],
    )
    a, b, c = identity.load_identity("dlib").embed(faces[:3], WINDOW)
    assert values == {"identity_dlib": [pytest.approx(float(a @ b + a @ c) / 2, abs=1e-6)]}
    assert unavailable == {
        "identity_input_dlib": "There is no input picture to compare with.",
        "psnr": "There is no clean picture to compare with.",
    }


def test_measure_faces_refuses_nonsense():
    faces = torch.zeros(2, 3, 16, 16)
    measure = metrics.measure_faces
    with pytest.raises(UserError, match="fid"):
        measure(faces, which=("fid",), crop_window=WINDOW)
    with pytest.raises(UserError, match="Expected 2 clean pictures"):
        measure(faces, clean=faces[:1], crop_window=WINDOW)
    with pytest.raises(UserError, match="input"):
        measure(faces, torch.zeros(2, 3, 8, 8), crop_window=WINDOW)
    with pytest.raises(UserError, match="NaN"):
        measure(faces * torch.nan, crop_window=WINDOW)
