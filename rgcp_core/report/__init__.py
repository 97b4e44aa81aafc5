"""The report of a run: plain HTML pages beside the pictures that they show, to be opened without a network.

`report.html` begins with what was done in words, then come the faces to look at and the failures, then a card for
every face. A run of more than `ENTRIES_A_PAGE` rows goes on in `report-2.html` and so forth; `report-index.js`, which
a page loads only when it needs it, says where an entry is: so the search and links to `report.html#unit-<unit>` reach
all.
"""

import json
import re
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from rgcp_core.errors import UserError
from rgcp_core.manifest import read_table, replacing
from rgcp_core.report.entries import COLUMNS, KINDS, REVIEW, anchors, entry, section_of
from rgcp_core.report.summary import summarise

ENTRIES_A_PAGE = 1000


def write_report(run_dir: Path) -> Path:
    """Write `report.html` from `manifest.parquet`, `run.json` and `faces/` of a run, and return its path.

    Raises `UserError` when there is no manifest or `run.json` is not JSON. When `run.json` or a key of it is
    missing, only the sentence about it is left out.
    """
    run_dir = Path(run_dir)
    rows = read_table(run_dir, COLUMNS).to_pylist()
    order = (REVIEW, *KINDS)
    rows.sort(key=lambda row: order.index(section_of(row)))  # within a kind they stay sorted by photo and face
    places = [(anchor, number // ENTRIES_A_PAGE) for number, anchor in enumerate(anchors(rows))]
    names = ["report.html"] + [f"report-{n}.html" for n in range(2, len(rows[:-1]) // ENTRIES_A_PAGE + 2)]
    links = [f"{names[page]}#{quote(anchor)}" for anchor, page in places]
    summary = summarise(rows, links, _read_run(run_dir))

    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.j2")
    for page, name in enumerate(names):
        start = page * ENTRIES_A_PAGE
        here = zip(rows[start : start + ENTRIES_A_PAGE], places[start:], strict=False)
        entries = [entry(row, anchor, run_dir) for row, (anchor, _) in here]
        sections = [(kind, list(group)) for kind, group in groupby(entries, key=lambda item: item.section)]
        totals = Counter(section_of(row) for row in rows)
        html = template.render(summary=summary, sections=sections, totals=totals, page=page, names=names)
        with replacing(run_dir / name, run_dir) as unfinished:
            unfinished.write_text(html, encoding="utf-8")

    written = {*names}
    if len(names) > 1:
        index = [[row["photo"], row["status"], *place] for row, place in zip(rows, places, strict=True)]
        with replacing(run_dir / "report-index.js", run_dir) as unfinished:
            unfinished.write_text(f"useIndex({json.dumps([names, index])})\n", encoding="utf-8")
        written.add("report-index.js")
    for path in run_dir.glob("report-*"):  # of a longer report that stood here before
        if re.fullmatch(r"report-(\d+\.html|index\.js)", path.name) and path.name not in written:
            path.unlink()
    return run_dir / "report.html"


def _read_run(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "run.json"
    if not path.exists():
        return {}
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}). Delete it or run the same command again.") from error
    return run if isinstance(run, dict) else {}
