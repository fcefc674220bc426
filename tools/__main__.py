"""`python -m mls.tools` is the `mls` command; torchrun wants a module: `torchrun -m mls.tools pretrain ...`."""

import sys

import mls

if getattr(mls, "__file__", None) is None:  # from beside a checkout called mls Python takes that folder for the package
    print(
        "error: the folder mls here hides the installed package: call this from another folder, or say `mls` for "
        "`python -m mls.tools` and `torchrun --no-python mls` for `torchrun -m mls.tools`",
        file=sys.stderr,
    )
    sys.exit(2)

from mls.tools.cli import main

main()
