"""What is here, what would be downloaded and from where, and what is done without it."""

import os
import shutil
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from rgcp_core.compute import check_compiler, computes_natively
from rgcp_core.errors import RgcpError
from rgcp_core.prior import Prior, list_priors
from rgcp_core.weights import status
from tasks.device import device_name, pick_device
from tasks.record import versions


def doctor(console: Console) -> bool:
    """Print what a run would work with; return whether anything that every run needs is broken."""
    device = pick_device("auto")
    facts = Table(title="This machine", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, version in versions().items():
        facts.add_row(name, version)
    facts.add_row("device", f"{device_name(device)}, {torch.get_num_threads()} threads")
    bfloat16 = computes_natively(device, "bfloat16")
    slow = "" if bfloat16 else "; add --set precision=float32 to fast and balanced: they are slower without"
    facts.add_row("bfloat16", ("yes" if bfloat16 else "no") + slow)
    facts.add_row("TF32", "yes" if computes_natively(device, "tf32") else "no: precision=tf32 is float32 here")
    facts.add_row("compiled=true", compiles(device))
    facts.add_row("free disk", f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB")
    facts.add_row("Prefect API", os.environ.get("PREFECT_API_URL", "none set: a local server for each run"))
    console.print(facts)

    healthy = True
    priors = Table(title="Priors")
    for column in ("name", "size", "licence", "state"):
        priors.add_column(column, overflow="fold")
    for card in list_priors():
        try:
            Prior.load(card.name)
            state = "ok"
        except RgcpError as error:
            state, healthy = str(error), False
        priors.add_row(card.name, f"{card.image_size} px", card.licence, state)
    console.print(priors)

    console.print("\nWeights of other projects", style="italic")
    for entry in status():
        known = entry.weights
        state = "missing" if entry.path is None else "damaged" if entry.intact is False else "found"
        healthy &= state != "damaged"
        console.print(f"[bold]{known.name}[/]: {state}" + (f", {entry.path}" if entry.path else ""), soft_wrap=True)
        console.print(f"  for {known.purpose}; without it {known.without}", soft_wrap=True)
        console.print(f"  {known.licence}" + (f"; from {known.url}" if known.url else ""), soft_wrap=True)
    console.print("Nothing is downloaded unasked. Put files into the folder that RGCP_WEIGHTS_DIR names.")
    return healthy


def compiles(device: torch.device) -> str:
    """Whether the network can be compiled here, in words."""
    try:
        check_compiler(device)
    except RgcpError as error:
        return str(error)
    return "can be: worth it for long runs"
