"""The demo: public-domain photographs, damaged by seeded kinds, restored, and compared with the undamaged ones.

python -m flows.demo [--out demo-out] [--prior faces64] [--preset fast] [--short]
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rgcp_core.degrade import degrade
from rgcp_core.faces.align import Alignment, align_face, crop_face
from rgcp_core.faces.detect import load_detector
from rgcp_core.images import from_uint8, load_image, resize, save_image, to_uint8
from rgcp_core.manifest import read_manifest
from rgcp_core.metrics import measure_faces
from rgcp_core.prior import Card, find_prior, read_card
from tasks.units import UnitRecord


class Damage(NamedTuple):
    """A photograph and what is done to it; parameters that are not named have their defaults."""

    photo: str
    kind: str
    parameters: dict[str, float]


DAMAGES = (
    Damage("astronaut", "old_photo", {}),
    Damage("grace_hopper", "old_photo", {}),
    Damage("astronaut", "scratches", {"scratches": 5.0, "dust": 20.0, "width": 1.5}),
    Damage("grace_hopper", "low_resolution", {"factor": 4}),
)
SEED = 3
FEW_STEPS = {"album": {"size": 2, "steps": 8}, "constrain": {"iterations": 4}}
METRICS = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips_alex": "LPIPS (low is good)", "identity_dlib": "identity"}


def main(
    out: Annotated[Path, typer.Option(help="Folder for photos and results.")] = Path("demo-out"),
    prior: Annotated[str, typer.Option(help="Name or folder of the prior.")] = "faces64",
    preset: Annotated[str, typer.Option(help="fast, balanced or paper.")] = "fast",
    short: Annotated[bool, typer.Option(help="One photo and few steps: a check, not a show.")] = False,
) -> None:
    """Damage, restore, compare."""
    home = (out / "prefect").absolute()
    home.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PREFECT_HOME", str(home))
    from flows.run import run_archive  # after PREFECT_HOME: prefect reads it when it is imported

    console = Console(highlight=False)
    card = read_card(find_prior(prior))
    damages = DAMAGES[:1] if short else DAMAGES
    for damage in damages:
        name = f"{damage.photo}-{damage.kind}"
        clean = sized_photo(damage.photo, card)
        save_image(clean, out / "clean" / f"{name}.png")
        damaged = degrade(clean, damage.kind, SEED, **damage.parameters)
        save_image(damaged.image, out / "damaged" / f"{name}.png")
    console.print(f"{len(damages)} public-domain portraits, damaged with seed {SEED}, are in {out / 'damaged'}.")

    restored = out / "restored"
    run_archive(
        [str(out / "damaged")],
        restored,
        Console(stderr=True),
        prior=prior,
        preset=preset,
        settings=FEW_STEPS if short else {},
        command=restore_command(out / "damaged", restored, prior, preset, FEW_STEPS if short else {}),
    )
    faces = list(compared_faces(restored, out / "clean"))
    if not faces:
        console.print(f"No face was restored; {restored / 'report.html'} says why.")
        raise typer.Exit(1)
    picture = out / "comparison.png"
    comparison_picture(faces).save(picture)
    console.print(comparison_table(faces, card))
    console.print(f"Undamaged, damaged, restored: {picture}", soft_wrap=True)


def restore_command(
    damaged: Path, restored: Path, prior: str, preset: str, settings: dict[str, dict[str, int]]
) -> list[str]:
    """The command that does the demo's restoration by itself."""
    command = ["rgcp", "restore", str(damaged), "--out", str(restored), "--prior", prior, "--preset", preset]
    for group, values in settings.items():
        for name, value in values.items():
            command += ["--set", f"{group}.{name}={value}"]
    return command


def photograph(name: str) -> Tensor:
    """A public-domain portrait (3,H,W) that comes with a package: NASA's astronaut, the US Navy's Grace Hopper."""
    if name == "astronaut":
        from skimage.data import astronaut

        return from_uint8(astronaut())
    from matplotlib.cbook import get_sample_data

    path = get_sample_data("grace_hopper.jpg", asfileobj=False)
    return from_uint8(np.array(Image.open(str(path)).convert("RGB")))


def sized_photo(name: str, card: Card) -> Tensor:
    """The photograph at the size at which a pixel of its face is a pixel of the prior."""
    photo = photograph(name)
    face = load_detector("offline")(to_uint8(photo))[0]
    scale = align_face(face.landmarks, card.image_size, card.crop_window).scale
    height, width = (round(side / scale) for side in photo.shape[1:])
    return resize(photo, (height, width)).clamp(-1, 1)


class ComparedFace(NamedTuple):
    """One face three times, each (3,S,S)."""

    photo: str
    clean: Tensor
    damaged: Tensor
    restored: Tensor


def compared_faces(run_dir: Path, clean_dir: Path) -> Iterator[ComparedFace]:
    """The restored faces of a run, with the same crop of the undamaged photos."""
    manifest = read_manifest(run_dir)
    for row in manifest[manifest.status == "restored"].itertuples():
        folder = run_dir / "faces" / str(row.unit)
        alignment = Alignment.from_json(UnitRecord.load(folder).fact("align", "alignment"))
        clean = crop_face(to_uint8(load_image(clean_dir / str(row.photo))), alignment)
        pictures = (load_image(folder / name) for name in ("input.png", "restored.png"))
        yield ComparedFace(Path(str(row.photo)).stem, clean, *pictures)


def comparison_table(faces: Sequence[ComparedFace], card: Card) -> Table:
    """Metrics of the damaged and of the restored faces against the undamaged ones, whatever they say."""
    clean, damaged, restored = (
        torch.stack([getattr(face, name) for face in faces]) for name in ("clean", "damaged", "restored")
    )
    table = Table(title="Against the undamaged photo: damaged -> restored")
    table.add_column("photo", no_wrap=True)
    which = [*METRICS, *(f"input_{name}" for name in METRICS)]
    values, unavailable = measure_faces(restored, damaged, clean, which=which, crop_window=card.crop_window)
    shown = [name for name in METRICS if name in values]
    for name in shown:
        table.add_column(METRICS[name], justify="right")
    for i, face in enumerate(faces):
        cells = (f"{values[f'input_{name}'][i]:.2f} -> {values[name][i]:.2f}" for name in shown)
        table.add_row(face.photo, *cells)
    if missing := [METRICS[name] for name in METRICS if name in unavailable]:
        table.caption = f"Not measured, as its weights are not here (rgcp doctor): {', '.join(missing)}"
    return table


def comparison_picture(faces: Sequence[ComparedFace], side: int = 192) -> Image.Image:
    """A row a face: undamaged, damaged, restored."""
    margin = 22
    picture = Image.new("RGB", (3 * side, margin + len(faces) * side), "white")
    draw = ImageDraw.Draw(picture)
    for column, label in enumerate(("undamaged", "damaged", "restored")):
        draw.text((column * side + side // 2, margin // 2), label, fill="black", anchor="mm", font_size=14)
    for row, face in enumerate(faces):
        for column, crop in enumerate((face.clean, face.damaged, face.restored)):
            pixels = Image.fromarray(to_uint8(crop)).resize((side, side), Image.Resampling.BICUBIC)
            picture.paste(pixels, (column * side, margin + row * side))
    return picture


if __name__ == "__main__":
    typer.run(main)
