"""Launching on clusters. Imports `mls`, never `mls.eval`; it runs a `module:function` with plain arguments."""
