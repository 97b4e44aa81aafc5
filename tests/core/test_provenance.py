"""What a restored file says about itself, and what a run's folder tells about it."""

import hashlib
import json
import shlex
import xml.etree.ElementTree as ET
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rgcp_core.errors import UserError
from rgcp_core.images import load_photo, save_photo
from rgcp_core.manifest import ManifestRow, compact, write_part
from rgcp_core.prior import Card, ScheduleConfig
from rgcp_core.provenance import (
    Restoration,
    explain,
    explanation_lines,
    read_restoration,
    settings_changes,
    xmp_packet,
)
from rgcp_core.settings import load_settings
from rgcp_core.unet import UNetConfig

FACTS = Restoration(
    source="inner/Großmutter & <Kind>.jpg",
    source_sha256="ab" * 32,
    units=("abababababababab-00", "abababababababab-01"),
    prior="faces64",
    prior_sha256="cd" * 32,
    preset="fast",
    settings_sha256="ef" * 32,
    seed=7,
)
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
HISTORY = "{http://ns.adobe.com/xap/1.0/mm/}History"
AGENT = "{http://ns.adobe.com/xap/1.0/sType/ResourceEvent#}softwareAgent"
OTHER_PACKET = b"""<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="uuid:1" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:xmpMM="http://ns.adobe.com/xap/1.0/mm/"
 xmlns:stEvt="http://ns.adobe.com/xap/1.0/sType/ResourceEvent#"
 Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/print">
<dc:creator><rdf:Seq><rdf:li>Anna</rdf:li></rdf:Seq></dc:creator>
<xmpMM:History><rdf:Seq><rdf:li stEvt:action="created" stEvt:softwareAgent="Scanner"/></rdf:Seq></xmpMM:History>
</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>"""


def values(packet: bytes, name: str) -> list[str]:
    """All values of a property, elements and attributes, read without our own code."""
    root = ET.fromstring(packet)
    found = [element.text or "" for element in root.iter(name)]
    return found + [value for element in root.iter() for key, value in element.attrib.items() if key == name]


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
def test_a_restored_file_says_so_and_keeps_its_pixels(suffix: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"photo.{suffix}", lossless=True)
    photo = load_photo(tmp_path / f"photo.{suffix}")
    out = tmp_path / ("out.png" if suffix == "jpg" else f"out.{suffix}")
    save_photo(photo, photo.pixels, out, xmp=xmp_packet(FACTS, photo.xmp))
    again = load_photo(out)
    assert np.array_equal(again.pixels, photo.pixels)
    assert again.xmp is not None
    assert read_restoration(again.xmp) == FACTS
    # Pillow finds it where the format's readers look for XMP.
    with Image.open(out) as image:
        raw = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or ""
    raw = raw.encode() if isinstance(raw, str) else raw
    assert values(raw.strip(b"\0"), IPTC) == [
        "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
    ]


def test_what_the_photo_said_before_is_kept() -> None:
    packet = xmp_packet(FACTS, OTHER_PACKET)
    root = ET.fromstring(packet)
    assert values(packet, IPTC) == [
        "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
    ]
    assert [li.text for li in root.find(".//{http://purl.org/dc/elements/1.1/}creator").iter(f"{RDF}li")] == ["Anna"]
    assert len(list(root.iter(HISTORY))) == 1
    assert values(packet, AGENT) == [FACTS.software, "Scanner"]
    assert {d.get(f"{RDF}about") for d in root.iter(f"{RDF}Description")} == {"uuid:1"}
    assert b"xmlns:dc=" in packet  # the prefixes that people know
    assert read_restoration(packet) == FACTS


def test_the_same_facts_make_the_same_bytes() -> None:
    assert xmp_packet(FACTS) == xmp_packet(FACTS)
    assert xmp_packet(FACTS, OTHER_PACKET) == xmp_packet(FACTS, OTHER_PACKET)


def test_restored_twice_says_it_once_and_has_two_events() -> None:
    second = Restoration(**{**FACTS.__dict__, "seed": 8, "units": ("x-00",)})
    packet = xmp_packet(second, xmp_packet(FACTS))
    assert read_restoration(packet) == second
    assert len(values(packet, IPTC)) == 1
    assert len(values(packet, AGENT)) == 2


