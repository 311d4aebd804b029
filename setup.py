"""Compiles the modules through which every request goes, with mypyc, if GROUNDSERVE_COMPILE is 1.

pyproject.toml names them, and says everything else. mypy and the packages of balancer/requirements.lock have to be
installed: pip needs --no-build-isolation.
"""

import os
import tomllib
from pathlib import Path

from setuptools import setup

if os.environ.get("GROUNDSERVE_COMPILE") == "1":
    from mypyc.build import mypycify

    modules = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["groundserve"]["compiled"]
    setup(ext_modules=mypycify(modules, opt_level="3"))
else:
    setup()
