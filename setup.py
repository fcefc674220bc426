"""Maps the four rooms of the tree to one installed name, `mls`. All metadata is in pyproject.toml."""

from setuptools import find_packages, setup

ROOMS = ("eval", "slurm", "tools", "configs")  # installed as mls.eval, mls.slurm, mls.tools, mls.configs

packages = ["mls"] + [f"mls.{name}" for name in find_packages("mls")]
package_dir = {"mls": "mls"}
for room in ROOMS:
    package_dir[f"mls.{room}"] = room
    packages += [f"mls.{room}"] + [f"mls.{room}.{name}" for name in find_packages(room)]

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={"mls.configs": ["**/*.yaml"], "mls.tools": ["*.html"], "mls.slurm": ["examples/*"]},
)
