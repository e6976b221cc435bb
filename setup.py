"""The packages of the distribution; its metadata is in pyproject.toml."""

from setuptools import setup

# Listed by hand: betaclip/kernels is a symlink, and the directory it points to must not become a package of its own.
setup(packages=["betaclip", "betaclip.data", "betaclip.evaluation", "betaclip.kernels", "betaclip.training"])
