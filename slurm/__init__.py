"""Launching on clusters. Imports `mls`, never `mls.eval`: a job calls a `module:function` with plain arguments, and
`tools/` connects the two. docs/slurm.md is for users; read job_spec.py first, then job.py, rendezvous.py, submit.py."""
