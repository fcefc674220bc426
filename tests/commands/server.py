"""Runs `mls` commands and scripts for the tests, each in processes of its own that are forked from this one, which has
imported what nearly every command imports: that takes five seconds of a core at each of two hundred starts.

It reads a request a line (a JSON object) and answers with an exit code. After the fork all is as in a process that a
user starts: standard streams, environment, folder and arguments. Only the interpreter is not torn down at the end.
Several processes get the environment that torchrun gives, without its supervision: tests of a failing process start
torchrun itself."""

import atexit
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from typing import Any

import mls.engine
import mls.eval.cells  # noqa: F401
from mls.tools import cli


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        count = request["processes"]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(count)}
        places = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        children = [start(request, place if count > 1 else {}) for place in places]
        print(code_of(children), flush=True)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(request: dict[str, Any], place: dict[str, str]) -> int:
    child = os.fork()
    if child:
        return child
    for number, name in enumerate((os.devnull, request["out"], request["err"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_APPEND), number)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"] | place)
    os._exit(run(request["script"], request["arguments"]))


def run(script: str | None, arguments: list[str]) -> int:
    sys.argv = [script or "mls", *arguments]
    code: Any = 0
    try:
        runpy.run_path(script, run_name="__main__") if script else cli.main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


def code_of(children: list[int]) -> int:
    """The first that is not 0; the others do not outlive a process that fails."""
    first = 0
    while children:
        child, status = os.wait()
        children.remove(child)
        code = os.waitstatus_to_exitcode(status)
        if code and not first:
            first = code
            for other in children:
                os.kill(other, signal.SIGTERM)
    return first


if __name__ == "__main__":
    serve()
