"""The people whom an archive seems to hold, for a person to confirm.

OUT/people.parquet             one row a face, and one for a photo without any: cluster, sharpness, embedding
    proposal.csv               the same for the clusters that are large enough, to be edited: a name, and what to keep
    index.html, sheets/NNN.png all of it to look at
    faces/<unit>/input.png     the aligned faces
    albums/<name>/             the faces that were confirmed
"""

import csv
import io
import shutil
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from .clustering import SAME_PERSON, cluster_faces, sharp_and_varied, similarity_to_centre
from .errors import UserError
from .images import load_image, resize, to_uint8, write_atomically
from .people import check_name
from .personal_album import BLURRED, copies, grey

TABLE, PROPOSAL, PAGE, SHEETS, ALBUMS, PARTS = (
    *("people.parquet", "proposal.csv", "index.html"),
    *("sheets", "albums", ".rgcp/people"),
)
MIN_FACES = 3
"""Smaller clusters are not proposed: a personal prior needs 3 photos and should have 10."""

FOUND = pa.schema(
    [
        ("photo", pa.string()),
        ("photo_sha256", pa.string()),
        ("unit", pa.string()),
        ("face_index", pa.int64()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("box", pa.list_(pa.float64())),
        ("detail", pa.float64()),
        ("sharpness", pa.float64()),
        ("embedding", pa.list_(pa.float32())),
    ],
    {"schema_version": "1"},
)
"""What is known of a face before it is compared with others. `status` is found, no_face, skipped:<reason> or
failed:<reason>; `detail` photo pixels a pixel of the crop along a side; `sharpness` the variance of the Laplacian."""
GROUPED = pa.schema(
    [*FOUND, ("cluster", pa.int64()), ("similarity", pa.float64()), ("proposed", pa.bool_()), ("name", pa.string())],
    FOUND.metadata,
)
"""With its cluster (1 is the largest), the cosine with its centre, whether it is in the proposed album, and whose it is
once that was confirmed."""
_COLUMNS = ("cluster", "name", "keep", "number", "unit", "photo", "face_index", "similarity", "sharpness")
_TILE, _ACROSS = 96, 8


class Confirmed(NamedTuple):
    """What a person wrote into the proposal."""

    names: dict[int, str]
    """By cluster."""
    kept: dict[int, list[str]]
    """Units of the album by cluster, of those with a name."""


def group_faces(
    rows: Sequence[Mapping[str, Any]], out: Path, *, min_similarity: float = SAME_PERSON, min_detail: float = 0.75
) -> pa.Table:
    """Cluster all faces and propose an album for each cluster.

    Args:
        rows: of the schema `FOUND`.
        out: the folder whose `faces/` the crops are in.
        min_similarity: see `cluster_faces`.
        min_detail: crops with fewer photo pixels a pixel are not proposed: they were enlarged.

    Returns:
        A table of the schema `GROUPED`, by cluster and similarity, then the photos without a face.
    """
    faces = [dict(row) for row in rows if row["status"] == "found"]
    others = [dict(row) for row in rows if row["status"] != "found"]
    if faces:
        embeddings = np.array([face["embedding"] for face in faces], np.float64)
        labels = cluster_faces(embeddings, min_similarity)
        near = similarity_to_centre(embeddings, labels)
        for face, label, similarity in zip(faces, labels, near, strict=True):
            face |= {"cluster": int(label) + 1, "similarity": float(similarity), "proposed": False}
        for label in np.unique(labels):
            members = [faces[i] for i in np.flatnonzero(labels == label)]
            if len(members) >= MIN_FACES:
                for i in _album(members, out, min_detail):
                    members[i]["proposed"] = True
    faces.sort(key=lambda face: (face["cluster"], -face["similarity"], face["photo"], face["face_index"]))
    others.sort(key=lambda row: (row["photo"], row["face_index"] or 0))
    return pa.Table.from_pylist(faces + others, GROUPED)


def _album(members: Sequence[Mapping[str, Any]], out: Path, min_detail: float) -> list[int]:
    """Which faces of a cluster to propose: sharp, large enough, no copies, and as different as there are."""
    usual = float(np.median([face["sharpness"] for face in members]))
    good = [
        i for i, face in enumerate(members) if face["detail"] >= min_detail and face["sharpness"] >= BLURRED * usual
    ]
    crops = [load_image(crop_file(out, members[i]["unit"])) for i in good]
    again = copies(crops)
    good = [i for number, i in enumerate(good) if number not in again]
    looks = [grey(resize(crop, 16)) for number, crop in enumerate(crops) if number not in again]
    chosen = sharp_and_varied(np.array(looks), [members[i]["sharpness"] for i in good])
    return [good[i] for i in chosen]


def crop_file(out: Path, unit: str) -> Path:
    """The aligned face of a unit."""
    return out / "faces" / unit / "input.png"


def read_people(out: Path) -> pa.Table:
    """`people.parquet` of a folder.

    Raises:
        UserError: the folder holds none.
    """
    path = out / TABLE
    if not path.is_file():
        raise UserError(f"There is no {path}. Expected the --out of 'rgcp people DIR --out OUT'.")
    return pq.read_table(path)


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file, whole or not at all."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_atomically(path, buffer.getvalue())


def write_proposal(table: pa.Table, out: Path) -> list[int]:
    """Write everything but the faces, and return the proposed clusters.

    What was already written into `proposal.csv` is kept: names and struck faces follow the faces themselves, since
    a cluster's number changes when photos are added. Where the faces of two names now are in one cluster, it has none.
    """
    names, struck = _earlier(out)
    clusters = proposed_clusters(table)
    lines, sheets, figures = [], {}, {}
    for cluster, members in clusters.items():
        written = {names[face["unit"]] for face in members if names.get(face["unit"])}
        name = written.pop() if len(written) == 1 else ""
        members.sort(key=lambda face: not face["proposed"])
        for number, face in enumerate(members, start=1):
            keep = struck.get(face["unit"], "yes" if face["proposed"] else "no")
            facts = (cluster, name, keep, number, face["unit"], face["photo"], face["face_index"])
            lines.append((*facts, f"{face['similarity']:.3f}", f"{face['sharpness']:.0f}"))
        crops = [load_image(crop_file(out, face["unit"])) for face in members]
        tiles = [to_uint8(resize(crop, _TILE)) for crop in crops]
        sheets[cluster] = contact_sheet(tiles, [bool(face["proposed"]) for face in members])
        figures[cluster] = (name, members)
    for old in (out / SHEETS).glob("*.png"):
        old.unlink()
    for cluster, sheet in sheets.items():
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG")
        write_atomically(out / SHEETS / f"{cluster:03d}.png", buffer.getvalue())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(lines)
    write_atomically(out / PROPOSAL, text.getvalue().encode())
    write_atomically(out / PAGE, proposal_page(figures, table).encode())
    write_table(table, out / TABLE)
    return list(clusters)


def proposed_clusters(table: pa.Table) -> dict[int, list[dict[str, Any]]]:
    """The faces of each cluster that is large enough, the largest first."""
    columns = [name for name in table.column_names if name != "embedding"]
    clusters: dict[int, list[dict[str, Any]]] = {}
    for row in table.select(columns).to_pylist():
        if row["status"] == "found":
            clusters.setdefault(row["cluster"], []).append(row)
    return {cluster: members for cluster, members in clusters.items() if len(members) >= MIN_FACES}


def _earlier(out: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Names and yes or no by unit, as they stand in the proposal; nothing where there is none."""
    if not (out / PROPOSAL).exists():
        return {}, {}
    rows = _read_csv(out / PROPOSAL)
    by_cluster = {row["cluster"]: row["name"].strip() for row in rows if row["name"].strip()}
    return {row["unit"]: by_cluster.get(row["cluster"], "") for row in rows}, {row["unit"]: row["keep"] for row in rows}


def _read_csv(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            dialect = csv.Sniffer().sniff(file.readline(), delimiters=",;\t")  # ; in some countries' spreadsheets
            file.seek(0)
            rows = [{key: value or "" for key, value in row.items()} for row in csv.DictReader(file, dialect=dialect)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"The proposal {path} cannot be read: {error}. Save it as CSV in UTF-8.") from error
    missing = {"cluster", "name", "keep", "unit"} - set(rows[0] if rows else _COLUMNS)
    if missing:
        raise UserError(f"The proposal {path} has lost the column {', '.join(sorted(missing))}; make it again.")
    return rows


def read_confirmed(out: Path) -> Confirmed:
    """Read the proposal as a person left it: a name in any row of a cluster is the whole cluster's.

    Raises:
        UserError: no proposal; two names in one cluster; a name that no folder can have; a `keep` that is neither yes
            nor no; a face that is not in people.parquet; no name at all.
    """
    path = out / PROPOSAL
    known = set(read_people(out)["unit"].to_pylist())
    names: dict[int, str] = {}
    kept: dict[int, list[str]] = {}
    for number, row in enumerate(_read_csv(path), start=2):
        place = f"{path}, line {number}"
        if not row["cluster"].isdecimal() or row["unit"] not in known:
            raise UserError(f"{place}: expected a cluster's number and a face of {TABLE}, got {row['unit']!r}.")
        cluster, name, keep = int(row["cluster"]), row["name"].strip(), row["keep"].strip().lower()
        if keep not in ("yes", "no", ""):
            raise UserError(f"{place}: expected keep as yes or no, got {row['keep']!r}.")
        if name and names.setdefault(cluster, check_name(name)) != name:
            raise UserError(
                f"{place}: cluster {cluster} is named both {names[cluster]!r} and {name!r}. Give it one name and "
                "strike the faces of the other person (keep: no)."
            )
        if keep == "yes":
            kept.setdefault(cluster, []).append(row["unit"])
    if not names:
        raise UserError(f"No cluster has a name yet. Write names into {path}; {out / PAGE} shows the faces.")
    return Confirmed(names, {cluster: kept.get(cluster, []) for cluster in names})


def write_albums(out: Path, confirmed: Confirmed) -> dict[str, Path]:
    """Copy the confirmed faces to `albums/<name>/` and note the names in `people.parquet`; return the folders.

    Two clusters with one name are one person, such as a child and a grown-up.
    """
    units: dict[str, list[str]] = {}
    for cluster, name in confirmed.names.items():
        units.setdefault(name, []).extend(confirmed.kept[cluster])
    empty = [name for name, of_name in units.items() if len(of_name) < MIN_FACES]
    if empty:
        raise UserError(f"An album needs {MIN_FACES} faces; fewer are kept of {', '.join(empty)}. Keep more, or none.")
    folders = {}
    for name, of_name in units.items():
        folder = folders[name] = out / ALBUMS / name
        shutil.rmtree(folder, ignore_errors=True)
        for unit in of_name:
            write_atomically(folder / f"{unit}.png", crop_file(out, unit).read_bytes())
    table = read_people(out)
    names = [confirmed.names.get(cluster) for cluster in table["cluster"].to_pylist()]
    place = table.column_names.index("name")
    table = table.set_column(place, GROUPED.field("name"), pa.array(names, pa.string()))
    write_table(table, out / TABLE)
    return folders


def forget_in_proposal(out: Path, name: str) -> int:
    """Remove a person's faces, rows and embeddings from a folder of proposals; return how many faces these were.

    The person's are all faces of clusters that have the name, in the proposal or confirmed. A later run into the folder
    does not find them again, as long as their photos are the same.
    """
    table = read_people(out)
    names, _ = _earlier(out)
    units = {unit for unit, own in names.items() if own == name}
    units |= {row["unit"] for row in table.select(["unit", "name"]).to_pylist() if row["name"] == name}
    units.discard(None)
    shutil.rmtree(out / ALBUMS / name, ignore_errors=True)
    if not units:
        return 0
    for part in (out / PARTS).glob("*.parquet"):
        rows = pq.read_table(part)
        rest = _without(rows, units)
        if len(rest) < len(rows):
            write_table(rest, part)
    for unit in units:
        shutil.rmtree(out / "faces" / unit, ignore_errors=True)
    write_proposal(_without(table, units), out)
    return len(units)


def _without(table: pa.Table, units: set[str]) -> pa.Table:
    return table.filter(pa.array([unit not in units for unit in table["unit"].to_pylist()], pa.bool_()))


def contact_sheet(tiles: Sequence[np.ndarray], proposed: Sequence[bool]) -> Image.Image:
    """Faces (T,T,3) uint8 in rows, numbered from 1; those that are proposed have a green frame, the others are pale."""
    line, gap = 14, 4
    rows = -(-len(tiles) // _ACROSS)
    step = _TILE + 2 * gap, _TILE + 2 * gap + line
    sheet = Image.new("RGB", (step[0] * min(len(tiles), _ACROSS), step[1] * rows), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (tile, good) in enumerate(zip(tiles, proposed, strict=True)):
        x, y = step[0] * (i % _ACROSS), step[1] * (i // _ACROSS)
        face = Image.fromarray(tile)
        if good:
            draw.rectangle([x + 1, y + 1, x + step[0] - 2, y + step[1] - line - 2], fill="#38643f")
        else:
            face = Image.blend(face, Image.new("RGB", face.size, "white"), 0.5)
        sheet.paste(face, (x + gap, y + gap))
        draw.text((x + gap, y + step[1] - line - 1), str(i + 1), fill="black")
    return sheet


_STYLE = """
:root { color-scheme: light dark } body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto;
padding: 0 1rem } section { border-top: 1px solid #8886; margin-top: 2rem } .faces { display: flex; flex-wrap: wrap;
gap: .6rem } figure { margin: 0; width: 8.2rem } figure img { width: 100%; box-sizing: border-box; border: 4px solid
transparent; opacity: .55 } figure.yes img { border-color: #38843f; opacity: 1 } figcaption { font-size: .75rem;
overflow-wrap: anywhere } code { background: #8882; padding: 0 .2em }
"""


def proposal_page(clusters: Mapping[int, tuple[str, Sequence[Mapping[str, Any]]]], table: pa.Table) -> str:
    """The page that lists the clusters: their numbers, names, faces and file names. Needs no network."""
    status = [value.partition(":")[0] for value in table["status"].to_pylist()]
    faces, shown = status.count("found"), sum(len(members) for _, members in clusters.values())
    photos = len(set(table["photo"].to_pylist()))
    failed = sum(value == "failed" for value in status)
    sections = []
    for cluster, (name, members) in clusters.items():
        count = sum(bool(face["proposed"]) for face in members)
        figures = "".join(
            f'<figure class="{"yes" if face["proposed"] else "no"}"><img loading="lazy" alt="face {number}" '
            f'src="faces/{quote(face["unit"])}/input.png"><figcaption><b>{number}</b> '
            f"{escape(face['photo'])}, {face['similarity']:.3f}</figcaption></figure>"
            for number, face in enumerate(members, start=1)
        )
        sections.append(
            f'<section id="cluster-{cluster}"><h2>Cluster {cluster}{": " + escape(name) if name else ""}</h2>'
            f"<p>{len(members)} faces, {count} proposed. <a href='{SHEETS}/{cluster:03d}.png'>Contact sheet</a></p>"
            f'<div class="faces">{figures}</div></section>'
        )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>People of the archive</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style><h1>People of the archive</h1>'
        f"<p>{faces} faces in {photos} photos; {len(clusters)} people with {MIN_FACES} faces or more have {shown} of "
        f"them.{f' {failed} photos or faces could not be used: see <code>{TABLE}</code>.' if failed else ''}</p>"
        "<p>Framed faces are proposed for the person's album: sharp ones that differ. To confirm, write a name into "
        f"any row of a cluster in <code>{PROPOSAL}</code>, put <code>no</code> under <code>keep</code> for faces "
        "of somebody else, then run <code>rgcp people confirm</code> on this folder. Clusters without a name are left "
        "alone. The number under a face is its cosine similarity to the middle of its cluster.</p>"
        f"{''.join(sections) or '<p>Nobody was found in three photos or more.</p>'}</html>\n"
    )
