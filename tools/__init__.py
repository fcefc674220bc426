"""The front door: the `mls` command, one small file per sub-command."""
