"""``rgcp prior``: list, look at, import, pull, train, adapt, sample, compare and export priors."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from rgcp_core.checkpoints import export_guided_diffusion, import_prior
from rgcp_core.damage import measure_detail
from rgcp_core.errors import UserError
from rgcp_core.evaluation import TIMES, heldout_errors
from rgcp_core.images import save_image
from rgcp_core.memorisation import check_memorisation, without_copies
from rgcp_core.prior import Card, Prior, find_prior, list_priors, prior_folders, read_card, write_card
from rgcp_core.pull import PUBLIC_PRIORS, pull_prior
from rgcp_core.randomness import stream
from rgcp_core.sampling import sample
from rgcp_core.training import CONFIGS, Progress, image_grid
from rgcp_core.training_data import Pictures, load_pictures
from rgcp_core.unet import UNet
from tasks.prior_training import TrainingRequest, run_training

app = typer.Typer(
    no_args_is_help=True, help="Priors: list, info, import, pull, train, adapt, sample, export, evaluate."
)
console = Console()

Folder = Annotated[Path | None, typer.Option(help="Folder of priors to put it in; yours by default.")]
Window = Annotated[str | None, typer.Option(help="Part of the FFHQ square: left,top,right,bottom in 0..1.")]


@app.command("list")
def list_command() -> None:
    """List the priors that can be named, and those that can be pulled."""
    table = Table("name", "size", "parameters", "samples seen", "licence")
    cards = list_priors()
    for card in cards:
        seen = card.training.get("samples_seen")
        samples = f"{seen:,}" if isinstance(seen, int) else "not stated"
        table.add_row(card.name, f"{card.image_size} px", f"{_parameters(card) / 1e6:.1f} M", samples, card.licence)
    for public in PUBLIC_PRIORS.values():
        if public.name not in {card.name for card in cards}:
            table.add_row(public.name, "", "", f"not here: rgcp prior pull {public.name}", public.licence)
    console.print(table)


@app.command("info")
def info_command(prior: Annotated[str, typer.Argument(help="Name or folder of a prior.")]) -> None:
    """Print the card of a prior."""
    folder = find_prior(prior)
    console.print(f"{folder}", highlight=False, soft_wrap=True)
    _print_card(read_card(folder))


@app.command("import")
def import_command(
    path: Annotated[Path, typer.Argument(help=".pt or .safetensors, a diffusers folder, or a prior's folder.")],
    name: Annotated[str | None, typer.Option(help="Name of the prior; the file's by default.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of its pictures in pixels.")] = None,
    num_head_channels: Annotated[int | None, typer.Option(help="Channels of an attention head.")] = None,
    new_attention_order: Annotated[bool | None, typer.Option(help="q, k, v are split before the heads.")] = None,
    crop_window: Window = None,
    licence: Annotated[str | None, typer.Option(help="What the weights may be used for.")] = None,
    source: Annotated[str | None, typer.Option(help="Where the weights come from.")] = None,
    half: Annotated[bool, typer.Option("--half", help="Store as float16: half the size, rounded.")] = False,
    to: Folder = None,
) -> None:
    """Import weights that others trained, or the prior of a training run."""
    known = {
        "name": name,
        "licence": licence,
        "source": source,
        "crop_window": _window(crop_window),
        "architecture": {
            "image_size": image_size,
            "num_head_channels": num_head_channels,
            "use_new_attention_order": new_attention_order,
        },
    }
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    default_name = read_card(path).name if (path / "card.json").is_file() else path.resolve().stem
    folder = (to or prior_folders()[0]) / (name or default_name)
    _print_card(import_prior(path, folder, known, torch.float16 if half else None))
    console.print(f"Written to {folder}.", highlight=False, soft_wrap=True)


@app.command("pull")
def pull_command(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(PUBLIC_PRIORS)}.")],
    accept_licence: Annotated[bool, typer.Option("--accept-licence", help="You accept the licence shown.")] = False,
    to: Folder = None,
) -> None:
    """Download a public prior; the same command again goes on with an interrupted download."""
    if name in PUBLIC_PRIORS:
        console.print(f"{name}: {PUBLIC_PRIORS[name].source}", highlight=False)
        console.print(f"Licence: {PUBLIC_PRIORS[name].licence}", highlight=False)
    with Bar(TextColumn(name), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(name, total=None, visible=accept_licence)

        def on_step(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total or None)

        folder = to or prior_folders()[0]
        card = pull_prior(name, folder, accept_licence=accept_licence, on_step=on_step)
    _print_card(card)


@app.command("train")
def train_command(
    data: Annotated[Path, typer.Argument(help="Folder of pictures, or Parquet with a column 'image'.")],
    config: Annotated[str, typer.Option(help=f"One of: {', '.join(CONFIGS)}.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; the same command again resumes it.")],
    heldout: Annotated[Path | None, typer.Option(help="Pictures to measure on, never trained on.")] = None,
    start_from: Annotated[str | None, typer.Option("--from", help="Prior whose weights to start from.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the new prior; the configuration's by default.")] = None,
    licence: Annotated[str | None, typer.Option(help="What the weights may be used for, given their data.")] = None,
    crop_window: Window = None,
    minutes: Annotated[float | None, typer.Option(help="Stop, with a checkpoint, after so many minutes.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures a step, over all devices.")] = None,
    micro_batch_size: Annotated[int | None, typer.Option(help="Pictures a forward pass, to save memory.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of Adam.")] = None,
    ema_halflife: Annotated[float | None, typer.Option(help="Of the averaged weights, in samples.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all draws.")] = None,
    precision: Annotated[str, typer.Option(help="bf16-mixed, 32-true, or auto: bf16 on CUDA.")] = "auto",
    accelerator: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Compile the network.")] = False,
    checkpoint_minutes: Annotated[float, typer.Option(help="Minutes between checkpoints.")] = 5.0,
    checkpoint_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints, besides.")] = None,
    evaluate_minutes: Annotated[float, typer.Option(help="Minutes between evaluations with a grid.")] = 20.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the settings and stop.")] = False,
) -> None:
    """Train a prior, or go on with a training that stopped. Several devices or machines: start it with torchrun."""
    changes = {
        "iterations": iterations,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "ema_halflife": ema_halflife,
        "seed": seed,
        "crop_window": _window(crop_window),
    }
    request = TrainingRequest(
        data=data,
        config=config,
        out=out,
        heldout=heldout,
        start_from=start_from,
        name=name,
        licence=licence,
        changes={key: value for key, value in changes.items() if value is not None},
        minutes=minutes,
        micro_batch_size=micro_batch_size,
        precision=precision,
        accelerator=accelerator,
        compile=compile,
        checkpoint_minutes=checkpoint_minutes,
        checkpoint_steps=checkpoint_steps,
        evaluate_minutes=evaluate_minutes,
    )
    if dry_run:
        console.print_json(request.training_config().model_dump_json())
        return
    card = run_training(request, on_progress=_print_progress)
    if card is not None:
        _print_card(card)
        console.print(f"The prior is {out / 'prior'}; keep it by: rgcp prior import {out / 'prior'}", soft_wrap=True)


@app.command("adapt")
def adapt_command(
    paths: Annotated[list[Path], typer.Argument(help="Folders and files of the archive.", show_default=False)],
    name: Annotated[str, typer.Option(help="Name of the new prior, for --prior.")],
    prior: Annotated[str, typer.Option(help="Name or folder of the prior to start from.")] = "faces64",
    look_at: Annotated[int, typer.Option(min=1, help="Photos to look at, drawn from all of them.")] = 500,
    most: Annotated[int, typer.Option(min=1, help="Faces to learn from at most.")] = 200,
    aligned: Annotated[bool, typer.Option(help="The files are crops framed as the prior's pictures.")] = False,
    aligned_ffhq: Annotated[bool, typer.Option(help="The files are squares aligned as FFHQ is.")] = False,
    domain: Annotated[str, typer.Option(help="faces, or any: the middle square of every picture.")] = "faces",
    seed: Annotated[int, typer.Option(help="Seed of all random streams.")] = 0,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, e.g. warm_start.iterations=600; may be repeated.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    replace: Annotated[bool, typer.Option(help="Replace a prior of that name.")] = False,
    to: Folder = None,
) -> None:
    """Fine-tune a prior on an archive's own cleaner faces, once; then use it with `rgcp restore --prior NAME`."""
    import flows.run  # noqa: F401  # sets up Prefect's logging, before anything of Prefect is imported
    from flows.adapt import adapt, prepare, summary
    from flows.cli import chosen_framing, parse_settings
    from flows.progress import stage_bar
    from flows.server import prefect_api

    sources = [str(path) for path in paths]
    options: dict[str, Any] = {
        "prior": prior,
        "seed": seed,
        "settings": parse_settings(setting or []),
        "framing": chosen_framing(domain, None, aligned, aligned_ffhq),
        "look_at": look_at,
        "most": most,
        "to": None if to is None else str(to),
        "device": device,
        "replace": replace,
    }
    prepare(sources, name, **options)  # a wrong call should not wait for a server
    with prefect_api(), stage_bar(name):
        card = adapt(sources, name, **options)
    console.print(summary(card), markup=False, soft_wrap=True)
    console.print(
        f"Use it with: rgcp restore PHOTOS --out DIR --prior {name if to is None else to / name}", soft_wrap=True
    )


