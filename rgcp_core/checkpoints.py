"""Reading priors that others trained, and writing ours in the format that other tools read.

A state dict says most of its architecture by its keys and shapes; `read_architecture` reads that off. What weights
cannot say (picture size, channels of an attention head, attention order, noise schedule, crop, licence, source) comes
from the caller or from a JSON file of the same name beside the weights. Pickles are read with ``weights_only=True``.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rgcp_core.damage import DetailLaw
from rgcp_core.diffusers_format import read_diffusers_folder
from rgcp_core.errors import UserError
from rgcp_core.prior import (
    CARD_FILE,
    Card,
    Prior,
    ScheduleConfig,
    file_sha256,
    find_prior,
    read_card,
    write_prior,
)
from rgcp_core.unet import UNet, UNetConfig

State = Mapping[str, Tensor]
"""Parameter name to tensor."""


class Facts(BaseModel):
    """What a state dict does not say about itself."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str | None = Field(default=None, description="Name of the prior.")
    sha256: str | None = Field(default=None, description="Of the weights file; checked when given.")
    architecture: Mapping[str, Any] = Field(
        default={}, description="Fields of UNetConfig; needed: image_size and num_head_channels. The rest is checked."
    )
    schedule: Mapping[str, Any] = Field(default={}, description="Fields of ScheduleConfig.")
    crop_window: tuple[float, float, float, float] = Field(
        default=(0.0, 0.0, 1.0, 1.0), description="Part of the FFHQ-aligned square: left, top, right, bottom."
    )
    licence: str | None = Field(default=None, description="What the weights may be used for.")
    source: str | None = Field(default=None, description="Where the weights come from.")
    training: Mapping[str, Any] = Field(default={}, description="Data, samples seen, hardware, hours.")
    heldout_eps_mse: Mapping[str, float] = Field(default={}, description="Denoising error by time.")
    detail: DetailLaw | None = Field(default=None, description="What detail clean pictures have.")


def read_facts(weights: Path) -> dict[str, Any]:
    """The JSON object beside ``weights`` (same name, ``.json``); empty when there is none."""
    path = weights.with_suffix(".json")
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(facts, dict):
        raise UserError(f"{path} must hold one JSON object.")
    return facts


def import_prior(path: Path, folder: Path, facts: Mapping[str, Any], dtype: torch.dtype | None = None) -> Card:
    """Turn foreign weights into the prior ``folder``; nothing is written unless everything fits.

    Args:
        path: a guided-diffusion ``.pt`` (raw or EMA), a ``.safetensors`` with the same keys, a folder of diffusers'
            ``UNet2DModel``, or a prior's own folder.
        folder: where ``card.json`` and ``model.safetensors`` go.
        facts: see `Facts`; they win over the JSON file beside the weights.
        dtype: of the written weights; None keeps the file's own.

    Raises:
        UserError: an unreadable file, a missing fact, or the first key that cannot be mapped.
    """
    if path.is_dir() and (path / CARD_FILE).is_file():
        return _copy_prior(path, folder, facts, dtype)
    state: State
    if path.is_dir():
        state, told = read_diffusers_folder(path, read_state_dict)
    else:
        state, told = read_state_dict(path), read_facts(path)
    try:
        known = Facts.model_validate(_merged(told, facts))
    except ValidationError as error:
        raise UserError(f"Unusable facts about {path.name}: {error}") from error
    if known.sha256 is not None and path.is_file() and file_sha256(path) != known.sha256:
        raise UserError(f"{path} is not the file that {path.with_suffix('.json').name} describes: its sha256 differs.")
    architecture = read_architecture(state, known.architecture)
    _check_keys(state, architecture)
    for need in ("licence", "source"):
        if not getattr(known, need):
            raise UserError(f"The {need} of {path.name} is not known. Give it with --{need}; the card must state it.")
    card = Card(
        name=known.name or path.stem,
        architecture=architecture,
        schedule=_schedule(known.schedule),
        crop_window=known.crop_window,
        sha256="",
        licence=known.licence or "",
        source=known.source or "",
        training=known.training,
        heldout_eps_mse=known.heldout_eps_mse,
        detail=known.detail,
    )
    return write_prior(state, card, folder, dtype)


def export_guided_diffusion(prior: Prior, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a ``.pt`` with guided-diffusion's keys, and beside it the JSON file that makes it importable again."""
    for name in ("norm_eps", "frequency_shift", "downsample_padding"):
        value = getattr(prior.card.architecture, name)
        if value != UNetConfig.model_fields[name].default:
            raise UserError(f"guided-diffusion's network cannot express {name} = {value!r}, so nothing was written.")
    torch.save({key: value.to(dtype) for key, value in prior.network.state_dict().items()}, path)
    card = prior.card.model_dump(mode="json") | {"sha256": file_sha256(path)}
    path.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def read_state_dict(path: Path) -> State:
    """Tensors of a ``.safetensors`` or a pickled state dict, memory-mapped; no code in the file is run.

    Wrappers such as ``{"ema": ...}`` or ``{"state_dict": ...}`` and a ``module.`` prefix are taken off.
    """
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{path} is not a file of plain tensors ({str(error).splitlines()[0]}). Only files that load without "
            "running code are read: a state dict saved by torch.save (PyTorch 1.6 or later), or safetensors."
        ) from error
    for wrapper in ("ema", "ema_state_dict", "model_ema", "state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}; expected a state dict (names to tensors).")
    for key, value in loaded.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: the entry {key!r} is a {type(value).__name__}; expected a tensor.")
    return {key.removeprefix("module."): value for key, value in loaded.items()}


