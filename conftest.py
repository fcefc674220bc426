"""The examples in docstrings are tests. Files that import a framework are left out where it is not installed."""

from mls.frameworks.installed import missing

collect_ignore_glob = ["mls/eval/dense/*mmseg*.py"] if missing("mmseg") else []
