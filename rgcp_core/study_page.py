"""What a study found, as numbers, a Markdown page, plots and sheets of faces."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rgcp_core.ablation import Case
from rgcp_core.benchmark import LOWER_IS_BETTER
from rgcp_core.benchmark_page import LABELS, plot_faces, save_figure
from rgcp_core.images import load_image, to_uint8, write_atomically
from rgcp_core.statistics import Interval, mean_interval
from rgcp_core.studies import ALONE, INPUT, OTHERS, Study, equality, judge

PLOTTED = ("lpips_alex", "identity_dlib", "psnr")
TABLED = ("psnr", "ssim", "lpips_alex", "identity_dlib", "identity_arcface", "refused")
FACES_ON_SHEET = 6
EQUALITY_METRICS = ("identity_dlib", "lpips_alex", "psnr")
EQUALITY_CONTROLS = (ALONE, OTHERS)

HOW_TO_READ = (
    "In brackets: 95 % bootstrap interval of the mean over the faces (BCa, 9,999 resamples; the seeds of a face are "
    "averaged first). Differences are paired, face by face. `held`: the interval lies on the expected side of 0; "
    "`not shown`: it contains 0; `the opposite`: it lies on the other side."
)


def summarise(study: Study, rows: pd.DataFrame) -> dict[str, Any]:
    """Means by condition and the verdicts, ready for JSON.

    Args:
        study: what was asked.
        rows: one a picture, as the flow collects them.
    """
    by_kind = len(study.kinds) > 1
    means = []
    for (kind, condition), group in rows.groupby(["kind", "condition"], sort=False):
        measured = [name for name in TABLED if name in group and group[name].notna().any()]
        means.append(
            {
                "condition": f"{kind}: {condition}" if by_kind else condition,
                "faces": int(group["face"].nunique()),
                "metrics": {name: _plain(asdict(_mean(group, name))) for name in measured},
            }
        )
    verdicts = []
    for claim in study.claims:
        verdict = judge(claim, rows)
        verdicts.append(
            {
                "claim": claim.text,
                "source": claim.source,
                "metric": claim.metric,
                "expected": "above 0" if claim.higher else "below 0",
                "control": claim.control,
                "result": verdict.result,
                **(_plain(asdict(verdict.interval)) if verdict.interval else {}),
            }
        )
    summary: dict[str, Any] = {"study": study.name, "conditions": means, "verdicts": verdicts}
    if study.name == "presets":
        tests = [asdict(test) for test in equality(rows, EQUALITY_METRICS)]
        summary["equality"] = [{**_plain(test), "interval": _plain(test["interval"])} for test in tests]
    return summary


def markdown(study: Study, summary: Mapping[str, Any]) -> str:
    """The page of a study: its facts, its claims, its table."""
    run = summary["run"]
    damage = ", ".join(study.kinds)
    lines = [f"# {study.title}", ""]
    lines += [
        f"{run['faces']} faces, seeds {run['seeds']}, prior {run['prior']} ({run['size']} px), preset {run['preset']}"
        f"{', ' + json.dumps(run['settings']) if run['settings'] else ''}; damage: {damage} (seed "
        f"{run['damage_seed']}). Made by `{run['command']}`, code {run['code_version']}.",
        "",
        HOW_TO_READ,
    ]
    if summary["verdicts"]:
        lines += ["", *claims_table(summary["verdicts"])]
    if "equality" in summary:
        lines += ["", *equality_table(summary["equality"])]
    lines += ["", *conditions_table(summary["conditions"])]
    reasons = summary.get("unavailable") or {}
    lines += ["", *(f"Not measured: {LABELS[name]}: {reason}" for name, reason in reasons.items())] if reasons else []
    return "\n".join(lines) + "\n"


def claims_table(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Claim, where it is from, number, verdict."""
    lines = ["| claim | from | measured | result |", "|---|---|---|---|"]
    for verdict in verdicts:
        number = f"{LABELS.get(verdict['metric'], verdict['metric'].replace('_', ' '))} "
        number += f"{interval_text(verdict, sign=True)}, n = {verdict['n']}" if "n" in verdict else ""
        lines.append(f"| {verdict['claim']} | {verdict['source']} | {number} | {verdict['result']} |")
    return lines


