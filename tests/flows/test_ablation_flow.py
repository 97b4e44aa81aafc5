"""A study as a flow: every claim judged, every picture there, and a second run that makes none again."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from flows.ablation import CELLS, ablate, plan_study
from rgcp_core.errors import UserError
from rgcp_core.evidence import write_evidence

QUICK = {
    "precision": "float32",
    "album": {"size": 2, "steps": 3},
    "constrain": {"iterations": 2},
    "restore": {"steps": 2},
}


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """Three smooth pictures of each of two people, 16 px."""
    generator = np.random.default_rng(0)
    for person in ("ann", "bob"):
        (tmp_path / "people" / person).mkdir(parents=True)
        for i in range(3):
            small = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            small.resize((16, 16), Image.Resampling.BICUBIC).save(tmp_path / "people" / person / f"{i}.png")
    return tmp_path / "people"


def test_a_study_of_personal_albums(faces: Path, tmp_path: Path, tiny_prior_dir: Path, prefect_server: str) -> None:
    out = tmp_path / "album-size"

    def run() -> pd.DataFrame:
        outcome = ablate("album-size", str(faces), str(out), str(tiny_prior_dir), seeds=2, kind="jpeg", settings=QUICK)
        assert outcome.task_runs == 2 * 2 + 1
        return pd.read_parquet(out / "results.parquet")

    rows = run()
    # two people, two seeds: albums of 1 and 2 photos, the generative one, the prior alone, a stranger's, the input
    assert len(rows) == 2 * 2 * 6
    assert set(rows["face"]) == {"ann/0", "bob/0"}
    assert sorted(rows.loc[rows["series"] == "personal album", "level"].unique()) == [1.0, 2.0]
    assert rows.loc[rows["series"] != "input", "psnr"].notna().all()
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary["verdicts"]) == 6
    assert sum(verdict["control"] for verdict in summary["verdicts"]) == 1

    made = {path: path.stat().st_mtime_ns for path in (out / CELLS).rglob("restored.png")}
    assert len(made) == 2 * 2 * 5
    pd.testing.assert_frame_equal(run(), rows)
    assert {path: path.stat().st_mtime_ns for path in (out / CELLS).rglob("restored.png")} == made

    write_evidence(tmp_path, tmp_path / "docs" / "evidence.md")
    page = (tmp_path / "docs" / "evidence.md").read_text()
    for verdict in summary["verdicts"]:
        row = next(line for line in page.splitlines() if line.startswith(f"| {verdict['claim']}"))
        assert row.rstrip(" |").endswith(verdict["result"])
    assert (tmp_path / "docs" / "images" / "evidence" / "album-size.png").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"study": "nothing"}, "Unknown study"),
        ({"kind": "rust"}, "Unknown damage"),
        ({"data": "nowhere"}, "no folder"),
        ({"study": "album-size", "faces": 1}, "two people or more"),
    ],
)
def test_a_pointless_study_is_refused_at_once(
    faces: Path, tiny_prior_dir: Path, change: dict[str, object], message: str
) -> None:
    call = {
        "study": "noise-step", "data": str(faces / "ann"), "prior": str(tiny_prior_dir), "preset": "fast",
        "settings": None, "faces": None, "kind": "jpeg", "damage_seed": 0,
    }  # fmt: skip
    if change.get("study") == "album-size":
        call["data"] = str(faces)
    with pytest.raises(UserError, match=message):
        plan_study(**{**call, **change})  # type: ignore[arg-type]
