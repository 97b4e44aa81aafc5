"""How near a set of pictures is to a reference set: FID and KID, with everything that the number depends on.

FIDs of different tools differ because the features, the resizing, the reference set and the number of
pictures differ. So the extractor says how it resizes, a result carries all four, and only the original
Inception network makes it a FID: `compare` names a distance on any other features after those features.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgcp_core.errors import UserError
from rgcp_core.images import to_uint8
from rgcp_core.weights import load_state_dict, require_weights

FID_INCEPTION = "inception-2015-12-05"
ResizeMode = Literal["bilinear", "bicubic-antialias"]


@dataclass(frozen=True)
class FeatureExtractor:
    """A network, and how pictures are brought to its size."""

    name: str
    resize_mode: str
    network: Callable[[Tensor], Tensor]
    """Pictures (N,3,H,W) in [-1,1] -> features (N,D)."""


@dataclass(frozen=True)
class FeatureStats:
    """The Gaussian that the Frechet distance sees."""

    mean: Tensor
    """(D,) float64."""
    cov: Tensor
    """(D,D) float64, unbiased. Its rank is below `count`: with fewer pictures than D rather trust KID."""
    count: int


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """The features of one set of pictures."""

    extractor: str
    resize_mode: str
    features: Tensor
    """(N,D) float64."""
    sha256: str
    """Of the sorted sha256s of the pictures' 8-bit pixels: the same in any order and file format."""

    @cached_property
    def stats(self) -> FeatureStats:
        """Mean and covariance; `UserError` for fewer than two pictures."""
        if len(self.features) < 2:
            raise UserError(f"A set to compare needs at least 2 pictures, got {len(self.features)}.")
        return FeatureStats(self.features.mean(dim=0), torch.cov(self.features.T), len(self.features))


@dataclass(frozen=True)
class DistributionDistance:
    """One number and what it depends on."""

    metric: str
    """`fid` and `kid` on the original Inception; `frechet_<extractor>` and `kernel_<extractor>` otherwise."""
    value: float
    spread: float | None
    """Standard deviation over KID's subsets; None where there is only one, and for FID."""
    extractor: str
    resize_mode: str
    count: int
    reference_count: int
    reference_sha256: str


def extract_features(batches: Iterable[Tensor], extractor: FeatureExtractor) -> FeatureSet:
    """Features of a set of pictures, given in batches (N,3,H,W) in [-1,1] of any sizes."""
    features, hashes = [], []
    for batch in batches:
        hashes += [hashlib.sha256(f"{p.shape}".encode() + p.tobytes()).hexdigest() for p in to_uint8(batch)]
        with torch.no_grad():
            features.append(extractor.network(batch).double().cpu())
    if not features:
        raise UserError("There are no pictures to compare: the set is empty.")
    set_hash = hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()
    return FeatureSet(extractor.name, extractor.resize_mode, torch.cat(features), set_hash)


