"""The numbers of a benchmark as a Markdown table beside the published ones, and as pictures."""

import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rgcp_core.benchmark import LOWER_IS_BETTER, Crops
from rgcp_core.datasets import PublishedRow
from rgcp_core.errors import UnitError
from rgcp_core.images import to_uint8, write_atomically
from rgcp_core.metrics import METRICS

LABELS = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips_alex": "LPIPS (Alex)",
    "identity_dlib": "identity (dlib)",
    "identity_arcface": "identity (ArcFace)",
    "identity_input_dlib": "like the input (dlib)",
    "identity_input_arcface": "like the input (ArcFace)",
    "niqe": "NIQE",
    "musiq_koniq": "MUSIQ (KonIQ)",
    "fid": "FID",
    "kid": "KID",
    "refused": "refused by the gate",
    "album_identity": "identity of the album (dlib)",
    "album_psnr_input": "PSNR of album and input, dB",
}
PUBLISHED_SIZE = 256


def markdown_table(summary: Mapping[str, Any], published: Sequence[PublishedRow]) -> str:
    """Write the page of a benchmark.

    Args:
        summary: of `rgcp_core.benchmark.summarise`, with the facts that the flow adds (`dataset`, `run`, `distances`).
        published: the paper's rows about this data set.

    Returns:
        Markdown: measured and published rows in one table, differences, the identity check, and what was not measured.
    """
    dataset, run, methods = summary["dataset"], summary["run"], summary["methods"]
    sets = summary["distances"]
    whole = list(dict.fromkeys(name for values in sets.values() for name in values))
    columns = [
        metric
        for metric in (*METRICS, *dict.fromkeys(("fid", "kid", *whole)))
        if any(metric in entry["metrics"] for entry in methods.values())
        or any(metric in values for values in sets.values())
        or any(row.metric == metric for row in published)
    ]
    lines = [f"# Benchmark: {dataset['title']}", "", *_about(dataset, run), ""]
    heads = [f"{_label(name)} {'↓' if _lower_is_better(name) else '↑'}" for name in columns]
    lines += [f"| method | | faces | {' | '.join(heads)} |", "|---" * (len(columns) + 3) + "|"]
    for method, entry in methods.items():
        values = {**entry["metrics"], **sets.get(method, {})}
        cells = [_cell(values.get(name)) for name in columns]
        lines.append(f"| {method} | measured | {entry['measured']} of {entry['faces']} | {' | '.join(cells)} |")
    for method in dict.fromkeys(row.method for row in published):
        given = {row.metric: f"{row.value:g}" for row in published if row.method == method}
        cells = [given.get(name, "") for name in columns]
        lines.append(f"| {method} | published | | {' | '.join(cells)} |")
    lines += ["", _how_to_read(dataset, run, bool(published))]
    lines += _differences(summary["differences"])
    lines += _identity(methods)
    reasons = {**summary["unavailable"], **summary["distances_unavailable"]}
    if reasons:
        lines += ["", "## Not measured", ""]
        lines += [f"- {_label(metric)}: {reason}" for metric, reason in reasons.items()]
    facts = _set_facts(sets)
    if facts:
        lines += ["", "## Whole sets", "", facts]
    return "\n".join(lines) + "\n"


