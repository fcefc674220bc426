"""The public name of the pretraining methods, `mls.methods`. They live in mls/core/methods."""

from mls.core.methods import Method, StepOutput, build, names

__all__ = ["Method", "StepOutput", "build", "names"]
