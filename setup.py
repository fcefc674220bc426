"""For tools that look for this file. All there is to say is in pyproject.toml; the rooms beside mls/ are parts of the
package by the links mls/eval, mls/slurm, mls/tools and mls/configs."""

from setuptools import setup

setup()
