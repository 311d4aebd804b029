"""Supplies what a plain CPU lacks to SGLang tools that load no plug-in, such as its load generator.

`make install` makes each Python of .venv run `prepare`; SGLang's servers get the same from replica/plugin.py.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def prepare() -> None:
    """Installs the import hooks. Imports nothing yet: most programs of a .venv need neither torch nor SGLang."""
    if any(isinstance(finder, _WithoutDatasets) for finder in sys.meta_path):
        return  # a site-packages folder with two names is processed twice
    sys.meta_path.insert(0, _BeforeTorchvision())
    sys.meta_path.append(_WithoutDatasets())


class _BeforeTorchvision(MetaPathFinder):
    """Declares torchvision's operators right before it is imported; other finders then locate it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "torchvision" and self in sys.meta_path:
            sys.meta_path.remove(self)
            from replica.plugin import declare_torchvision_ops

            declare_torchvision_ops()
        return None


class _WithoutDatasets(MetaPathFinder, Loader):
    """A stand-in for the package `datasets`, which SGLang's load generator needs for only one workload. Tried last."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        is_wanted = name == "datasets" and "sglang.benchmark.datasets" in sys.modules
        return ModuleSpec(name, self) if is_wanted else None

    def exec_module(self, module: ModuleType) -> None:
        def load_dataset(*_: object, **__: object) -> object:
            raise ImportError("this workload needs the package datasets: pip install datasets")

        module.__dict__["load_dataset"] = load_dataset
