"""The `mls` command. Sub-commands import what they need inside, so that `mls --help` is quick."""

from __future__ import annotations

import codecs
import functools
import inspect
import io
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

import mls
from mls import plugins
from mls.errors import EXIT_INTERRUPTED, EXIT_MISTAKE, Stopped, UserError, of_the_machine
from mls.signals import end_with_data_workers
from mls.tools import (
    bench,
    box,
    config,
    data,
    demo,
    doctor,
    embed,
    eval,
    export,
    jobs,
    labels,
    maps,
    neighbours,
    predict,
    pretrain,
    regions,
    replay,
    report,
    results,
    runs,
    scenes,
    submit,
    verify_resume,
    worth,
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
    "runs": runs.runs,
    "report": report.report,
    "replay": replay.replay,
    "results": results.results,
    "embed": embed.embed,
    "maps": maps.maps,
    "predict": predict.predict,
    "worth": worth.worth,
    "neighbours": neighbours.neighbours,
    "regions": regions.regions,
    "leakcheck": neighbours.leakcheck,
    "jobs": jobs.jobs,
    "cancel": jobs.cancel,
    "export": export.export,
    "verify-export": export.verify_export,
    "verify-resume": verify_resume.verify_resume,
    "doctor": doctor.doctor,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
app.add_typer(scenes.app, name="scenes")
app.add_typer(data.app, name="data")
app.add_typer(eval.app, name="eval")
app.add_typer(labels.app, name="labels")
app.add_typer(submit.app, name="submit")
app.add_typer(box.app, name="slurm")
app.add_typer(bench.app, name="bench")

WITHOUT_PLUGINS = ("runs", "jobs", "cancel", "scenes", "slurm")  # commands that look nothing up by name
PLUGINS = "A file or module of losses, methods, data sets, backbones or export targets. May be repeated."


def with_plugins(command: Callable[..., None]) -> Callable[..., None]:
    """The command with `--import`, which it knows nothing of."""

    @functools.wraps(command)
    def importing(plugin_names: list[str] | None = None, **arguments: Any) -> None:
        plugins.load(plugin_names or [])
        command(**arguments)

    option = typer.Option("--import", metavar="FILE|MODULE", help=PLUGINS)
    annotation = Annotated[list[str] | None, option]
    signature = inspect.signature(command, eval_str=True)
    added = inspect.Parameter("plugin_names", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
    parameters = [*signature.parameters.values(), added]
    importing.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
    importing.__annotations__ = {**command.__annotations__, "plugin_names": annotation}
    return importing


def add_import_option(group: typer.Typer) -> None:
    for command in group.registered_commands:
        if command.name not in WITHOUT_PLUGINS and command.callback is not None:
            command.callback = with_plugins(command.callback)
    for below in group.registered_groups:
        if below.name not in WITHOUT_PLUGINS and below.typer_instance is not None:
            add_import_option(below.typer_instance)


add_import_option(app)


@app.callback(invoke_without_command=True)
def version(
    shown: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if shown:
        print(f"mls {mls.__version__}")


# What tables and sentences hold beside ASCII, for terminals that do not know it.
PLAIN = {"…": ".", "–": "-", "—": "-", "×": "x", "±": "+-", "·": "*", "→": "->", "²": "2", "λ": "lambda"}


def plainer(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(PLAIN.get(one, "?") for one in error.object[error.start : error.end]), error.end


def print_in_any_encoding() -> None:
    codecs.register_error("plainer", plainer)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "backslashreplace"):
            stream.reconfigure(errors="plainer")


def main() -> None:
    print_in_any_encoding()
    try:
        _call()
    except SystemExit as end:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
        # Of several processes one may abort while its native threads are torn down (seen with gloo and torch 2.14, two
        # of forty-four runs), and its launcher would call the finished run failed. All is written and flushed by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


def _call() -> None:
    try:
        try:
            app()  # exits by itself, Ctrl-C included, unless one of our errors ends it
        finally:
            sys.stdout.flush()  # a reader that is gone is met here, not while Python shuts down
    except BrokenPipeError:  # `mls config FILE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        sys.exit(1)  # as typer does where it meets the broken pipe first
    except Stopped as stopped:
        if int(os.environ.get("RANK", 0)) == 0 and str(stopped):
            print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
    except UserError as mistake:
        _tell(mistake)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        if (mistake := of_the_machine(error)) is None:
            raise
        _tell(mistake)


def _tell(mistake: UserError) -> None:
    rank = int(os.environ.get("RANK", 0))  # several processes may make the same mistake: say whose it is
    print(f"{f'[rank {rank}] ' if rank else ''}error: {mistake}", file=sys.stderr)
    end_with_data_workers()
    sys.exit(EXIT_MISTAKE)


if __name__ == "__main__":
    main()
