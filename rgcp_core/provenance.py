"""How a picture came to be: written into the restored file itself, and told from a run's folder.

The file carries an XMP packet: IPTC's digital source type says to everybody that generative AI had a part in it, the
history of XMP's media management that this program edited it, and properties of our own namespace what decided the
pixels. It holds nothing that changes from one run to the next, so that the same pixels make the same file.
"""

import hashlib
import json
import re
import shlex
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import rgcp_core
from rgcp_core.errors import UnitError, UserError
from rgcp_core.images import load_photo
from rgcp_core.manifest import METRICS, read_table
from rgcp_core.prior import Card, find_prior, read_card
from rgcp_core.settings import Settings, load_settings

RUN_FILE = "run.json"
EDITED_WITH_GENERATIVE_AI = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
"""IPTC's term for a picture parts of which a trained model has made. https://cv.iptc.org/newscodes/digitalsourcetype/"""

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_NAMESPACES = {
    "x": "adobe:ns:meta/",
    "rdf": RDF,
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "xmpMM": "http://ns.adobe.com/xap/1.0/mm/",
    "stEvt": "http://ns.adobe.com/xap/1.0/sType/ResourceEvent#",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "rgcp": "urn:rgcp:provenance:1.0/",
}


@dataclass(frozen=True, kw_only=True)
class Restoration:
    """What a restored file says about itself."""

    source: str
    """Path of the photo relative to the input folder."""
    source_sha256: str
    units: tuple[str, ...]
    """The faces that were restored; all other pixels are the photo's own."""
    prior: str
    prior_sha256: str
    preset: str
    settings_sha256: str
    seed: int
    software: str = f"rgcp {rgcp_core.__version__}"


# ------------------------------------------------------------------------------------------------------------ XMP


def xmp_packet(restoration: Restoration, existing: bytes | None = None) -> bytes:
    """Write a restoration as an XMP packet.

    Args:
        restoration: what is said.
        existing: the photo's own packet; all that it says is kept, but for an older digital source type. One that
            is not XML is dropped.

    Returns:
        The packet, for `rgcp_core.images.save_photo(..., xmp=...)`.
    """
    root = _parse(existing) if existing else None
    if root is None:
        root = ET.Element(_name("x", "xmpmeta"))
    tree = root if root.tag == _name("rdf", "RDF") else root.find(_name("rdf", "RDF"))
    if tree is None:
        tree = ET.SubElement(root, _name("rdf", "RDF"))
    _remove(tree, _name("Iptc4xmpExt", "DigitalSourceType"))
    for field in (*asdict(restoration), "faces"):
        _remove(tree, _name("rgcp", field))
    description = ET.SubElement(tree, _name("rdf", "Description"), {_name("rdf", "about"): _about(tree)})
    _add(description, "Iptc4xmpExt", "DigitalSourceType", EDITED_WITH_GENERATIVE_AI)
    for field, value in asdict(restoration).items():
        if isinstance(value, tuple):
            sequence = ET.SubElement(_add(description, "rgcp", field), _name("rdf", "Seq"))
            for item in value:
                _add(sequence, "rdf", "li", item)
        else:
            _add(description, "rgcp", field, str(value))
    event = ET.SubElement(_history(tree, description), _name("rdf", "li"), {_name("rdf", "parseType"): "Resource"})
    _add(event, "stEvt", "action", "edited")
    _add(event, "stEvt", "softwareAgent", restoration.software)
    faces = f"{len(restoration.units)} face{'' if len(restoration.units) == 1 else 's'}"
    _add(
        event,
        "stEvt",
        "parameters",
        f"{faces} generated anew by a diffusion model from the face in the photo",
    )
    for prefix, uri in _NAMESPACES.items():
        ET.register_namespace(prefix, uri)
    begin = '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'.encode()
    return begin + ET.tostring(root, encoding="utf-8") + b'\n<?xpacket end="w"?>'