def compare(images: FeatureSet, reference: FeatureSet) -> tuple[DistributionDistance, DistributionDistance]:
    """FID and KID of a set against a reference set; on another extractor than `FID_INCEPTION` named
    otherwise."""
    if (images.extractor, images.resize_mode) != (reference.extractor, reference.resize_mode):
        raise UserError(
            f"Expected features of one kind, got {images.extractor} ({images.resize_mode}) and "
            f"{reference.extractor} ({reference.resize_mode})."
        )
    a, b = images.stats, reference.stats
    frechet, kernel = f"frechet_{images.extractor}", f"kernel_{images.extractor}"
    if images.extractor == FID_INCEPTION:
        frechet, kernel = "fid", "kid"
    kid_value, kid_spread = kid(images.features, reference.features)
    facts = (images.extractor, images.resize_mode, a.count, b.count, reference.sha256)
    return (
        DistributionDistance(frechet, frechet_distance(a.mean, a.cov, b.mean, b.cov), None, *facts),
        DistributionDistance(kernel, kid_value, kid_spread, *facts),
    )


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians, which is FID's formula.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))  (Dowson & Landau 1982; Heusel et al. 2017, Eq. 6).
    The trace of the root is taken from the eigenvalues of C1^(1/2) C2 C1^(1/2), which has the same ones and
    is symmetric, so that it stays real when the covariances are singular.
    """
    mean1, cov1, mean2, cov2 = (tensor.double() for tensor in (mean1, cov1, mean2, cov2))
    values, vectors = torch.linalg.eigh(cov1)
    root1 = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace_root = torch.linalg.eigvalsh(root1 @ cov2 @ root1).clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace_root)


def kid(
    features_a: Tensor, features_b: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float | None]:
    """Kernel Inception distance (Binkowski et al. 2018): unbiased squared MMD, kernel (x . y / D + 1)^3.

    Unbiased means that it scatters around 0 for two samples of one distribution, below 0 too.

    Args:
        features_a, features_b: (N,D) and (M,D).
        subsets, subset_size: the mean is over so many pairs of random subsets of that size. When a set is no
            larger than `subset_size`, the size is that of the smaller set.
        seed: of the choice of subsets.

    Returns:
        The mean, and the standard deviation over the subsets (None when both sets are one subset).
    """
    from torchmetrics.image.kid import poly_mmd

    a, b = features_a.double(), features_b.double()
    size = min(subset_size, len(a), len(b))
    if size < 2:
        raise UserError(f"KID needs at least 2 pictures on each side, got {len(a)} and {len(b)}.")
    if size == len(a) == len(b):
        return float(poly_mmd(a, b)), None
    generator = torch.Generator().manual_seed(seed)
    values = torch.stack(
        [
            poly_mmd(
                a[torch.randperm(len(a), generator=generator)[:size]],
                b[torch.randperm(len(b), generator=generator)[:size]],
            )
            for _ in range(subsets)
        ]
    )
    return float(values.mean()), float(values.std())


def inception_extractor(resize_mode: ResizeMode = "bilinear", device: torch.device | str = "cpu") -> FeatureExtractor:
    """The 2048 pooled features of the original FID's Inception network, from its weights.

    Args:
        resize_mode: to 299 x 299, in float: `bilinear` without antialiasing, as pytorch-fid does, or
            `bicubic-antialias`, as clean-fid does.
        device: where it runs.

    Raises:
        UserError: the weights are not on this machine (it names the file), or not of this network.
    """
    if resize_mode not in ("bilinear", "bicubic-antialias"):
        raise UserError(f"There is no resize mode {resize_mode!r}. Known: bilinear, bicubic-antialias.")
    path = require_weights("fid_inception")
    net = fid_inception_network()
    try:
        net.load_state_dict(load_state_dict(path), assign=True)
    except RuntimeError as error:
        raise UserError(f"{path}: expected the Inception network of FID. {error}") from error
    net.fc = nn.Identity()
    net = net.to(device).eval().requires_grad_(False)
    mode, antialias = ("bicubic", True) if resize_mode == "bicubic-antialias" else ("bilinear", False)

    def network(images: Tensor) -> Tensor:
        images = images.float().to(device)
        return net(F.interpolate(images, (299, 299), mode=mode, antialias=antialias, align_corners=False))

    return FeatureExtractor(FID_INCEPTION, resize_mode, network)


def fid_inception_network() -> nn.Module:
    """Inception v3 as it was in TensorFlow in 2015, without weights: parameters on the meta device, to be
    assigned.

    It is torchvision's network, but for 1008 classes and the pooling of the mixed blocks: an average does not
    count the zeros beyond the border, and in the last block it is a maximum.
    """
    from torchvision.models import inception_v3

    with torch.device("meta"):
        net = inception_v3(weights=None, num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        _replace_pooling(getattr(net, f"Mixed_{name}"), nn.AvgPool2d(3, 1, 1, count_include_pad=False))
    _replace_pooling(net.Mixed_7c, nn.MaxPool2d(3, 1, 1))
    return net


def _replace_pooling(block: Any, pool: nn.Module) -> None:
    """Give a mixed block of torchvision another pooling; its last branch is the pooled one."""
    branches = block._forward

    def with_pool(x: Tensor) -> list[Tensor]:
        return [*branches(x)[:-1], block.branch_pool(pool(x))]

    block._forward = with_pool