def _about(dataset: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    part = "" if dataset["count"] == dataset["total"] else f" of {dataset['total']} (a part of the set)"
    framing = "FFHQ squares" if run["framing"] == "ffhq" else "crops framed as the prior's"
    restored = f"restored with the prior {run['prior']}, preset {run['preset']}, seed {run['seed']}; "
    if run.get("person"):
        restored += f"{run['with_personal_prior']} faces with the personal prior of --person {run['person']}; "
    restored = restored if run["restored"] else ""
    text = (
        f"{dataset['count']} pictures{part}, {framing}, {restored}measured at {run['size']} x {run['size']} px. "
        f"Code {run['code_version']}; set {dataset['sha256'][:12]}."
    )
    return [text, *(["", dataset["about"]] if dataset["about"] else [])]


def _how_to_read(dataset: Mapping[str, Any], run: Mapping[str, Any], has_published: bool) -> str:
    text = (
        "In brackets: 95 % bootstrap interval of the mean over faces (BCa, 9,999 resamples). ↑ higher is better, "
        "↓ lower is better. ∞: the picture equals the clean one. `input` is the damaged picture itself."
    )
    if has_published:
        text += (
            " Published rows are those of Ding et al. 2024, measured by its authors at 256 x 256 px with tools that "
            "the paper does not name; measured rows come from this run."
        )
        if run["size"] != PUBLISHED_SIZE or dataset["count"] != dataset["total"]:
            text += " **Size or count differ here, so measured and published rows do not compare.**"
    return text


def _differences(differences: Mapping[str, Mapping[str, Any]]) -> list[str]:
    columns = [name for name in METRICS if any(name in values for values in differences.values())]
    if not columns:
        return []
    lines = ["", "## rgcp minus each other row, face by face", ""]
    lines += [f"| | {' | '.join(map(_label, columns))} |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| minus {method} | {' | '.join(_cell(values.get(name), sign=True) for name in columns)} |"
        for method, values in differences.items()
    ]
    return lines


def _identity(methods: Mapping[str, Any]) -> list[str]:
    checks = {method: entry["identity_check"] for method, entry in methods.items()}
    if not any(check["result"] for check in checks.values()):
        return []
    lines = ["", "## Are they the same people?", ""]
    for method, check in checks.items():
        if check["result"]:
            verdict = "passed" if check["result"] == "passed" else "**failed**"
            lines.append(
                f"- {method}: {verdict}; {check['nearest_to_own']} of {check['n']} faces are more like their own clean "
                "picture than like any other of the set."
            )
    return lines


def _set_facts(sets: Mapping[str, Mapping[str, Any]]) -> str:
    for values in sets.values():
        for fact in values.values():
            return (
                f"Reference set: {fact['reference_count']} pictures, {fact['reference_sha256'][:12]}. Features: "
                f"{fact['extractor']}, resized {fact['resize_mode']}. With fewer than 2,048 pictures FID is biased "
                "upwards; KID is not."
            )
    return ""


def _label(metric: str) -> str:
    return LABELS.get(metric, metric)


def _lower_is_better(metric: str) -> bool:
    return metric in LOWER_IS_BETTER or metric.startswith(("frechet_", "kernel_"))


def _cell(value: Mapping[str, Any] | None, sign: bool = False) -> str:
    """21.3 [20.1, 22.4]; nothing where there is no value."""
    if value is None:
        return ""
    if value["mean"] is None:
        return "not finite" if sign else f"∞ ({value['infinite']} of {value['n']})"
    style = "+.3g" if sign else ".3g"
    if abs(value["mean"]) >= 10:
        style = "+.1f" if sign else ".1f"
    if value.get("low") is None:
        return format(value["mean"], style)
    return f"{value['mean']:{style}} [{value['low']:{style}}, {value['high']:{style}}]"


# ------------------------------------------------------------------------------------------------------- pictures


def plot_intervals(summary: Mapping[str, Any], faces: pd.DataFrame, path: Path) -> None:
    """Draw, for each metric, every method's faces as dots and the mean with its interval as a bar; write a PNG."""
    from matplotlib.figure import Figure

    methods = list(summary["methods"])
    metrics = [name for name in METRICS if any(name in e["metrics"] for e in summary["methods"].values())]
    columns = min(3, max(1, len(metrics)))
    rows = max(1, -(-len(metrics) // columns))
    figure = Figure(figsize=(4 * columns, rows * (1.1 + 0.35 * len(methods))), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(metrics) :]:
        axis.set_visible(False)
    for axis, metric in zip(axes, metrics, strict=False):
        for y, method in enumerate(methods):
            values = faces.loc[faces["method"] == method, metric].replace([np.inf, -np.inf], np.nan).dropna()
            spread = np.linspace(-0.18, 0.18, len(values)) if len(values) > 1 else np.zeros(len(values))
            axis.plot(values, y + spread, ".", color="0.65", markersize=4, zorder=1)
            estimate = summary["methods"][method]["metrics"].get(metric)
            if estimate is None:
                continue
            if estimate["mean"] is None:
                axis.annotate("equal to the clean picture", (0.5, y), xycoords=("axes fraction", "data"), fontsize=7)
                continue
            axis.plot(estimate["mean"], y, "o", color="C0", markersize=5, zorder=3)
            if estimate["low"] is not None:
                axis.plot([estimate["low"], estimate["high"]], [y, y], "-", color="C0", linewidth=2, zorder=2)
        axis.set_yticks(range(len(methods)), methods)
        axis.set_ylim(len(methods) - 0.5, -0.5)
        axis.set_title(f"{_label(metric)} ({'lower' if _lower_is_better(metric) else 'higher'} is better)", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", color="0.9")
    figure.suptitle("Faces (grey), mean and 95 % interval (blue)", fontsize=9)
    save_figure(figure, path)


def plot_faces(pictures: Mapping[str, Sequence[np.ndarray | None]], names: Sequence[str], path: Path) -> None:
    """Draw a sheet of faces, a row a face and a column a method; write a PNG.

    Args:
        pictures: by title of the column, one (H,W,3) uint8 a face, or None.
        names: of the faces.
        path: the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 * len(pictures) + 0.3, 1.55 * len(names) + 0.3), layout="constrained")
    axes = figure.subplots(len(names), len(pictures), squeeze=False)
    for column, (title, faces) in enumerate(pictures.items()):
        axes[0, column].set_title(textwrap.fill(title, 20), fontsize=9)
        for row, face in enumerate(faces):
            axis = axes[row, column]
            axis.set_xticks([])
            axis.set_yticks([])
            if face is None:
                axis.text(0.5, 0.5, "none", ha="center", va="center", fontsize=8)
            else:
                axis.imshow(face, interpolation="nearest")
            if column == 0:
                axis.set_ylabel(names[row][-18:], fontsize=6)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    write_atomically(path, buffer.getvalue())


# ---------------------------------------------------------------------------------------------------------- files

FACES_ON_SHEET = 8


def write_results(
    folder: Path,
    faces: pa.Table,
    summary: Mapping[str, Any],
    published: Sequence[PublishedRow],
    columns: Mapping[str, tuple[Mapping[str, Path | None], Crops]],
) -> Path:
    """Write what a benchmark found.

    `faces.parquet` (one row a method and face), `summary.json` (all that the table shows, with its facts),
    `metrics.json` (means only, for `dvc metrics`), `plots/intervals.png`, `plots/faces.png`, `table.md`.

    Args:
        folder: where.
        faces: rows of `rgcp_core.benchmark.FACES_SCHEMA`.
        summary: as for `markdown_table`.
        published: the paper's rows.
        columns: of the sheet of faces, by title: picture by face, and how to read it.

    Returns:
        The path of `table.md`, which is written last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    pq.write_table(faces, buffer, compression="zstd")
    write_atomically(folder / "faces.parquet", buffer.getvalue())
    _write_json(folder / "summary.json", {**summary, "published": [asdict(row) for row in published]})
    _write_json(folder / "metrics.json", _means(summary))
    frame = faces.to_pandas()
    plot_intervals(summary, frame, folder / "plots" / "intervals.png")
    names = list(dict.fromkeys(frame["face"]))[:FACES_ON_SHEET]
    sheet = {
        title: [_pixels(pictures.get(name), crops) for name in names] for title, (pictures, crops) in columns.items()
    }
    plot_faces(sheet, names, folder / "plots" / "faces.png")
    write_atomically(folder / "table.md", markdown_table(summary, published).encode())
    return folder / "table.md"


def _means(summary: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    means: dict[str, dict[str, float]] = {}
    for method, entry in summary["methods"].items():
        values = {**entry["metrics"], **summary["distances"].get(method, {})}
        means[method] = {name: round(value["mean"], 6) for name, value in values.items() if value["mean"] is not None}
        means[method]["faces_measured"] = entry["measured"]
    return means


def _pixels(path: Path | None, crops: Crops) -> np.ndarray | None:
    if path is None:
        return None
    try:
        return to_uint8(crops.load(path))
    except UnitError:
        return None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n")
