"""The test sets of the paper by name, any other folder of aligned faces, and what the paper published about them.

A test set is a folder of pictures, one aligned face each. A name is looked up below the folder that the environment
variable `RGCP_DATA_DIR` names (`data` in the working directory otherwise); nothing is ever downloaded.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from rgcp_core.degrade import degrade
from rgcp_core.errors import UserError
from rgcp_core.images import PHOTO_SUFFIXES, find_photos, load_image, save_image, write_atomically

DATA_DIR = "RGCP_DATA_DIR"
DEGRADATIONS = "degradations.json"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A test set that others report on."""

    name: str
    """Its name here, and of its folder."""
    title: str
    counts: tuple[int, ...]
    """Pictures it is known to have; the first is the paper's. More than one where the sources differ."""
    about: str
    source: str
    """Where to get it."""


_GFPGAN_PAGE = "the project page of GFP-GAN: https://xinntao.github.io/projects/gfpgan"

PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="wider-test",
            title="Wider-Test",
            counts=(970,),
            about="Badly degraded faces from WIDER FACE (Yang et al. 2016), selected by Zhou et al. 2022 (CodeFormer).",
            source="the authors of CodeFormer, who link it in https://github.com/sczhou/CodeFormer/issues/42",
        ),
        Protocol(
            name="lfw-test",
            title="LFW-Test",
            counts=(1711, 1771),
            about="The first picture of each person of LFW's validation part (Huang et al. 2007). Sources differ: the "
            "file that is passed on holds 1711 pictures, some papers write 1771.",
            source=f"{_GFPGAN_PAGE} (lfw_cropped_faces)",
        ),
        Protocol(
            name="webphoto-test",
            title="WebPhoto-Test",
            counts=(407,),
            about="Faces from 188 old photos on the web, selected by Wang et al. 2021 (GFP-GAN).",
            source=_GFPGAN_PAGE,
        ),
        Protocol(
            name="deblur-test",
            title="Deblur-Test",
            counts=(67,),
            about="Real motion blur, from Lai et al. 2022 (Face deblurring using dual camera fusion on mobile phones). "
            "The paper does not say which of their pictures it took.",
            source="the authors of that paper, or those of Ding et al. 2024 for their selection; align as FFHQ does",
        ),
    )
}
"""Of all of them: real damage, so there is no clean picture; aligned as FFHQ; the paper measures at 256 x 256 px."""


@dataclass(frozen=True)
class PublishedRow:
    """One number of the paper (Ding et al. 2024), measured by its authors."""

    dataset: str
    method: str
    metric: str
    value: float


def _rows(datasets: Sequence[str], metrics: Sequence[str], table: Mapping[str, Sequence[float]]) -> list[PublishedRow]:
    columns = [(dataset, metric) for dataset in datasets for metric in metrics]
    return [
        PublishedRow(dataset, method, metric, value)
        for method, values in table.items()
        for (dataset, metric), value in zip(columns, values, strict=True)
    ]


PUBLISHED: Sequence[PublishedRow] = (
    *_rows(
        ("wider-test", "webphoto-test", "lfw-test", "deblur-test"),
        ("fid", "musiq_koniq"),
        {
            "input": (183.03, 15.68, 161.82, 20.26, 131.68, 27.51, 169.43, 27.53),
            "GFPGAN": (59.38, 56.48, 114.15, 55.13, 64.10, 60.46, 178.40, 58.03),
            "CodeFormer": (48.57, 55.70, 98.55, 55.20, 66.31, 58.72, 163.47, 57.09),
            "VQFR": (52.64, 54.23, 105.94, 52.44, 63.73, 57.52, 168.36, 54.45),
            "DR2 (+VQFR)": (69.40, 53.62, 143.96, 51.92, 67.70, 57.42, 173.33, 55.34),
            "Ding et al.": (46.38, 58.73, 96.44, 57.71, 56.32, 60.68, 135.33, 60.20),
        },
    ),
    *_rows(
        ("subject-a", "obama", "hermione"),
        ("identity_arcface",),
        {
            "input": (0.721, 0.502, 0.483),
            "CodeFormer": (0.633, 0.558, 0.518),
            "VQFR": (0.560, 0.527, 0.483),
            "DR2 (+VQFR)": (0.384, 0.400, 0.392),
            "ASFFNet": (0.694, 0.574, 0.522),
            "Ding et al.": (0.731, 0.716, 0.664),
        },
    ),
)
"""Tables 1 and 2 of the paper: blind restoration, and personal restoration with about 20 photos of the subject."""


def published(dataset: str) -> list[PublishedRow]:
    """The paper's rows about a data set; none when it has none."""
    return [row for row in PUBLISHED if row.dataset == dataset]


@dataclass(frozen=True)
class Dataset:
    """A test set that is here."""

    name: str
    folder: Path
    pictures: tuple[str, ...]
    """Names below `folder`, sorted, with forward slashes."""
    protocol: Protocol | None
    total: int
    """Pictures in the folder; more than in `pictures` when a part was asked for."""
    sha256: str
    """Of the names and contents of `pictures`."""


