"""The public name of the exact searches, `mls.matching`. They live in mls/core/matching.py."""

from mls.core.matching import Matcher, Matches, build, names

__all__ = ["Matcher", "Matches", "build", "names"]