@app.command("sample")
def sample_command(
    prior: Annotated[str, typer.Argument(help="Name or folder of a prior.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")],
    count: Annotated[int, typer.Option(help="Pictures in the grid.", min=1)] = 16,
    steps: Annotated[int, typer.Option(help="Denoising steps, evenly spaced.", min=2)] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Draw unconditional samples as a grid."""
    save_image(image_grid(_samples(Prior.load(prior, device), count, steps, seed, device)), out)
    console.print(f"Written to {out}.", highlight=False, soft_wrap=True)


@app.command("evaluate")
def evaluate_command(
    priors: Annotated[list[str], typer.Argument(help="Names or folders of priors of one size.")],
    heldout: Annotated[Path, typer.Option(help="Pictures that were not trained on.")],
    train: Annotated[Path | None, typer.Option(help="Training pictures: leave their duplicates out.")] = None,
    samples: Annotated[int, typer.Option(help="Samples for the memorisation check; needs --train.")] = 0,
    pairs: Annotated[Path | None, typer.Option(help="PNG of samples beside their nearest training picture.")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of a sample.", min=2)] = 100,
    write_card_: Annotated[
        bool, typer.Option("--write-card", help="Put the errors, and what detail clean pictures have, into the cards.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Compare priors by their denoising error on held-out pictures, and check for memorised pictures."""
    loaded = [Prior.load(prior, device) for prior in priors]
    size = loaded[0].card.image_size
    if any(prior.card.image_size != size for prior in loaded):
        raise UserError("Priors of different sizes cannot be compared: the same noise hides less of a larger picture.")
    if samples and train is None:
        raise UserError("The memorisation check needs the training pictures: add --train.")
    pictures, training = load_pictures(heldout, size), None
    if train is not None:
        training = load_pictures(train, size)
        pictures = _fresh(pictures, training)
    detail = measure_detail(picture for batch in pictures.batches(32) for picture in batch) if write_card_ else None

    errors = []
    for prior in loaded:
        with console.status(f"{prior.card.name}: denoising {len(pictures)} pictures at {len(TIMES)} noise levels"):
            errors.append(heldout_errors(prior.network, pictures, prior.schedule, device=device))
    table = Table("t", *priors, title=f"Mean squared error of eps on {len(pictures)} held-out pictures")
    for t in TIMES:
        table.add_row(str(t), *(f"{error[t]:.5f}" for error in errors))
    console.print(table)
    if len(priors) > 1:
        better = [t for t in TIMES if all(errors[0][t] < other[t] for other in errors[1:])]
        verdict = "every noise level" if len(better) == len(TIMES) else f"t = {', '.join(map(str, better)) or 'none'}"
        console.print(f"{priors[0]} has the lowest error at {verdict}.", highlight=False)
    if write_card_:
        for name, prior, error in zip(priors, loaded, errors, strict=True):
            measured = {str(t): round(value, 5) for t, value in error.items()}
            card = prior.card.model_copy(update={"heldout_eps_mse": measured, "detail": detail})
            write_card(card, find_prior(name))
    if samples and training is not None:
        for name, prior in zip(priors, loaded, strict=True):
            drawn = _samples(prior, samples, steps, 0, device)
            report = check_memorisation(drawn, pictures, training)
            _print_memorisation(name, report.samples.copies, report.samples.ratio, report.heldout.ratio)
            if pairs is not None:
                closest = report.samples.ratio.argsort()[:16]
                both = torch.stack([drawn.cpu()[closest], training[report.samples.row[closest]]], dim=1)
                save_image(image_grid(both.flatten(0, 1)), pairs)


@app.command("export")
def export_command(
    prior: Annotated[str, typer.Argument(help="Name or folder of a prior.")],
    out: Annotated[Path, typer.Option(help=".pt to write, with guided-diffusion's keys.")],
    half: Annotated[bool, typer.Option("--half", help="Store as float16.")] = False,
) -> None:
    """Write a prior in the format of guided-diffusion, for other tools; its card goes beside it as JSON."""
    export_guided_diffusion(Prior.load(prior), out, torch.float16 if half else torch.float32)
    console.print(f"Written to {out} and {out.with_suffix('.json').name}.", highlight=False, soft_wrap=True)


def _samples(prior: Prior, count: int, steps: int, seed: int, device: str) -> torch.Tensor:
    """``count`` samples (N,3,S,S), 16 at a time."""
    size = prior.card.image_size
    streams = [stream(seed, f"sample{i}", "sample") for i in range(count)]
    drawn = []
    for start in range(0, count, 16):
        part = streams[start : start + 16]
        with console.status(f"samples {start + 1} to {start + len(part)} of {count}"):
            drawn.append(
                sample(
                    prior.network, (3, size, size), prior.schedule, generators=part, device=device, steps=steps
                ).cpu()
            )
    return torch.cat(drawn)


def _fresh(heldout: Pictures, training: Pictures) -> Pictures:
    fresh = without_copies(heldout, training)
    if len(fresh) < len(heldout):
        console.print(
            f"{len(heldout) - len(fresh)} held-out pictures are in the training set as well and are left out.",
            highlight=False,
        )
    return fresh


def _print_memorisation(name: str, copies: torch.Tensor, ratio: torch.Tensor, heldout_ratio: torch.Tensor) -> None:
    console.print(
        f"{name}: {int(copies.sum())} of {len(copies)} samples are copies of a training picture. Nearest over mean of "
        f"50 nearest, median: samples {float(ratio.median()):.3f}, held-out {float(heldout_ratio.median()):.3f} "
        f"(lower: nearer to one training picture); lowest: {float(ratio.min()):.3f}, {float(heldout_ratio.min()):.3f}.",
        highlight=False,
    )


def _print_progress(progress: Progress) -> None:
    minutes = int(progress.seconds_left / 60)
    console.print(
        f"step {progress.step:,}/{progress.steps:,}  {progress.samples:,} samples  loss {progress.loss:.5f}  "
        f"{progress.samples_per_second:.1f} samples/s  {minutes // 60} h {minutes % 60:02d} min left",
        highlight=False,
        soft_wrap=True,
    )


def _print_card(card: Card) -> None:
    console.print_json(card.model_dump_json())


def _parameters(card: Card) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in UNet(card.architecture).parameters())


def _window(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        left, top, right, bottom = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"A crop window is left,top,right,bottom, such as 0,0,1,1; got {text!r}.") from error
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise UserError(f"A crop window lies within 0..1, left of right and top above bottom; got {text!r}.")
    return left, top, right, bottom


if __name__ == "__main__":
    app()
