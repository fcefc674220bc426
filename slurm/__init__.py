"""Launching on clusters. Imports `mls`, never `mls.eval`: a job calls a `module:function` with plain arguments, and
`tools/` puts the two together. docs/slurm.md is for users; the order of reading is order, job, meeting, submit."""
