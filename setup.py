"""The package layout; metadata and tool settings stand in pyproject.toml.

The folder ``kernels/`` at the top is installed as ``gist_fast.kernels``: a top-level module called ``kernels`` would
collide with the published package of that name. Installed for development (``pip install -e .``), the same mapping is
made by a finder that setuptools generates.
"""

from setuptools import find_packages, setup

PACKAGES = find_packages(include=["gist_fast", "gist_fast.*"])
KERNELS = ["gist_fast.kernels", *(f"gist_fast.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=PACKAGES + KERNELS,
    package_dir={"gist_fast": "gist_fast", "gist_fast.kernels": "kernels"},
    package_data={"gist_fast.report": ["*.j2"]},
)