def read_architecture(state: State, told: Mapping[str, Any]) -> UNetConfig:
    """The architecture that the keys and shapes of a guided-diffusion ``state`` imply.

    Args:
        state: parameter names to tensors.
        told: at least ``image_size`` and ``num_head_channels``; what the weights say as well must agree with them.

    Raises:
        UserError: a key is missing, a needed value was not told, or one contradicts the weights.
    """

    def shape(key: str) -> torch.Size:
        if key not in state:
            raise UserError(f"Not a guided-diffusion U-Net: the key {key!r} is missing.")
        return state[key].shape

    for need in ("image_size", "num_head_channels"):
        if need not in told:
            raise UserError(
                f"The weights do not say their {need}. Give it with --{need.replace('_', '-')}, or in a JSON file "
                'beside the weights: {"architecture": {"' + need + '": ...}}.'
            )
    image_size = int(told["image_size"])
    model_channels = shape("time_embed.0.weight")[1]
    blocks = len({key.split(".")[1] for key in state if key.startswith("input_blocks.")})
    # A level ends with the only output block that holds an upsampling layer after its residual block.
    ups = [key.split(".") for key in state if key.endswith((".conv.weight", ".in_layers.2.weight"))]
    ends = sorted(int(part[1]) for part in ups if part[0] == "output_blocks" and part[2] != "0")
    num_res_blocks = ends[0] if ends else blocks - 1
    first_blocks = range(1, blocks, num_res_blocks + 1)
    widths = [shape(f"input_blocks.{i}.0.out_layers.3.weight")[0] for i in first_blocks]
    mult = [width / model_channels for width in widths]
    read = {
        "in_channels": shape("input_blocks.0.0.weight")[1],
        "out_channels": shape("out.2.weight")[0],
        "model_channels": model_channels,
        "channel_mult": tuple(int(m) if m == int(m) else m for m in mult),
        "num_res_blocks": num_res_blocks,
        "attention_resolutions": tuple(
            image_size >> level for level, i in enumerate(first_blocks) if f"input_blocks.{i}.1.qkv.weight" in state
        ),
        "use_scale_shift_norm": shape("input_blocks.1.0.emb_layers.1.weight")[0] == 2 * widths[0],
        "resblock_updown": f"input_blocks.{num_res_blocks + 1}.0.op.weight" not in state,
    }
    for name, value in read.items():
        expected = told.get(name, value)
        if (tuple(expected) if isinstance(expected, list) else expected) != value:
            raise UserError(f"{name} was given as {expected}, but the weights say {value}.")
    others = {key: value for key, value in told.items() if key in UNetConfig.model_fields and key not in read}
    return UNetConfig(**{"dropout": 0.0, **others, **read})


def _check_keys(state: State, architecture: UNetConfig) -> None:
    with torch.device("meta"):
        expected = UNet(architecture).state_dict()
    for key, value in expected.items():
        if key not in state:
            raise UserError(f"The weights lack the key {key!r}, which their architecture needs. Nothing was written.")
        if state[key].shape != value.shape:
            raise UserError(
                f"The key {key!r} has the shape {tuple(state[key].shape)}; expected {tuple(value.shape)}. "
                "Nothing was written."
            )
    for key in state:
        if key not in expected:
            raise UserError(f"The key {key!r} has no place in this U-Net. Nothing was written.")


def _schedule(told: Mapping[str, Any]) -> ScheduleConfig:
    kind = told.get("kind", "linear")
    if kind != "linear":
        raise UserError(f"The noise schedule is {kind!r}; only linear betas can be mapped. Nothing was written.")
    return ScheduleConfig(**{key: value for key, value in told.items() if key != "kind"})


def _merged(told: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """``facts`` over ``told``, one level deep; None is no fact."""
    merged = dict(told)
    for key, value in facts.items():
        if isinstance(value, Mapping):
            merged[key] = {**merged.get(key, {}), **{k: v for k, v in value.items() if v is not None}}
        elif value is not None:
            merged[key] = value
    return merged


def _copy_prior(path: Path, folder: Path, facts: Mapping[str, Any], dtype: torch.dtype | None) -> Card:
    card = read_card(find_prior(path))
    weights = path / "model.safetensors"
    if not weights.is_file() or file_sha256(weights) != card.sha256:
        raise UserError(f"{weights} is missing or does not match its card. Nothing was written.")
    update = {key: facts[key] for key in ("name", "licence", "source", "crop_window") if facts.get(key) is not None}
    return write_prior(load_file(weights), card.model_copy(update=update), folder, dtype)