@pytest.mark.parametrize(
    "packet",
    [b"", b"not xml", b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', b"\xff\xfe broken", OTHER_PACKET[:300]],
)
def test_unusable_packets_say_nothing_and_are_replaced(packet: bytes) -> None:
    assert read_restoration(packet) is None
    assert read_restoration(xmp_packet(FACTS, packet)) == FACTS


def card_of(size: int) -> Card:
    return Card(
        name="p", architecture=UNetConfig(image_size=size), schedule=ScheduleConfig(), sha256="", licence="", source=""
    )  # fmt: skip


@pytest.mark.parametrize("size", [64, 128, 256, 512])
@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("paper", {}),
        ("fast", {"seed": 5}),
        ("balanced", {"restore": {"noise_step": 250}, "album": {"noise_step": 500, "guidance_interval": 10}}),
        ("fast", {"album": {"size": 3, "guidance_scale": 0.7, "steps": None}, "constrain": {"iterations": 7}}),
        ("paper", {"album": {"guidance_interval": 0, "guidance_distance": "l1"}, "faces": {"detector": "offline"}}),
        ("fast", {"precision": "float32", "gate": {"candidates": 3}}),
    ],
)
def test_settings_of_a_run_lead_back_to_options(size: int, preset: str, overrides: dict) -> None:
    """The options found must lead to just the settings that run.json holds."""
    card = card_of(size)
    settings = load_settings(preset, card, overrides)
    changes = settings_changes(settings, card)
    nested: dict = {"seed": settings.seed}
    for name, value in changes.items():
        group, dot, key = name.partition(".")
        if dot:
            nested.setdefault(group, {})[key] = value
        else:
            nested[name] = value
    assert load_settings(preset, card, nested) == settings
    if overrides in ({}, {"seed": 5}):
        assert changes == {}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with one restored photo of one face."""
    (tmp_path / "in" / "a").mkdir(parents=True)
    Image.new("RGB", (40, 40), (9, 9, 9)).save(tmp_path / "in" / "a" / "b.png")
    digest = hashlib.sha256((tmp_path / "in" / "a" / "b.png").read_bytes()).hexdigest()
    out, unit = tmp_path / "out", f"{digest[:16]}-00"
    (out / "photos" / "a").mkdir(parents=True)
    album = out / "faces" / unit / "album"
    album.mkdir(parents=True)
    for name in ("00.png", "01.png", "../variance.png"):
        Image.new("L", (4, 4)).save(album / name)
    photo = load_photo(tmp_path / "in" / "a" / "b.png")
    facts = Restoration(**{**FACTS.__dict__, "source": "a/b.png", "source_sha256": digest, "units": (unit,)})
    save_photo(photo, photo.pixels, out / "photos" / "a" / "b.png", xmp=xmp_packet(facts))
    now = datetime.now(UTC)
    common = {"run_id": "r1", "code_version": "0.1.0", "started_at": now, "finished_at": now}
    rows = [
        ManifestRow(
            **common, photo="a/b.png", photo_sha256=digest, unit=unit, face_index=0, status="restored",
            output="photos/a/b.png", identity_input_dlib=0.9, album_size=2,
        ),
        ManifestRow(**common, photo="c.png", photo_sha256="0" * 64, status="no_face"),
    ]  # fmt: skip
    write_part(out, "k", rows)
    compact(out)
    card = card_of(64)
    settings = load_settings("fast", card, {"seed": 3, "restore": {"noise_step": 300}})
    content = {
        "run_id": "r1", "command": ["rgcp", "restore", "in", "--out", "out"], "inputs": [str(tmp_path / "in")],
        "preset": "fast", "seed": 3, "framing": "window", "settings": settings.model_dump(mode="json"),
        "prior": card.model_dump(mode="json"), "versions": {"rgcp": "0.1.0"}, "git_revision": "abc",
    }  # fmt: skip
    (out / "run.json").write_text(json.dumps(content))
    return out


def test_explain_finds_input_album_settings_and_command(run: Path) -> None:
    told = explain(run / "photos" / "a" / "b.png")
    assert told.source == run.parent / "in" / "a" / "b.png"
    assert told.source_intact is True
    assert len(told.faces) == 1
    face = told.faces[0]
    assert [path.name for path in face.album] == ["00.png", "01.png"]
    assert face.variance == run / "faces" / face.unit / "variance.png"
    assert face.metrics == {"identity_input_dlib": 0.9}
    assert told.command is not None
    words = shlex.join(told.command)
    assert f"rgcp restore {told.source} --out {run.parent / 'out-again'} --prior p --preset fast --seed 3" in words
    assert "--aligned" in told.command
    assert any(word.startswith("restore.noise_step=") for word in told.command)
    text = "\n".join(explanation_lines(told))
    for part in ("r1", "unchanged", "seed 3", "git abc", "identity_input_dlib = 0.9", words):
        assert part in text


def test_explain_tells_of_a_changed_or_lost_input(run: Path) -> None:
    source = run.parent / "in" / "a" / "b.png"
    Image.new("RGB", (40, 40), (1, 2, 3)).save(source)
    told = explain(run / "photos" / "a" / "b.png")
    assert told.source_intact is False
    assert "has changed" in told.remarks[0]
    source.unlink()
    told = explain(run / "photos" / "a" / "b.png")
    assert (told.source, told.source_intact) == (None, None)
    assert "no longer" in told.remarks[0]


def test_explain_a_copy_by_its_metadata(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "copy.png"
    copy.parent.mkdir()
    copy.write_bytes((run / "photos" / "a" / "b.png").read_bytes())
    alone = explain(copy)
    assert alone.run_dir is None
    assert alone.in_file is not None
    assert alone.in_file.source == "a/b.png"
    assert explain(copy, run).source == run.parent / "in" / "a" / "b.png"


def test_explain_knows_nothing_of_other_pictures(run: Path) -> None:
    with pytest.raises(UserError, match="do not say that rgcp restored it"):
        explain(run.parent / "in" / "a" / "b.png")
    with pytest.raises(UserError, match="No such photo"):
        explain(run / "photos" / "none.png")
    stranger = run / "photos" / "stranger.png"
    Image.new("RGB", (4, 4)).save(stranger)
    with pytest.raises(UserError, match="does not know"):
        explain(stranger)
