"""``rgcp ui`` and ``rgcp deploy``: the parts of the command line that look after runs."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer()
console = Console(stderr=True, highlight=False)


@app.command()
def ui(port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = 4200) -> None:
    """Serve the Prefect page with all runs, on this machine only, until Ctrl-C."""
    from flows.server import serve_page

    serve_page(port, console)


@app.command()
def deploy(
    photos: Annotated[Path, typer.Option(help="Folder that is restored every night.")] = Path("photos"),
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("restored"),
    benchmark: Annotated[Path, typer.Option(help="Data set of the weekly benchmark.")] = Path("benchmark"),
    at_a_time: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
) -> None:
    """Register the nightly archive, the weekly benchmark and the training with the Prefect API."""
    import flows.run  # noqa: F401  # quiet logs; before anything of Prefect is imported
    from flows.deploy import WORK_POOL
    from flows.deploy import deploy as register
    from flows.server import required_api

    with required_api():
        names = register(photos, out, benchmark, at_a_time)
    console.print(f"Deployments: {', '.join(names)}. Their schedules are switched off; switch them on in the page.")
    console.print(f"Start the work on each machine with: prefect worker start --pool {WORK_POOL}")
