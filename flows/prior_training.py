"""The training of a prior as a Prefect flow: schedulable, and visible while it runs."""

from pathlib import Path

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE

from rgcp_core.prior import Card
from rgcp_core.training import Progress
from tasks.prior_training import TrainingRequest, run_training

train = task(name="train", cache_policy=NO_CACHE)(run_training)


@flow(name="prior-training", flow_run_name="train {request.config} into {request.out.name}")
def prior_training(request: TrainingRequest) -> Path:
    """Train a prior; the same parameters again resume it. Returns the folder of the trained prior."""
    progress_id = create_progress_artifact(progress=0.0, key="prior-training", description=str(request.out))

    def on_progress(progress: Progress) -> None:
        update_progress_artifact(progress_id, progress=100 * progress.step / progress.steps)  # type: ignore[arg-type]

    card = train(request, on_progress)
    if card is not None:
        create_markdown_artifact(summary(card), key="prior-training-result", description=card.name)
    return request.out / "prior"


def summary(card: Card) -> str:
    """Markdown table of a prior's training and its held-out errors."""
    rows = [f"| {key} | {value} |" for key, value in card.training.items()]
    rows += [f"| held-out error at t = {t} | {error} |" for t, error in card.heldout_eps_mse.items()]
    return "\n".join([f"# {card.name}", "", "| | |", "|---|---|", *rows])
