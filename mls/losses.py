"""The public name of the losses, `mls.losses`. They live in mls/core/losses."""

from mls.core.losses import Loss, at_least_fp32, build, info_nce, names, register, require

__all__ = ["Loss", "at_least_fp32", "build", "info_nce", "names", "register", "require"]
