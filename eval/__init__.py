"""Downstream evaluation of a backbone. Imports `mls`, never `mls.slurm`."""
