"""`mls bench NAME`: studies and measurements, each one command."""

import typer

from mls.tools.bench import ablations

app = typer.Typer(help="Studies and measurements, each one command.", no_args_is_help=True)
app.command("ablations")(ablations.ablations)


@app.callback()
def _group() -> None:
    """Keeps `mls bench NAME` a group while it has one command."""
