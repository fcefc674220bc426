"""Runs `mls` commands for the tests, each in a process of its own that is forked from this one, which has imported what
nearly every command imports: that takes five seconds of a core, and a hundred tests would each pay them again.

It reads a request a line (a JSON object) and answers with an exit code. After the fork all is as in a process that a
user starts: standard streams, environment, folder and arguments; only the interpreter is not torn down at the end."""

import atexit
import json
import os
import sys
import traceback
from typing import Any

import sklearn.datasets  # noqa: F401 (the embedded scenes need it)
import torch.distributed.run

import mls.engine
import mls.eval.cells  # noqa: F401
import mls.tools.cli


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            become(request)
            os._exit(run(request["arguments"], request["processes"]))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def become(request: dict[str, Any]) -> None:
    for number, name in enumerate((os.devnull, request["out"], request["err"])):
        os.dup2(os.open(name, os.O_RDWR), number)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])


def run(arguments: list[str], processes: int) -> int:
    sys.argv = ["mls", *arguments]
    try:
        if processes == 1:
            mls.tools.cli.main()
        else:
            launch = ["--standalone", f"--nproc-per-node={processes}", "-m", "mls.tools"]
            torch.distributed.run.main([*launch, *arguments])
        code: Any = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


serve()
