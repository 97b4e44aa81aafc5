"""``docs/evidence.md``, put together from what the studies found.

python -m rgcp_core.evidence results/evidence docs/evidence.md
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rgcp_core.benchmark_page import LABELS
from rgcp_core.errors import UserError
from rgcp_core.images import write_atomically
from rgcp_core.studies import STUDIES
from rgcp_core.study_page import HOW_TO_READ, claims_table, conditions_table, equality_table, interval_text

HEAD = """# Evidence: what the paper claims, measured here

For the researcher who asks why a restored face should be believed. Every number on this page was written by the command
named beside it; `dvc repro results/evidence/dvc.yaml` runs them all and writes the page anew. What did not hold is
listed with what did.
"""

ABOUT = {
    "noise-step": "A small K keeps the picture and its damage, a large one invents another person. Constraining the "
    "prior should keep the person at a K that removes the damage.",
    "guidance-interval": "The album should be near the person without being the damaged picture: guided now and "
    "then, neither always nor never.",
    "album-size": "One photo of each person is damaged; the other photos are the album. A stranger's album is the "
    "control.",
    "distortion": "The same prior meets each damage without having been told which it is. K is picked for each face by "
    "its damage, and compared with the prior's usual K for all.",
    "samples": "Pictures drawn from pure noise show what a prior knows: after constraining, the person.",
    "presets": "`paper` costs too much for most archives. A preset is called equal to it when its mean difference lies "
    "within the spread that `paper` has over its own seeds (two one-sided tests); both controls must fail that test. "
    "The learning rate of `balanced` was chosen on four other faces; these had no say in it.",
}


PICTURES = {
    "guidance-interval-anchors": "Albums of a portrait (NASA, public domain), by how often they are guided.",
    "samples-faces": "Drawn from pure noise by the prior alone and by the constrained one (portraits: NASA, US Navy).",
    "theory": "How much of a damage of 22 dB a noise step hides (KL, Eq. 3), and what it costs (entropy, Eq. 5).",
}
"""Beside the plots, where they were made: no face of a research data set is shown."""


def evidence_page(summaries: Mapping[str, Mapping[str, Any]], images: str, pictures: Sequence[str] = ()) -> str:
    """The page as Markdown.

    Args:
        summaries: ``summary.json`` by study.
        images: folder of the plots and pictures as the page sees it.
        pictures: names from `PICTURES` that are there.
    """
    runs = [summary["run"] for summary in summaries.values()]
    priors = sorted({f"{run['prior']} ({run['size']} px, {run['prior_sha256'][:12]})" for run in runs})
    lines = [HEAD, f"Prior: {', '.join(priors)}: small and weak, so what fails here may hold on a larger one."]
    lines += ["", HOW_TO_READ, "", "## Each claim", ""]
    for name, summary in summaries.items():
        if summary["verdicts"]:
            run = summary["run"]
            lines += [f"`rgcp ablate {name}`, {run['faces']} faces, {run['seeds']} seeds each:", ""]
            lines += [*claims_table(summary["verdicts"]), ""]
    lines += ["## What did not hold", ""]
    open_claims = [
        f"- {verdict['claim']} ({LABELS.get(verdict['metric'], verdict['metric'].replace('_', ' '))} "
        f"{interval_text(verdict, sign=True) if 'n' in verdict else ''}: {verdict['result']}; {name})"
        for name, summary in summaries.items()
        for verdict in summary["verdicts"]
        if verdict["result"] != "held"
    ]
    lines += open_claims or ["Every claim held."]
    failed = [
        verdict["claim"]
        for summary in summaries.values()
        for verdict in summary["verdicts"]
        if verdict["control"] and verdict["result"] != "held"
    ]
    if failed:
        lines += ["", "A control is among them: what its study shows by the same metric is then shown by nothing."]
    for name, summary in summaries.items():
        run = summary["run"]
        lines += ["", f"## {name}", "", ABOUT[name], ""]
        settings = f", settings `{json.dumps(run['settings'])}`" if run["settings"] else ""
        preset = "All presets" if name == "presets" else f"Preset `{run['preset']}`"
        lines += [f"{preset}{settings}; damage seed {run['damage_seed']}; code {run['code_version']}."]
        lines += ["", f"```sh\n{run['command']}\n```", "", f"![{name}]({images}/{name}.png)", ""]
        if "equality" in summary:
            lines += [*equality_table(summary["equality"]), ""]
        lines += conditions_table(summary["conditions"])
    if pictures:
        lines += ["", "## Pictures"]
        for name in pictures:
            lines += ["", PICTURES[name], "", f"![{name}]({images}/{name}.png)"]
    return "\n".join(lines) + "\n"


def write_evidence(results: Path, page: Path) -> None:
    """Write the page from ``results/<study>/summary.json``, and copy plots and ``results/pictures`` beside it.

    Raises:
        UserError: no study is there.
    """
    summaries: dict[str, Any] = {}
    for name in STUDIES:
        if (results / name / "summary.json").is_file():
            summaries[name] = json.loads((results / name / "summary.json").read_text(encoding="utf-8"))
            plot = (results / name / "plot.png").read_bytes()
            write_atomically(page.parent / "images" / "evidence" / f"{name}.png", plot)
    if not summaries:
        raise UserError(
            f"There is no study in {results}; run rgcp ablate STUDY --data DIR --out {results}/STUDY first."
        )
    pictures = [name for name in PICTURES if (results / "pictures" / f"{name}.png").is_file()]
    for picture_name in pictures:
        picture = (results / "pictures" / f"{picture_name}.png").read_bytes()
        write_atomically(page.parent / "images" / "evidence" / f"{picture_name}.png", picture)
    write_atomically(page, evidence_page(summaries, "images/evidence", pictures).encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the page of evidence.")
    parser.add_argument("results", type=Path)
    parser.add_argument("page", type=Path)
    arguments = parser.parse_args()
    write_evidence(arguments.results, arguments.page)
