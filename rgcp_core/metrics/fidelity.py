"""How near a picture is to the undamaged one: PSNR, SSIM and LPIPS.

All take two batches (N,3,H,W) in [-1,1], RGB, and give (N,), one number a pair. Values are not rounded to 8
bits first: whoever wants the numbers of the saved files passes what was read back from them.
"""

import warnings
from pathlib import Path

import torch
from torch import Tensor

from rgcp_core.errors import UserError
from rgcp_core.weights import load_state_dict, require_weights

_SSIM_SIGMA, _SSIM_WINDOW = 1.5, 11  # Wang et al. 2004, section III-B


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (N,): 10 log10(2^2 / MSE), the peak being the width of [-1,1].

    That is the same number as with a peak of 1 on [0,1] or of 255 on 8-bit values. Infinite for equal
    pictures.
    """
    _check_pair(images, reference)
    mse = (images.double() - reference.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / mse)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, Eq. 13), (N,), at most 1: Gaussian window 11, sigma 1.5.

    Computed on [0,1] with L = 1, since the luminance term depends on where black lies; per colour channel,
    then averaged. Only windows that lie wholly in the picture count, as in the authors' code and in
    scikit-image with `gaussian_weights=True, sigma=1.5, use_sample_covariance=False`. So a side has at least
    11 pixels.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_pair(images, reference)
    if min(images.shape[-2:]) < _SSIM_WINDOW:
        raise UserError(f"SSIM needs at least 11 x 11 pixels, got {tuple(images.shape[-2:])}.")
    _, ssim_map = structural_similarity_index_measure(
        (images.double() + 1) / 2,
        (reference.double() + 1) / 2,
        sigma=_SSIM_SIGMA,
        kernel_size=_SSIM_WINDOW,
        data_range=1.0,
        reduction="none",
        return_full_image=True,
    )
    border = _SSIM_WINDOW // 2  # the library mirrors the picture at its border and counts those windows too
    return ssim_map[..., border:-border, border:-border].mean(dim=(1, 2, 3))


class Lpips:
    """LPIPS v0.1 with AlexNet (Zhang et al. 2018), by the `lpips` package: 0 is equal, more is worse.

    It sees the pictures at the size they have (at least 31 px) and depends on that size.

    Raises:
        UserError: AlexNet's weights are not on this machine.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        import lpips

        path = require_weights("lpips_alexnet")
        alexnet = load_state_dict(path)
        linear = load_state_dict(Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth")
        with warnings.catch_warnings():  # torchvision's, about an argument that lpips passes
            warnings.simplefilter("ignore", UserWarning)
            net = lpips.LPIPS(net="alex", version="0.1", pretrained=False, pnet_rand=True, verbose=False)
        state = net.state_dict()
        try:
            for key in state:
                if key.startswith("net."):  # net.slice2.3.weight is torchvision's features.3.weight
                    state[key] = alexnet["features." + key.split(".", 2)[2]]
                elif key.startswith("lin"):  # lins.0.model... is a second name of lin0.model...
                    state[key] = linear[key.replace("lins.", "lin")]
        except KeyError as error:
            raise UserError(f"{path}: expected AlexNet as torchvision names it; it lacks {error}.") from error
        net.load_state_dict(state)
        self._net = net.to(device).eval().requires_grad_(False)
        self._device = device

    @torch.no_grad()
    def __call__(self, images: Tensor, reference: Tensor) -> Tensor:
        """Distance of each pair, (N,)."""
        _check_pair(images, reference)
        if min(images.shape[-2:]) < 31:
            raise UserError(f"LPIPS needs at least 31 x 31 pixels, got {tuple(images.shape[-2:])}.")
        return self._net(images.float().to(self._device), reference.float().to(self._device)).flatten().cpu()


def _check_pair(images: Tensor, reference: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or images.shape != reference.shape:
        raise UserError(
            f"Expected two batches (N,3,H,W) of one shape, got {tuple(images.shape)} and {tuple(reference.shape)}."
        )
