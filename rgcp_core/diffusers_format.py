"""Reading folders of diffusers' ``UNet2DModel`` (the DDPM family, such as ddpm-celebahq-256).

The network is the same U-Net under other names when its blocks are the plain ones; every entry of its configuration
is checked, and the first that this U-Net cannot express is refused.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rgcp_core.errors import UserError

_MUST_BE: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional",),
    "center_input_sample": (False,),
    "act_fn": ("silu", "swish"),
    "norm_num_groups": (32,),
    "attn_norm_num_groups": (None, 32),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "add_attention": (True,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "time_embedding_dim": (None,),
    "resnet_time_scale_shift": ("default",),  # the other kind has attention without a norm
    "freq_shift": (0, 1),
    "downsample_padding": (0, 1),
    "flip_sin_to_cos": (False, True),
}
_READ = {
    *("sample_size", "in_channels", "out_channels", "block_out_channels", "layers_per_block", "dropout", "norm_eps"),
    *("down_block_types", "up_block_types", "attention_head_dim", "num_train_timesteps"),
}
_DEFAULTS: dict[str, Any] = {  # of UNet2DModel, for configurations that leave them out
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "downsample_padding": 1,
    "norm_eps": 1e-5,
    "attention_head_dim": 8,
    "layers_per_block": 2,
    "in_channels": 3,
    "out_channels": 3,
    "dropout": 0.0,
    "resnet_time_scale_shift": "default",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {
    "group_norm": "norm",
    "to_out.0": "proj_out",
    "proj_attn": "proj_out",
    **dict.fromkeys(("to_q", "to_k", "to_v", "query", "key", "value"), "qkv"),
}
_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def read_diffusers_folder(
    path: Path, read_weights: Callable[[Path], Mapping[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A diffusers folder (a pipeline's, or its ``unet``) under guided-diffusion's names, and what it says of itself.

    Args:
        path: the folder.
        read_weights: safe reader of the weights file in it.

    Returns:
        The state dict, and facts for `rgcp_core.checkpoints.import_prior`: architecture, schedule and name.

    Raises:
        UserError: not such a folder, or the first entry or key that cannot be mapped.
    """
    unet = path / "unet" if (path / "unet" / "config.json").is_file() else path
    config = {**_DEFAULTS, **_read_json(unet / "config.json")}
    _check(config)
    names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    weights = next((unet / name for name in names if (unet / name).is_file()), None)
    if weights is None:
        raise UserError(f"{unet} holds neither {names[0]} nor {names[1]}.")
    state = _renamed(read_weights(weights), int(config["layers_per_block"]))
    if not config["flip_sin_to_cos"]:  # sines come first there: swap the halves of the weights that read them
        state["time_embed.0.weight"] = torch.cat(state["time_embed.0.weight"].chunk(2, dim=1)[::-1], dim=1)

    widths = config["block_out_channels"]
    attends = [level for level, kind in enumerate(config["down_block_types"]) if kind == "AttnDownBlock2D"]
    head = config["attention_head_dim"]
    if head is None:  # one head over all channels
        head = widths[-1]
        if any(widths[level] != head for level in attends):
            raise UserError("attention_head_dim is null and attention has several widths: that cannot be mapped.")
    mult = [width / widths[0] for width in widths]
    architecture = {
        "image_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "channel_mult": mult,
        "num_res_blocks": config["layers_per_block"],
        "attention_resolutions": [config["sample_size"] >> level for level in attends],
        "num_head_channels": head,
        "use_scale_shift_norm": False,
        "resblock_updown": False,
        "use_new_attention_order": True,
        "dropout": config["dropout"],
        "norm_eps": config["norm_eps"],
        "frequency_shift": config["freq_shift"],
        "downsample_padding": "both" if config["downsample_padding"] else "end",
    }
    return state, {"name": path.resolve().name, "architecture": architecture, "schedule": _schedule(path)}


