import json
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from PIL import Image

from rgcp_core import report
from rgcp_core.errors import UserError
from rgcp_core.manifest import ManifestRow, compact, write_part
from rgcp_core.report import write_report
from rgcp_core.report.entries import duration

START = datetime(2025, 3, 1, 22, 0, tzinfo=UTC)
SCRIPT = "<script>alert('x')</script>"
VOID = {"meta", "img", "input", "link", "br"}


class Page(HTMLParser):
    """A page as its articles (attributes, text, urls), all links and texts; fails on tags that do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.articles: list[dict] = []
        self.urls: list[str] = []
        self.alts: list[str | None] = []
        self.ids: list[str] = []
        self.text = self.style = ""
        self.scripts = 0
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert not [name for name in attributes if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        self.urls += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "img":
            self.alts.append(attributes.get("alt"))
        if tag == "article":
            self.articles.append({**attributes, "text": "", "urls": []})
        elif "article" in self.open:
            self.articles[-1]["urls"] += [attributes[name] for name in ("src", "href") if name in attributes]
        self.scripts += tag == "script"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.text += " " if tag in ("td", "th") else ""

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.style += data
        elif "script" not in self.open:
            self.text += data
        if "article" in self.open:
            self.articles[-1]["text"] += data


def row(photo: str, face_index: int | None = 0, status: str = "restored", **facts) -> ManifestRow:
    unit = None if face_index is None else f"{sha256(photo.encode()).hexdigest()[:16]}-{face_index}"
    facts = {"unit": unit, "photo_sha256": "ab", "prior": "faces64", "preset": "fast", "seed": 4} | facts
    if status == "restored":
        facts = {"output": f"photos/{photo}", "noise_step": 52} | facts
    return ManifestRow(
        run_id="run-1",
        photo=photo,
        face_index=face_index,
        status=status,
        code_version="0.1.0",
        started_at=START,
        finished_at=START + timedelta(minutes=3, seconds=20),
        **facts,
    )


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), "gray").save(path, "PNG")


def finished_run(run_dir: Path, rows: list[ManifestRow], run: dict | None = None) -> Path:
    """A run's folder: the rows merged, and the pictures that a run would have left for them."""
    write_part(run_dir, "part", rows)
    compact(run_dir)
    for item in rows:
        if item.unit:
            picture(run_dir / "faces" / item.unit / "input.png")
        if item.status == "restored":
            picture(run_dir / "faces" / item.unit / "restored.png")
            picture(run_dir / item.output)
    if run is not None:
        (run_dir / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return run_dir


ROWS = [
    row("b/Jürgen & Ö #1?.png", psnr=27.125, seconds_restore=12.0, seconds_album=8.0),
    row("b/two.png", 0, identity_input_dlib=0.9, unit="odd name #1"),
    row("b/two.png", 1, "skipped:too_small", reason="The face is 17 px wide; at least 24 are needed."),
    row("a/landscape.png", None, "no_face"),
    row(f"c/{SCRIPT.replace('/', '_')}.png", 0, "failed:diverged", reason=f"The loss was {SCRIPT}."),
    row("d/torn.jpg", None, "failed:truncated", reason="The file ends too early.", photo_sha256=None),
]
RUN = {
    "run_id": "run-1",
    "command": ["rgcp", "restore", "my photos", "--out", "out"],
    "started_at": "2025-03-01T22:00:00Z",
    "finished_at": "2025-03-01T23:05:00+00:00",
    "settings": {"album": {"size": 16}, "evil": SCRIPT},
    "preset": "fast",
    "seed": 4,
    "prior": {"name": "faces64", "licence": "research"},
    "versions": {"torch": "2.14"},
    "git_revision": "0123abc",
    "inputs": ["my photos"],
}


@pytest.fixture
def run_dir(tmp_path):
    return finished_run(tmp_path / "a run", ROWS, RUN)


def words(page: Page) -> str:
    return " ".join(page.text.split())


def test_every_row_is_there_once_with_failures_first(run_dir):
    page = Page(write_report(run_dir))
    listed = [(article["data-photo"], article["data-status"]) for article in page.articles]
    assert sorted(listed) == sorted((item.photo, item.status) for item in ROWS)
    kinds = [status.partition(":")[0] for _, status in listed]
    assert kinds == ["failed", "failed", "restored", "restored", "skipped", "no_face"]
    for item, article in [(i, a) for i in ROWS for a in page.articles if a["data-photo"] == i.photo]:
        if item.status == article["data-status"] and item.reason:
            assert item.reason in article["text"]
    assert len(set(page.ids)) == len(page.ids)
    assert {f"unit-{item.unit}" for item in ROWS if item.unit} <= set(page.ids)


def test_every_file_it_refers_to_is_there_and_nothing_is_fetched(run_dir):
    page = Page(write_report(run_dir))
    local = [urlsplit(url) for url in page.urls]
    assert not [url for url in local if url.scheme or url.netloc]
    missing = [url.path for url in local if url.path and not (run_dir / unquote(url.path)).is_file()]
    assert not missing
    assert {unquote(url.fragment) for url in local if url.fragment} <= set(page.ids)
    assert "@import" not in page.style
    assert "url(" not in page.style
    assert {f"photos/{item.photo}" for item in ROWS if item.output} <= {unquote(url.path) for url in local}


def test_a_name_or_a_reason_cannot_become_code(run_dir):
    page = Page(write_report(run_dir))
    assert page.scripts == 1
    assert f"The loss was {SCRIPT}." in page.text
    assert "c/<script>alert('x')<_script>.png" in [article["data-photo"] for article in page.articles]


def test_the_head_says_what_was_done(run_dir):
    text = words(Page(write_report(run_dir)))
    assert "2 of 4 faces restored" in text
    assert "On 1 March 2025, from 22:00 to 23:05 UTC, 5 photos were searched and 4 faces found." in text
    assert "Of the faces 2 were restored, 1 was left alone on purpose and 1 failed." in text
    assert "1 photo without a face and 1 photo that could not be processed." in text
    assert "The prior was faces64, with the preset fast and seed 4." in text
    assert "It took 1 h 05 min in all, 10 s of work for a restored face." in text
    assert "rgcp restore 'my photos' --out out" in text
    assert "settings.album.size 16" in text
    assert "git_revision 0123abc" in text


def test_counts_by_status_lead_to_their_first_entry(run_dir):
    page = Page(write_report(run_dir))
    counts = " ".join(page.text.partition("Reason given")[2].partition("Made by this command")[0].split())
    for count in ("failed:diverged 1", "failed:truncated 1", "restored 2", "skipped:too_small 1", "no_face 1"):
        assert count in counts
    torn = next(article for article in page.articles if article["data-photo"] == "d/torn.jpg")
    assert f"report.html#{torn['id']}" in page.urls


def test_metrics_have_units_and_explanations_and_nothing_stands_for_null(run_dir):
    html = write_report(run_dir).read_text(encoding="utf-8")
    first, second = (
        article
        for article in Page(run_dir / "report.html").articles
        if "PSNR" in article["text"] or "Like" in article["text"]
    )
    assert "27.1 dB" in first["text"]
    assert "Like" not in first["text"]
    assert "0.900" in second["text"]
    assert "PSNR" not in second["text"]
    assert 'title="PSNR of the restored against the undamaged face' in html
    assert "None" not in html


def test_why_metrics_are_missing_is_said_once_when_it_is_the_same_for_all(tmp_path):
    same = [row(f"{n}.png", metrics_unavailable="No reference.") for n in range(3)]
    assert words(Page(write_report(finished_run(tmp_path / "same", same)))).count("No reference.") == 1
    other = [*same, row("x.png", metrics_unavailable="No weights.")]
    text = words(Page(write_report(finished_run(tmp_path / "other", other))))
    assert (text.count("No reference."), text.count("No weights.")) == (3, 1)


def test_album_and_its_maps_are_shown_when_kept(run_dir):
    kept = run_dir / "faces" / ROWS[0].unit
    for name in ("album/00.png", "album/01.png", "mean.png", "variance.png"):
        picture(kept / name)
    page = Page(write_report(run_dir))
    first, second = (article for article in page.articles if article["data-status"] == "restored")
    shown = [url.rpartition(f"{ROWS[0].unit}/")[2] for url in first["urls"] if "faces/" in url]
    assert sorted(shown) == ["album/00.png", "album/01.png", "input.png", "mean.png", "restored.png", "variance.png"]
    assert "What is invented" in first["text"]
    assert "Album" not in second["text"]
    assert None not in page.alts


def test_pictures_that_were_not_kept_are_not_linked(run_dir):
    (run_dir / "faces" / ROWS[1].unit / "restored.png").unlink()
    (run_dir / "photos" / "b/two.png").unlink()
    page = Page(write_report(run_dir))
    article = next(article for article in page.articles if article["id"] == f"unit-{ROWS[1].unit}")
    assert "not kept" in article["text"]
    assert not [url for url in article["urls"] if "restored.png" in url or "photos/" in url]


def test_a_crop_of_a_face_that_failed_is_never_shown_as_restored(run_dir):
    failed = next(item for item in ROWS if item.status == "failed:diverged")
    picture(run_dir / "faces" / failed.unit / "restored.png")
    article = Page(write_report(run_dir)).articles[0]
    assert article["data-status"] == "failed:diverged"
    assert not [url for url in article["urls"] if "restored.png" in url]


def test_many_rows_go_on_further_pages_and_every_link_arrives(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ENTRIES_A_PAGE", 3)
    rows = [row(f"{n}.png") for n in range(6)] + [row("z.png", None, "failed:empty", reason="It is empty.")]
    run_dir = finished_run(tmp_path, rows)
    pages = {path.name: Page(path) for path in (write_report(run_dir), *run_dir.glob("report-?.html"))}

    assert sorted(pages) == ["report-2.html", "report-3.html", "report.html"]
    order = [
        a["data-photo"] for name in ("report.html", "report-2.html", "report-3.html") for a in pages[name].articles
    ]
    assert order == ["z.png", "0.png", "1.png", "2.png", "3.png", "4.png", "5.png"]
    for page in pages.values():
        for url in map(urlsplit, page.urls):
            assert not url.path or (run_dir / unquote(url.path)).is_file()
            assert not url.fragment or url.fragment in pages[url.path or "report.html"].ids + page.ids
    script = (run_dir / "report-index.js").read_text()
    names, index = json.loads(script.strip().removeprefix("useIndex(").removesuffix(")"))
    for photo, status, anchor, number in index:
        found = [(a["data-photo"], a["data-status"]) for a in pages[names[number]].articles if a["id"] == anchor]
        assert found == [(photo, status)]
    assert len(index) == 7


def test_a_shorter_report_leaves_no_pages_of_a_longer_one(run_dir, monkeypatch):
    (run_dir / "report-notes.html").write_text("mine")
    monkeypatch.setattr(report, "ENTRIES_A_PAGE", 2)
    write_report(run_dir)
    monkeypatch.setattr(report, "ENTRIES_A_PAGE", 1000)
    write_report(run_dir)
    assert sorted(path.name for path in run_dir.glob("report*")) == ["report-notes.html", "report.html"]


def test_the_same_photo_twice_gets_two_ids(tmp_path):
    rows = [row("a.png", unit="same"), row("copy of a.png", unit="same")]
    page = Page(write_report(finished_run(tmp_path, rows)))
    assert [article["id"] for article in page.articles] == ["unit-same", "unit-same_"]


def test_a_run_without_rows_or_run_json_still_has_a_report(tmp_path):
    text = words(Page(write_report(finished_run(tmp_path, []))))
    assert "0 of 0 faces restored" in text
    assert "There are no photos in this run." in text


@pytest.mark.parametrize("run", [{}, {"prior": None, "command": None}, {"started_at": "yesterday", "settings": []}])
def test_keys_that_run_json_lacks_are_taken_from_the_rows_or_left_out(tmp_path, run):
    text = words(Page(write_report(finished_run(tmp_path, ROWS, run))))
    assert "On 1 March 2025, from 22:00 to 22:03 UTC, 5 photos" in text
    assert "It took 3 min 20 s in all" in text
    assert "The prior was faces64, with the preset fast and seed 4." in text
    assert "Made by this command" not in text


def test_what_cannot_be_reported_is_refused(tmp_path, run_dir):
    with pytest.raises(UserError, match="no manifest"):
        write_report(tmp_path)
    (run_dir / "run.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        write_report(run_dir)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (9.97, "10.0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3600 * 61 + 300, "61 h 05 min")],
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text
