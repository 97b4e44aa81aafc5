"""The curves of supplement E for a prior: how much of a damage a noise step hides, and what it costs."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from rgcp_core.errors import UserError
from rgcp_core.prior import find_prior, read_card
from rgcp_core.theory import KL_BUDGET, entropy_per_dim, kl_noised, step_for_kl


def print_theory(console: Console, prior: str, damage: float, out: Path | None) -> None:
    """Print KL and entropy at some steps, the K of the presets and the K that the damage asks for.

    Args:
        console: where to.
        prior: name or folder.
        damage: PSNR of the damaged against the undamaged picture in dB.
        out: PNG for the curves, or None.
    """
    card = read_card(find_prior(prior))
    schedule = card.schedule.build()
    dimensions = 3 * card.image_size**2
    distance_squared = dimensions * 4 * 10 ** (-damage / 10)  # the peak of [-1,1] is 2
    divergence = kl_noised(schedule.alphas_cumprod, distance_squared)
    entropy = entropy_per_dim(schedule.alphas_cumprod)

    table = Table(title=f"{card.name}, {card.image_size} px, a damage of {damage:g} dB")
    for column in ("K", "KL of noised input and original (nats)", "entropy a dimension (nats)"):
        table.add_column(column, justify="right")
    preset_step = card.usual_noise_step
    needed = step_for_kl(schedule.alphas_cumprod, distance_squared, KL_BUDGET)
    shown = {10, 20, 50, 100, 200, 300, 400, 600, 800, 1000, preset_step, needed}
    for step in sorted(step for step in shown if step <= schedule.steps):
        mark = " (usual)" if step == preset_step else " (this damage)" if step == needed else ""
        table.add_row(f"{step}{mark}", f"{divergence[step - 1]:,.0f}", f"{entropy[step - 1]:.3f}")
    console.print(table)
    console.print(
        f"A restoration from K = {needed} leaves {KL_BUDGET:,.0f} nats of this damage, which is what the paper's "
        "K = 200 at 256 px leaves of 22 dB. A larger K hides more of the damage and more of the person."
    )
    if out is not None:
        _draw(out, divergence.tolist(), entropy.tolist(), preset_step, needed)
        console.print(f"Curves: {out}", soft_wrap=True)


def _draw(out: Path, divergence: list[float], entropy: list[float], preset_step: int, needed: int) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    if out.suffix.lower() != ".png":
        raise UserError(f"The curves are drawn as PNG; got {out.name}.")
    steps = range(1, len(divergence) + 1)
    figure, left = pyplot.subplots(figsize=(7, 4), layout="constrained")
    left.semilogy(steps, divergence, color="tab:blue")
    left.set(xlabel="noise step K", ylabel="KL, nats")
    left.yaxis.label.set_color("tab:blue")
    right = left.twinx()
    right.plot(steps, entropy, color="tab:red")
    right.set_ylabel("entropy, nats a dimension", color="tab:red")
    for step, name in ((preset_step, "usual"), (needed, "this damage")):
        left.axvline(step, color="gray", linestyle=":")
        left.annotate(f"{name}: {step}", (step, divergence[0]), rotation=90, va="top", ha="right", fontsize=8)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