def _check(config: dict[str, Any]) -> None:
    """Raise on the first entry of the configuration that this project's U-Net cannot express."""
    kind = config.get("_class_name")
    if kind != "UNet2DModel":
        raise UserError(f"Expected a folder of diffusers' UNet2DModel; config.json says {kind!r}.")
    for name, value in config.items():
        if name in _MUST_BE and value not in _MUST_BE[name]:
            allowed = " or ".join(repr(choice) for choice in _MUST_BE[name])
            raise UserError(f"config.json: {name} = {value!r} cannot be mapped; it must be {allowed}.")
        if name not in _MUST_BE and name not in _READ and not name.startswith("_"):
            raise UserError(f"config.json: the entry {name!r} is not known and may change the network.")
    for name in ("sample_size", "block_out_channels", "down_block_types", "up_block_types"):
        if name not in config:
            raise UserError(f"config.json lacks {name!r}.")
    down, up = config["down_block_types"], config["up_block_types"]
    for kind in down:
        if kind not in ("DownBlock2D", "AttnDownBlock2D"):
            raise UserError(f"config.json: the block {kind!r} cannot be mapped.")
    mirrored = [{"DownBlock2D": "UpBlock2D", "AttnDownBlock2D": "AttnUpBlock2D"}[kind] for kind in reversed(down)]
    if list(up) != mirrored:
        raise UserError(f"config.json: up_block_types must mirror down_block_types ({mirrored}); got {up}.")
    if not isinstance(config["sample_size"], int):
        raise UserError(f"config.json: sample_size = {config['sample_size']!r}; only square pictures can be mapped.")


def _renamed(state: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The state dict under guided-diffusion's names; query, key and value become one matrix."""
    upsampled_after_attention = {
        key.split(".")[1] for key in state if key.startswith("up_blocks") and "attentions" in key
    }
    renamed: dict[str, Tensor] = {}
    qkv: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        target = _TOP.get(module) or _block(module, layers, upsampled_after_attention)
        if target is None:
            raise UserError(f"The key {key!r} has no place in this U-Net. Nothing was written.")
        if target.endswith(".qkv"):
            part = {"q": "q", "k": "k", "v": "v"}[module.rpartition(".")[2].removeprefix("to_")[0]]
            qkv.setdefault(f"{target}.{kind}", {})[part] = value.reshape(len(value), *value.shape[1:2])
        elif target.endswith(".proj_out") and kind == "weight":
            renamed[f"{target}.{kind}"] = value.reshape(len(value), -1, 1)
        else:
            renamed[f"{target}.{kind}"] = value
    for key, parts in qkv.items():
        if len(parts) != 3:
            raise UserError(f"{key!r} needs query, key and value; found {sorted(parts)}. Nothing was written.")
        joined = torch.cat([parts["q"], parts["k"], parts["v"]])
        renamed[key] = joined[..., None] if key.endswith("weight") else joined
    return renamed


def _block(module: str, layers: int, upsampled_after_attention: set[str]) -> str | None:
    """guided-diffusion's name of a module inside a block, e.g. ``down_blocks.1.resnets.0.conv1``."""
    part, _, rest = module.partition(".")
    if part == "mid_block":
        group, _, rest = rest.partition(".")
        index, _, leaf = rest.partition(".")
        stage, level = "middle_block", 0
    elif part in ("down_blocks", "up_blocks"):
        number, _, rest = rest.partition(".")
        group, _, rest = rest.partition(".")
        index, _, leaf = rest.partition(".")
        level = int(number)
        stage = "input_blocks" if part == "down_blocks" else "output_blocks"
    else:
        return None
    first = level * (layers + 1) + (1 if part == "down_blocks" else 0)
    if group in ("resnets", "attentions"):
        leaf_name = (_RESNET if group == "resnets" else _ATTENTION).get(leaf)
        if leaf_name is None:
            return None
        if part == "mid_block":
            return f"middle_block.{2 * int(index) + (group == 'attentions')}.{leaf_name}"
        return f"{stage}.{first + int(index)}.{int(group == 'attentions')}.{leaf_name}"
    if (group, leaf) == ("downsamplers", "conv"):
        return f"{stage}.{first + layers}.0.op"
    if (group, leaf) == ("upsamplers", "conv"):
        position = 2 if str(level) in upsampled_after_attention else 1
        return f"{stage}.{first + layers}.{position}.conv"
    return None


def _schedule(path: Path) -> dict[str, Any]:
    places = (path / "scheduler" / "scheduler_config.json", path / "scheduler_config.json")
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UserError(f"{path} holds no scheduler_config.json, so its noise schedule is not known.")
    config = _read_json(file)
    for name, allowed in (("beta_schedule", "linear"), ("prediction_type", "epsilon"), ("trained_betas", None)):
        if config.get(name, allowed) != allowed:
            raise UserError(f"{file.name}: {name} = {config[name]!r} cannot be mapped; it must be {allowed!r}.")
    return {
        "beta_start": config.get("beta_start", 1e-4),
        "beta_end": config.get("beta_end", 0.02),
        "steps": config.get("num_train_timesteps", 1000),
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
