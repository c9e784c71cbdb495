"""Builds the native CPU kernels; everything else is declared in pyproject.toml."""

from setuptools import setup

setup()
