"""What a precision costs: the same faces restored in float32, TF32 and bfloat16, with the same noise.

    python -m benchmarks.precision --workers 2 --out results/precision

TF32 is a format of NVIDIA's matrix units: factors with 10 bits of mantissa in place of 23, sums in float32. It is
computed here on any device by rounding what goes into every product of the network, forward and backward
(`RoundedProducts`); on a GPU, ``precision: tf32`` does the same in hardware. Only the product of attention weights and
values inside the attention kernel stays out of reach: its factors are rounded before the kernel, not within.

A precision counts as equal to float32 when two one-sided tests, paired over faces and seeds, show its mean difference
to lie within the margin of the study of the presets: what another seed changes in a picture of `paper`. Faces are those
of that study, damaged in the same way. Writes results.parquet and precision.md into --out; cells that are there stay.
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rgcp_core.ablation import Case, Condition, restore_conditions
from rgcp_core.benchmark import Crops
from rgcp_core.images import save_image, write_atomically
from rgcp_core.metrics import measure_faces
from rgcp_core.prior import Prior, find_prior, read_card
from rgcp_core.settings import load_settings
from rgcp_core.statistics import paired_difference, tost
from rgcp_core.studies import damaged_cases

aten = torch.ops.aten
METRICS = {"psnr": "PSNR, dB", "lpips_alex": "LPIPS (Alex)", "identity_dlib": "identity (dlib)"}
FACTORS: dict[Any, tuple[int, ...]] = {
    aten.convolution.default: (0, 1),
    aten.convolution_backward.default: (0, 1, 2),
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten._scaled_dot_product_flash_attention_for_cpu.default: (0, 1, 2),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (0, 1, 2, 3),
}
"""Where the factors of a product stand among an operation's arguments; a bias is added and not multiplied."""


def rounded_to_tf32(x: Tensor) -> Tensor:
    """``x`` with 10 bits of mantissa, to nearest and ties away from zero, as ``cvt.rna.tf32.f32`` rounds."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class RoundedProducts(TorchDispatchMode):
    """Every product of float32 tensors multiplies factors that are rounded to TF32 first, backward passes too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Round the factors, then do what was asked for."""
        factors = FACTORS.get(func, ())
        rounded = [
            rounded_to_tf32(arg) if i in factors and arg is not None and arg.dtype == torch.float32 else arg
            for i, arg in enumerate(args)
        ]
        return func(*rounded, **(kwargs or {}))


ARMS: Mapping[str, tuple[str, Callable[[], AbstractContextManager[Any]]]] = {
    "float32": ("float32", nullcontext),
    "tf32": ("float32", RoundedProducts),
    "bfloat16": ("bfloat16", nullcontext),
}
"""By name: the setting, and what is around the restoration."""


def restore_cell(prior_name: str, case: Case, preset: str, arm: str, seed: int, folder: Path) -> None:
    """Restore one face in one precision and write ``<arm>-<seed>-<face>.png``, unless it is there."""
    picture = folder / f"{arm}-{seed}-{case.face}.png"
    if picture.is_file():
        return
    torch.set_num_threads(1)
    precision, around = ARMS[arm]
    prior = Prior.load(prior_name)
    settings = load_settings(preset, prior.card, {"precision": precision}).at_one_noise_step(prior.card)
    assert settings.restore.noise_step != "auto"
    t_end = settings.constrain.t_end(settings.restore.noise_step)
    condition = Condition(name=arm, settings=settings, t_end=t_end)
    with around():
        (restored,) = restore_conditions(prior, case, [condition], seed)
    torch.save(restored.picture, picture.with_suffix(".pt"))  # a PNG has no fractions of a level
    save_image(restored.picture, picture)


def measured(cases: Sequence[Case], seeds: Sequence[int], folder: Path, crop_window: Any) -> pd.DataFrame:
    """Metrics of all cells, one row each, with the distance from float32's picture in levels of 255."""
    rows = []
    for case in cases:
        for seed in seeds:
            pictures = {arm: torch.load(folder / f"{arm}-{seed}-{case.face}.pt") for arm in ARMS}
            batch = torch.stack(list(pictures.values()))
            columns, reasons = measure_faces(
                batch, clean=case.clean.expand_as(batch), which=list(METRICS), crop_window=crop_window
            )
            if reasons:
                raise SystemExit("\n".join(f"{name}: {reason}" for name, reason in reasons.items()))
            for i, (arm, picture) in enumerate(pictures.items()):
                levels = (picture.clamp(-1, 1) - pictures["float32"].clamp(-1, 1)).abs() * 127.5
                values = {name: columns[name][i] for name in METRICS}
                distance = {"mean_levels": float(levels.mean()), "max_levels": float(levels.max())}
                rows.append({"face": case.face, "seed": seed, "precision": arm, **values, **distance})
    return pd.DataFrame(rows)


