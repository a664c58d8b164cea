"""Build entry point. The metadata is in pyproject.toml; torch is never imported here.

The CUDA build will be driven from this file once ``csrc/`` exists: a ``build_ext`` that calls nvcc (the machine's, or
the one from PyPI, asked for through ``setup_requires``) on the torch-free sources and makes ``vitq_kernels._cuda``,
controlled by ``VITQ_BUILD_CUDA=auto|0|1``. There is nothing to compile yet, so no variable is read.
"""

from setuptools import setup

setup()