def read_restoration(xmp: bytes) -> Restoration | None:
    """What an XMP packet says about a restoration; None when it says nothing of the kind."""
    root = _parse(xmp)
    if root is None:
        return None
    values: dict[str, Any] = {}
    for field in Restoration.__dataclass_fields__:
        element = root.find(f".//{_name('rgcp', field)}")
        if element is None:
            return None
        items = [item.text or "" for item in element.iter(_name("rdf", "li"))]
        values[field] = tuple(items) if field == "units" else element.text or ""
    try:
        return Restoration(**{**values, "seed": int(values["seed"])})
    except ValueError:
        return None


def _parse(xmp: bytes) -> ET.Element | None:
    """The packet's root, with the prefixes that it uses remembered; None when it is not XML."""
    if b"<!DOCTYPE" in xmp or b"<!ENTITY" in xmp:  # XMP has neither, and entities can be made to fill the memory
        return None
    try:
        packet = xmp.strip(b"\0 \t\r\n")
        for _, (prefix, uri) in ET.iterparse(BytesIO(packet), events=["start-ns"]):
            if prefix and not re.fullmatch(r"ns\d+", prefix):
                ET.register_namespace(prefix, uri)
        return ET.fromstring(packet)
    except (ET.ParseError, ValueError, LookupError):
        return None


def _name(prefix: str, local: str) -> str:
    return f"{{{_NAMESPACES[prefix]}}}{local}"


def _add(parent: ET.Element, prefix: str, local: str, text: str | None = None) -> ET.Element:
    element = ET.SubElement(parent, _name(prefix, local))
    element.text = text
    return element


def _remove(tree: ET.Element, name: str) -> None:
    """Remove a property, which RDF writes as an element or as an attribute."""
    for description in tree.findall(_name("rdf", "Description")):
        description.attrib.pop(name, None)
        for element in description.findall(name):
            description.remove(element)


def _about(tree: ET.Element) -> str:
    """All descriptions of a packet are about one resource, whatever it calls it."""
    first = tree.find(_name("rdf", "Description"))
    return "" if first is None else first.get(_name("rdf", "about"), "")


def _history(tree: ET.Element, description: ET.Element) -> ET.Element:
    """The list of the events of `xmpMM:History`, a new one where there is none."""
    found = tree.find(f"{_name('rdf', 'Description')}/{_name('xmpMM', 'History')}/{_name('rdf', 'Seq')}")
    if found is not None:
        return found
    return ET.SubElement(_add(description, "xmpMM", "History"), _name("rdf", "Seq"))


# -------------------------------------------------------------------------------------------------------- explain


