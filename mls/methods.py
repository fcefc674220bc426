"""The public name of the pretraining methods, `mls.methods`. They live in mls/core/methods."""

from mls.core.methods import Method, StepOutput, build, find, names, register

__all__ = ["Method", "StepOutput", "build", "find", "names", "register"]
