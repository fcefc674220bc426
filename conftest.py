"""The examples in docstrings are tests. Files that import a framework are left out where it is not installed."""

from mls.frameworks.installed import missing

# Importing a plug-in registers it: tests do that, and forget it afterwards.
collect_ignore_glob = ["examples/*.py", "tests/plugins/*.py", "tests/commands/*.py"]
if missing("mmseg"):
    collect_ignore_glob += ["mls/eval/dense/*mmseg*.py"]
if missing("detectron2"):
    collect_ignore_glob += ["mls/eval/dense/detectron2_backbone.py"]
