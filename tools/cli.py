"""The `mls` command. Sub-commands import what they need inside, so that `mls --help` is quick."""

from __future__ import annotations

import os
import sys

import typer

from mls.errors import EXIT_INTERRUPTED, EXIT_MISTAKE, Stopped, UserError
from mls.tools import (
    bench,
    box,
    config,
    data,
    demo,
    doctor,
    eval,
    export,
    jobs,
    neighbours,
    pretrain,
    report,
    results,
    scenes,
    submit,
)

app = typer.Typer(
    name="mls",
    help="Self-supervised pretraining on scene images with multi-label pseudo-targets.\n\n"
    "Start with `mls demo`: everything on embedded data, in minutes, on a laptop.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = {
    "demo": demo.demo,
    "pretrain": pretrain.pretrain,
    "config": config.show,
    "report": report.report,
    "results": results.results,
    "neighbours": neighbours.neighbours,
    "leakcheck": neighbours.leakcheck,
    "jobs": jobs.jobs,
    "cancel": jobs.cancel,
    "export": export.export,
    "verify-export": export.verify_export,
    "doctor": doctor.doctor,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
app.add_typer(scenes.app, name="scenes")
app.add_typer(data.app, name="data")
app.add_typer(eval.app, name="eval")
app.add_typer(submit.app, name="submit")
app.add_typer(box.app, name="slurm")
app.add_typer(bench.app, name="bench")


def main() -> None:
    try:
        try:
            app()  # exits by itself, Ctrl-C included, unless one of our errors ends it
        finally:
            sys.stdout.flush()  # a reader that is gone is met here, not while Python shuts down
    except Stopped as stopped:
        if int(os.environ.get("RANK", 0)) == 0 and str(stopped):
            print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
    except UserError as mistake:
        rank = int(os.environ.get("RANK", 0))  # several processes may make the same mistake: say whose it is
        print(f"{f'[rank {rank}] ' if rank else ''}error: {mistake}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # `mls config FILE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        sys.exit(1)  # as typer does where it meets the broken pipe first


if __name__ == "__main__":
    main()