def margins(presets: pd.DataFrame) -> dict[str, float]:
    """By metric, the standard deviation of `paper` over its seeds within a face, pooled over the faces."""
    paper = presets[presets["condition"] == "paper"]
    return {name: float(np.sqrt(paper.groupby("face")[name].var(ddof=1).mean())) for name in METRICS}


def markdown(rows: pd.DataFrame, margin: Mapping[str, float], facts: Mapping[str, Any]) -> str:
    """The table for docs/performance.md."""
    lines = [
        f"`{facts['preset']}`, {facts['faces']} faces, {facts['seeds']} seeds, prior {facts['prior']}; torch "
        f"{facts['torch']}.",
        "",
        "| against float32 | pixels differ by, levels of 255: mean (largest) | metric | difference | margin "
        "| 90 % interval of the test | equal |",
        "|---|---|---|---|---|---|---|",
    ]
    base = rows[rows["precision"] == "float32"].set_index(["face", "seed"])
    for arm in ARMS:
        if arm == "float32":
            continue
        other = rows[rows["precision"] == arm].set_index(["face", "seed"])
        pixels = f"{other['mean_levels'].mean():.3f} ({other['max_levels'].max():.2f})"
        faces = list(base.index.get_level_values("face"))
        for name, label in METRICS.items():
            theirs, ours = other[name][base.index].to_numpy(), base[name].to_numpy()
            test = tost(theirs - ours, margin[name], faces=faces)
            found = paired_difference(theirs, ours, faces=faces)
            lines.append(
                f"| {arm} | {pixels} | {label} | {found.mean:+.2g} [{found.low:+.2g}, {found.high:+.2g}] "
                f"| {margin[name]:.3g} | [{test.low:+.2g}, {test.high:+.2g}] | {'yes' if test.equivalent else 'no'} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Restore, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", default="faces64")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--data", type=Path, default=Path("data/evidence/unseen"))
    parser.add_argument("--presets", type=Path, default=Path("results/evidence/presets/results.parquet"))
    parser.add_argument("--faces", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("results/precision"))
    arguments = parser.parse_args()

    card = read_card(find_prior(arguments.prior))
    crops = Crops(card.image_size, card.crop_window, "window")
    paths = sorted(arguments.data.glob("*.png"))[: arguments.faces]
    cases = damaged_cases({path.stem: crops.load(path) for path in paths}, "blind", 0)
    seeds = range(arguments.seeds)
    cells = arguments.out / "cells"
    cells.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        futures = [
            pool.submit(restore_cell, arguments.prior, case, arguments.preset, arm, seed, cells)
            for seed in seeds
            for case in cases
            for arm in ARMS
        ]
        for number, future in enumerate(futures, start=1):
            future.result()
            print(f"{number} of {len(futures)}", flush=True)
    rows = measured(cases, seeds, cells, card.crop_window)
    facts = {"preset": arguments.preset, "faces": len(cases), "seeds": len(seeds), "prior": card.name}
    text = markdown(rows, margins(pd.read_parquet(arguments.presets)), {**facts, "torch": torch.__version__})
    rows.to_parquet(arguments.out / "results.parquet")
    write_atomically(arguments.out / "precision.json", json.dumps(facts, indent=1).encode())
    write_atomically(arguments.out / "precision.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