def find_dataset(name_or_folder: str, limit: int | None = None) -> Dataset:
    """Find a test set and check what can be checked before hours of work.

    Args:
        name_or_folder: a key of `PROTOCOLS`, or any folder. A folder that is called like a protocol (capitals do not
            matter) is held to be it.
        limit: only the first so many pictures by name.

    Raises:
        UserError: not there (with where to get it), another count than the protocol's, or a picture that is not a
            readable square.
    """
    name = Path(name_or_folder).name.lower()
    protocol = PROTOCOLS.get(name)
    folder = Path(name_or_folder)
    if protocol is not None and not folder.is_dir():
        folder = Path(os.environ.get(DATA_DIR, "data")) / protocol.name
    if not folder.is_dir():
        raise UserError(_how_to_get(protocol, folder) if protocol else _no_such(name_or_folder))
    names = tuple(sorted(name for _, name in find_photos([folder])))
    if not names:
        raise UserError(f"No pictures in {folder}.")
    if protocol is not None and len(names) not in protocol.counts:
        expected = " or ".join(map(str, protocol.counts))
        raise UserError(
            f"{protocol.title} has {expected} pictures, but {folder} holds {len(names)}. Get it from "
            f"{protocol.source}; or rename the folder to measure it as a set of its own."
        )
    chosen = names[:limit]
    for picture in chosen:
        _check_square(folder / picture)
    return Dataset(name, folder, chosen, protocol, len(names), files_sha256(folder, chosen))


def files_sha256(folder: Path, names: Iterable[str]) -> str:
    """One hash of the names and contents of files."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name}\0{hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def match_by_name(pictures: Sequence[str], folder: Path) -> dict[str, Path | None]:
    """Find the counterpart of every picture in another folder; None for one that has none.

    Suffixes do not count (`a/b.jpg`, `a/b.png` and `a/b.jpg.png` are one name), nor does the `_00` that the tools of
    GFPGAN and its heirs append for the first face.

    Raises:
        UserError: no such folder, none matches, or one name fits two files.
    """
    if not folder.is_dir():
        raise UserError(f"No such folder: {folder}.")
    found: dict[str, Path] = {}
    for _, name in find_photos([folder]):
        key = _key(name)
        if key in found:
            raise UserError(f"{folder}: {name} and {found[key].name} have the same name but for their suffix.")
        found[key] = folder / name
    matches = {picture: found.get(_key(picture), found.get(f"{_key(picture)}_00")) for picture in pictures}
    if not any(matches.values()):
        raise UserError(
            f"None of the {len(found)} pictures in {folder} is called like one of the test set, such as {pictures[0]}."
        )
    return matches


def photo_seed(seed: int, name: str) -> int:
    """Seed of one picture's damage, from the seed of the set and the picture's name: so that no two share a noise."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


def degrade_pictures(
    source: Path,
    out: Path,
    kind: str,
    seed: int,
    levels: Mapping[str, float] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Path:
    """Degrade a picture, or all pictures of a folder, into `out` as PNG files of the same size and name.

    Args:
        source: a picture or a folder.
        out: folder; existing files in it are replaced.
        kind: a key of `rgcp_core.degrade.KINDS`.
        seed: of the set; each picture's own comes from it and the picture's name.
        levels: parameters of that kind that are not left to their default.
        on_step: progress callback, (pictures done, pictures in all).

    Returns:
        `out/degradations.json`: kind, seed, and for each picture its name, the sha256 of the clean file, its seed and
        every value used, so that `degrade` makes it again.

    Raises:
        UserError: no pictures, a wrong kind or level, `out` inside `source`, two pictures that would get one name.
        UnitError: a picture that cannot be read.
    """
    names = sorted((root / name, name) for root, name in find_photos([source]))
    if not names:
        raise UserError(f"No pictures in {source}.")
    if source.is_dir() and (out.resolve() == source.resolve() or source.resolve() in out.resolve().parents):
        raise UserError(f"The output {out} lies inside the input {source}. Choose a folder outside.")
    outputs = [f"{_key(name)}.png" for _, name in names]
    if twice := {output for output in outputs if outputs.count(output) > 1}:
        raise UserError(f"Two pictures would become {sorted(twice)[0]}: their names differ in the suffix only.")
    records = []
    for done, ((path, name), output) in enumerate(zip(names, outputs, strict=True), start=1):
        degraded = degrade(load_image(path), kind, photo_seed(seed, name), **(levels or {}))
        save_image(degraded.image, out / output)
        records.append(
            {
                "picture": output,
                "clean": name,
                "clean_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "seed": degraded.seed,
                "parameters": degraded.parameters,
            }
        )
        if on_step is not None:
            on_step(done, len(names))
    content = {"kind": kind, "seed": seed, "pictures": records}
    write_atomically(out / DEGRADATIONS, json.dumps(content, indent=1, ensure_ascii=False).encode())
    return out / DEGRADATIONS


def _key(name: str) -> str:
    """A name without its picture suffixes."""
    path = PurePosixPath(name)
    while path.suffix.lower() in PHOTO_SUFFIXES:
        path = path.with_suffix("")
    return path.as_posix()


def _check_square(path: Path) -> None:
    try:
        with Image.open(path) as image:
            width, height = image.size
    except OSError as error:
        raise UserError(f"{path} cannot be read as a picture: {error}.") from error
    if width != height:
        raise UserError(
            f"{path} is {width} x {height} px; a test set holds square crops, one aligned face each. For whole photos "
            "use rgcp restore."
        )


def _no_such(name: str) -> str:
    return f"No folder {name}, and no test set of that name; there are: {', '.join(PROTOCOLS)}."


def _how_to_get(protocol: Protocol, folder: Path) -> str:
    return (
        f"{protocol.title} ({protocol.counts[0]} pictures) is not here: {folder} does not exist. Get it from "
        f"{protocol.source}; put its pictures there, or set {DATA_DIR} to the folder that holds {protocol.name}."
    )
