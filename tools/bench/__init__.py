"""`mls bench NAME`: studies and measurements, each one command."""

import typer

from mls.tools.bench import (
    ablations,
    analyse,
    downstream,
    evidence,
    faults,
    input,
    matching,
    objectives,
    probe,
    saving,
    scale,
    step,
    together,
)

app = typer.Typer(help="Studies and measurements, each one command.", no_args_is_help=True)
app.command("ablations")(ablations.ablations)
app.command("analyse")(analyse.analyse)
app.command("downstream")(downstream.downstream)
app.command("evidence")(evidence.evidence)
app.command("faults")(faults.bench)
app.command("input")(input.bench)
app.command("matching")(matching.bench)
app.command("objectives")(objectives.objectives)
app.command("probe")(probe.probe)
app.command("saving")(saving.saving)
app.command("scale")(scale.scale)
app.command("all")(together.together)
app.command("step")(step.bench)