def conditions_table(conditions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Condition, faces, means with intervals."""
    metrics = [name for name in TABLED if any(name in row["metrics"] for row in conditions)]
    heads = [f"{LABELS[name]} {'↓' if name in LOWER_IS_BETTER else '↑'}" for name in metrics]
    lines = [f"| condition | faces | {' | '.join(heads)} |", "|---" * (len(metrics) + 2) + "|"]
    for row in conditions:
        cells = [interval_text(row["metrics"].get(name)) for name in metrics]
        lines.append(f"| {row['condition']} | {row['faces']} | {' | '.join(cells)} |")
    return lines


def equality_table(tests: Sequence[Mapping[str, Any]]) -> list[str]:
    """Preset, metric, difference, margin, verdict; then what follows for each preset.

    Equal is a preset that is equal by every metric. A control that is, too, shows that the test cannot tell.
    """
    lines = ["| against `paper` | metric | difference | margin | 90 % interval of the test | equal |"]
    lines += ["|---" * 6 + "|"]
    for test in tests:
        lines.append(
            f"| {test['preset']} | {LABELS[test['metric']]} | {interval_text(test['interval'], sign=True)} | "
            f"{test['margin']:.3g} | [{test['low']:+.3g}, {test['high']:+.3g}] | {'yes' if test['equal'] else 'no'} |"
        )
    unequal: dict[str, list[str]] = {}
    for test in tests:
        unequal.setdefault(test["preset"], []).extend([] if test["equal"] else [LABELS[test["metric"]]])
    blind = [name for name in EQUALITY_CONTROLS if name in unequal and not unequal[name]]
    lines += [""]
    for name, metrics in unequal.items():
        if name in EQUALITY_CONTROLS:
            verdict = f"fails the test, as it must ({', '.join(metrics)})" if metrics else "passes the test"
            lines.append(f"- Control, {name}: {verdict}.")
        elif metrics:
            lines.append(f"- `{name}` is not shown to be equal to `paper`: {', '.join(metrics)}.")
        elif blind:
            lines.append(f"- `{name}` passes, but so does a control: nothing is shown.")
        else:
            lines.append(f"- `{name}` is equal to `paper`.")
    return lines


def interval_text(value: Mapping[str, Any] | None, sign: bool = False) -> str:
    """21.3 [20.1, 22.4]; nothing where there is no value."""
    if value is None or value["mean"] is None:
        return ""
    plus = "+" if sign else ""
    style = f"{plus}.2f" if abs(value["mean"]) >= 10 else f"{plus}.3f"
    if value["low"] is None:
        return f"{value['mean']:{style}}"
    return f"{value['mean']:{style}} [{value['low']:{style}}, {value['high']:{style}}]"


def _mean(rows: pd.DataFrame, metric: str) -> Interval:
    return mean_interval(rows[metric].to_numpy(), faces=list(rows["face"]))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity."""
    return {
        key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in values.items()
    }


# ------------------------------------------------------------------------------------------------------- pictures


def plot_study(study: Study, rows: pd.DataFrame, path: Path) -> None:
    """Means with their 95 % intervals: along the study's axis, or one bar a condition; write a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.3 * len(PLOTTED), 3.6 if study.axis else 0.9 + 0.24 * _bars(rows)), layout="constrained")
    for axis, metric in zip(figure.subplots(1, len(PLOTTED), squeeze=False)[0], PLOTTED, strict=True):
        if rows[metric].isna().all():
            axis.set_title(f"{LABELS[metric]}: not measured", fontsize=9)
            continue
        if study.axis:
            _plot_levels(axis, rows, metric)
            axis.set_xlabel(study.axis)
        else:
            _plot_bars(axis, rows, metric)
        better = "lower" if metric in LOWER_IS_BETTER else "higher"
        axis.set_title(f"{LABELS[metric]} ({better} is better)", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(color="0.9")
    if study.axis:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    save_figure(figure, path)


def _plot_levels(axis: Any, rows: pd.DataFrame, metric: str) -> None:
    for number, (series, group) in enumerate(rows.groupby("series", sort=False)):
        color = "0.4" if series == INPUT else f"C{number}"
        levels = group.dropna(subset=["level"])
        if levels["level"].nunique() < 2:  # a point, or a condition without a place on the axis: a line across
            estimate = _mean(group, metric)
            axis.axhline(estimate.mean, color=color, linestyle="--", linewidth=1, label=series)
            continue
        points = [(level, _mean(at, metric)) for level, at in levels.groupby("level")]
        x = [level for level, _ in points]
        axis.plot(x, [estimate.mean for _, estimate in points], "o-", color=color, markersize=4, label=series)
        low, high = [estimate.low for _, estimate in points], [estimate.high for _, estimate in points]
        axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def _bars(rows: pd.DataFrame) -> int:
    return rows.groupby(["kind", "condition"]).ngroups


def _plot_bars(axis: Any, rows: pd.DataFrame, metric: str) -> None:
    labels = []
    several = rows["kind"].nunique() > 1
    series = list(rows["series"].unique())
    for y, ((kind, condition), group) in enumerate(rows.groupby(["kind", "condition"], sort=False)):
        estimate = _mean(group, metric)
        color = "0.4" if condition == INPUT else f"C{series.index(group['series'].iloc[0])}"
        axis.plot(estimate.mean, y, "o", color=color, markersize=4)
        axis.plot([estimate.low, estimate.high], [y, y], "-", color=color, linewidth=2)
        labels.append(f"{kind}: {condition}" if several else condition)
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.invert_yaxis()


def plot_sheets(study: Study, rows: pd.DataFrame, cells: Path, cases: Sequence[Case], folder: Path) -> None:
    """Write ``faces.png``, a row a face and a column a condition, and ``anchors.png``, albums by condition."""
    clean = {case.face: case.clean for case in cases}
    damaged = {(case.face, case.kind): case.y for case in cases}
    first = rows[rows["seed"] == rows["seed"].min()]
    picked = list(dict.fromkeys(zip(first["face"], first["kind"], strict=True)))
    if len(study.kinds) > 1:  # one face a kind shows more than one kind on many faces
        faces = list(dict.fromkeys(face for face, _ in picked))
        picked = [(faces[i % len(faces)], kind) for i, kind in enumerate(study.kinds)]
    else:
        picked = picked[:FACES_ON_SHEET]
    conditions = list(dict.fromkeys(first.dropna(subset=["cell"])["condition"]))
    sheet: dict[str, list[np.ndarray | None]] = {"clean": [], INPUT: [], **{name: [] for name in conditions}}
    for face, kind in picked:
        of_face = first[(first["face"] == face) & (first["kind"] == kind)].dropna(subset=["cell"])
        of_face = of_face.set_index("condition")
        sheet["clean"].append(to_uint8(clean[face]))
        sheet[INPUT].append(to_uint8(damaged[face, kind]))
        for name in conditions:
            cell = of_face["cell"].get(name)
            sheet[name].append(_read(cells / cell / "restored.png") if cell else None)
    names = [f"{face} {kind}" if len(study.kinds) > 1 else face for face, kind in picked]
    plot_faces(sheet, names, folder / "faces.png")
    face, kind = picked[0]
    of_face = first[(first["face"] == face) & (first["kind"] == kind)].dropna(subset=["cell"])
    strips = {
        row.condition: strip
        for row in of_face.itertuples()
        if (strip := _read(cells / str(row.cell) / "anchors.png")) is not None
    }
    if strips:
        _plot_strips(strips, face, folder / "anchors.png")


def _plot_strips(strips: Mapping[str, np.ndarray], face: str, path: Path) -> None:
    from matplotlib.figure import Figure

    unique: dict[bytes, tuple[str, np.ndarray]] = {}
    for name, strip in strips.items():
        unique.setdefault(strip.tobytes(), (name, strip))
    shown = list(unique.values())
    figure = Figure(figsize=(9, 1.0 * len(shown) + 0.4), layout="constrained")
    for axis, (name, strip) in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        axis.imshow(strip[:, : 8 * strip.shape[0]], interpolation="nearest")
        axis.set_title(name, fontsize=8)
        axis.set_axis_off()
    figure.suptitle(f"What the prior was constrained on: {face}", fontsize=9)
    save_figure(figure, path)


def _read(path: Path) -> np.ndarray | None:
    return to_uint8(load_image(path)) if path.is_file() else None


# ---------------------------------------------------------------------------------------------------------- files


def write_study(
    folder: Path, study: Study, rows: pd.DataFrame, run: Mapping[str, Any], cells: Path, cases: Sequence[Case]
) -> Path:
    """Write ``results.parquet``, ``summary.json``, ``plot.png``, the sheets and ``page.md``; return the page.

    Args:
        folder: where.
        study: what was asked.
        rows: one a picture.
        run: facts about the run for the page and the summary.
        cells: folder of the pictures.
        cases: the faces of the study.
    """
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    rows.to_parquet(buffer, index=False, compression="zstd")
    write_atomically(folder / "results.parquet", buffer.getvalue())
    summary = {"run": dict(run), **summarise(study, rows)}
    summary["unavailable"] = _unavailable(rows)
    text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / "summary.json", text.encode() + b"\n")
    plot_study(study, rows, folder / "plot.png")
    plot_sheets(study, rows, cells, cases, folder)
    write_atomically(folder / "page.md", markdown(study, summary).encode())
    return folder / "page.md"


def _unavailable(rows: pd.DataFrame) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for text in rows["metrics_unavailable"].dropna().unique():
        for line in text.split("\n"):
            name, _, reason = line.partition(": ")
            reasons.setdefault(name, reason)
    return reasons