@dataclass(frozen=True)
class Face:
    """A restored face and what is known about it."""

    unit: str
    folder: Path
    """Holds input.png, restored.png, album/ and variance.png (where the album's pictures differ: what is invented)."""
    album: tuple[Path, ...]
    variance: Path | None
    facts: Mapping[str, Any]
    """The manifest's row, without empty columns."""

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics that were measured."""
        return {name: self.facts[name] for name in METRICS if name in self.facts}


@dataclass(frozen=True)
class Explanation:
    """All that is known about a restored photo."""

    photo: Path
    in_file: Restoration | None
    """What the file says itself."""
    run_dir: Path | None
    source: Path | None
    """The photo it was made from, where the run says that it is."""
    source_intact: bool | None
    """Whether that photo is still what it was, by sha256; None where it is not found."""
    faces: tuple[Face, ...]
    run: Mapping[str, Any]
    """run.json: settings, prior card, versions, git revision, command."""
    command: tuple[str, ...] | None
    """Makes this photo again, in a new folder; None where the run is not found."""
    remarks: tuple[str, ...]
    """What stands in the way of making it again the same."""


def explain(photo: Path, run_dir: Path | None = None) -> Explanation:
    """Tell how a restored photo was made.

    Args:
        photo: below `DIR/photos` of a run, or a copy of one that has kept its metadata.
        run_dir: the run's folder, when the photo lies elsewhere.

    Raises:
        UserError: no such photo, or nothing is known about it: neither a run's folder above it nor metadata of ours.
    """
    if not photo.is_file():
        raise UserError(f"No such photo: {photo}.")
    in_file = _read_file(photo)
    folder = run_dir or _run_above(photo)
    if folder is None:
        if in_file is None:
            raise UserError(
                f"{photo} does not lie in a run's folder and its metadata do not say that rgcp restored it. If it is a "
                "copy, name the run it came from: --run DIR."
            )
        return Explanation(photo, in_file, None, None, None, (), {}, None, ())
    run = _read_run(folder)
    rows = _rows_of(photo, folder, in_file)
    if not rows:
        raise UserError(f"The manifest of {folder} does not know {photo}.")
    source = _source(rows[0]["photo"], run, folder)
    intact = None if source is None else _sha256(source) == rows[0]["photo_sha256"]
    command, remarks = _command(run, source, folder)
    if source is None:
        remarks.insert(0, f"The input {rows[0]['photo']} is no longer where the run found it.")
    elif not intact:
        remarks.insert(0, f"The input {source} has changed since.")
    faces = tuple(_face(folder, row) for row in rows if row["status"] == "restored")
    return Explanation(photo, in_file, folder, source, intact, faces, run, command, tuple(remarks))


def explanation_lines(explanation: Explanation) -> list[str]:
    """An explanation as lines to read."""
    e, run = explanation, explanation.run
    lines = [f"{e.photo}"]
    if e.in_file is not None:
        lines.append(
            f"  the file itself says: restored by {e.in_file.software}, {len(e.in_file.units)} face(s), from "
            f"{e.in_file.source} (sha256 {e.in_file.source_sha256[:16]}), prior {e.in_file.prior}, preset "
            f"{e.in_file.preset}, seed {e.in_file.seed}"
        )
    else:
        lines.append("  the file itself says nothing about its restoration")
    if e.run_dir is None:
        return [*lines, "  its run was not found; with --run DIR there is more to tell"]
    lines.append(f"run      {run.get('run_id')} in {e.run_dir}")
    state = {True: "unchanged", False: "CHANGED SINCE", None: "not found"}[e.source_intact]
    lines.append(f"input    {e.source or '?'} ({state})")
    prior = run.get("prior") or {}
    lines.append(f"prior    {prior.get('name')}, sha256 {str(prior.get('sha256'))[:16]}, {prior.get('licence')}")
    lines.append(f"settings preset {run.get('preset')}, seed {run.get('seed')}, framing {run.get('framing')}")
    lines += [f"         {name} = {value}" for name, value in _flat(run.get("settings") or {})]
    versions = ", ".join(f"{name} {version}" for name, version in (run.get("versions") or {}).items())
    lines.append(f"code     {versions}; git {run.get('git_revision') or 'unknown'}")
    for face in e.faces:
        lines.append(f"face     {face.unit}: {face.folder}")
        place = face.facts.get("box")
        if place is not None:
            lines.append(f"         box {[round(x) for x in place]} px, found by {face.facts.get('detector')}")
        person = face.facts.get("person")
        where = f"{len(face.album)} pictures in {face.folder / 'album'}" if face.album else "not kept"
        if person is not None:
            where = f"the personal one of {person}, in {Path(str(run.get('people'))) / person}"
        lines.append(f"         album of {face.facts.get('album_size')}: {where}")
        if face.variance is not None:
            lines.append(f"         what is invented (where the album differs): {face.variance}")
        for name, value in face.metrics.items():
            lines.append(f"         {name} = {value:.4g}")
        if "metrics_unavailable" in face.facts:
            lines.append(f"         not measured: {face.facts['metrics_unavailable']}")
    if run.get("command"):
        lines.append(f"made by  {shlex.join(map(str, run['command']))}")
    if e.command is not None:
        lines.append(f"again    {shlex.join(e.command)}")
    lines += [f"note     {remark}" for remark in e.remarks]
    return lines


def _read_file(photo: Path) -> Restoration | None:
    try:
        xmp = load_photo(photo).xmp
    except UnitError as error:
        raise UserError(str(error)) from error
    return read_restoration(xmp) if xmp else None


def _run_above(photo: Path) -> Path | None:
    for folder in photo.absolute().parents:
        if (folder / RUN_FILE).is_file() and (folder / "photos") in photo.absolute().parents:
            return folder
    return None


def _read_run(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not a run's folder: its {RUN_FILE} cannot be read ({error}).") from error


def _rows_of(photo: Path, folder: Path, in_file: Restoration | None) -> list[dict[str, Any]]:
    """The manifest's rows of a photo: by its place in the run, else by the input that the file names."""
    rows = read_table(folder).to_pylist()
    if folder.absolute() in photo.absolute().parents:
        name = photo.absolute().relative_to(folder.absolute()).as_posix()
        return [row for row in rows if row["output"] == name]
    if in_file is None:
        return []
    return [row for row in rows if row["photo_sha256"] == in_file.source_sha256 and row["output"]]


