"""``rgcp personalize`` and ``rgcp people``: the people whom a prior was fine-tuned to."""

import typer

app = typer.Typer(no_args_is_help=True)


def mount(main: typer.Typer) -> None:
    """Put these commands into the command line ``rgcp``."""
    main.add_typer(app, name="people", help="People: known ones, those an archive holds, forget one.")


@app.callback()
def people() -> None:
    """People: known ones, those an archive holds, forget one."""
