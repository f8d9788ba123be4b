"""Maps the root folders to packages; all other metadata is in pyproject.toml.

The folders have no `__init__.py` on purpose (docs/decisions.md, Layout and imports), so setuptools does not find
them by itself.
"""

from pathlib import Path

from setuptools import setup

ROOT_FOLDERS = ("kernels", "data", "trainer", "bench")


def subpackages(folder: str) -> list[str]:
    """Return the folder and every folder below it that holds Python files, as dotted names."""
    found = {path.parent for path in Path(folder).rglob("*.py")} | {Path(folder)}
    return sorted(".".join(path.parts) for path in found)


packages = subpackages("safelight")
package_dir = {"safelight": "safelight"}
for root_folder in ROOT_FOLDERS:
    for name in subpackages(root_folder):
        packages.append(f"safelight.{name}")
        package_dir[f"safelight.{name}"] = name.replace(".", "/")

setup(packages=packages, package_dir=package_dir)