def _source(name: str, run: Mapping[str, Any], folder: Path) -> Path | None:
    """Find the input again: its name is relative to the inputs, or to what these have in common."""
    if run.get("base"):
        found = Path(run["base"]) / name
        return found if found.is_file() else None
    for start in run.get("inputs") or ():
        if str(start).startswith("@"):
            try:
                listed = Path(start[1:]).read_text(encoding="utf-8").splitlines()
            except OSError:
                continue
        else:
            listed = [str(start)]
        for item in map(Path, listed):
            for base in (item, *item.parents):
                if (base / name).is_file() and item in (base / name, *(base / name).parents):
                    return base / name
    return None


def _command(run: Mapping[str, Any], source: Path | None, folder: Path) -> tuple[tuple[str, ...] | None, list[str]]:
    """A command that restores one input with a run's settings, and what keeps it from being exact."""
    remarks: list[str] = []
    card = Card.model_validate(run["prior"])
    prior = _prior_argument(run, card, remarks)
    framing = {
        "window": ["--aligned"],
        "ffhq": ["--aligned-ffhq"],
        "centre": ["--domain", "any"],
        "boxes": ["--domain", "any", "--boxes", str(run.get("boxes"))],
    }.get(run.get("framing", "photos"), [])
    person = ["--person", str(run["person"]), "--people", str(run["people"])] if run.get("person") else []
    changed = settings_changes(Settings.model_validate(run["settings"]), card)
    sets = [text for name, value in changed.items() for text in ("--set", f"{name}={json.dumps(value)}")]
    if run.get("framing") == "boxes":
        source = Path(run["base"])
        remarks.append("It restores all photos of the table of boxes, since that names them below this folder.")
    again = folder.parent / f"{folder.name}-again"
    command = [
        *("rgcp", "restore", str(source.absolute()) if source else "INPUT", "--out", str(again), "--prior", prior),
        *("--preset", run["preset"], "--seed", str(run["seed"]), *framing, *person, *sets),
    ]
    revision = run.get("git_revision")
    if revision:
        remarks.append(f"The code was at git revision {revision}; another may make other pixels.")
    return tuple(command), remarks


def _prior_argument(run: Mapping[str, Any], card: Card, remarks: list[str]) -> str:
    """How to name the prior: as the run did, or by its name; remarks when that is not the same one any more."""
    command = [str(word) for word in run.get("command") or ()]
    given = str(run.get("prior_argument") or card.name)
    if "prior_argument" not in run and "--prior" in command[:-1]:
        given = command[command.index("--prior") + 1]
    try:
        same = read_card(find_prior(given)).sha256 == card.sha256
    except UserError:
        same = False
    if not same:
        remarks.append(f"The prior {card.name} of sha256 {card.sha256[:16]} is not here under the name {given}.")
    return given


def settings_changes(settings: Settings, card: Card) -> dict[str, Any]:
    """What must be given with `--set`, by dotted name, to get these settings from their preset and this prior."""
    preset = dict(_flat(load_settings(settings.preset, card, {"seed": settings.seed}).model_dump(mode="json")))
    return {name: value for name, value in _flat(settings.model_dump(mode="json")) if value != preset[name]}


def _face(folder: Path, row: Mapping[str, Any]) -> Face:
    place = folder / "faces" / row["unit"]
    variance = place / "variance.png"
    return Face(
        unit=row["unit"],
        folder=place,
        album=tuple(sorted((place / "album").glob("*.png"))),
        variance=variance if variance.is_file() else None,
        facts={name: value for name, value in row.items() if value is not None},
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Sequence[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name}.")
        else:
            pairs.append((f"{prefix}{name}", value))
    return pairs
