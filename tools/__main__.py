"""`python -m mls.tools` is the `mls` command; torchrun wants a module: `torchrun -m mls.tools pretrain ...`."""

from mls.tools.cli import main

main()
