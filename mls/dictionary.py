"""The public name of the dictionary, `mls.dictionary`. It lives in mls/core/dictionary.py."""

from mls.core.dictionary import Dictionary, Rows

__all__ = ["Dictionary", "Rows"]
