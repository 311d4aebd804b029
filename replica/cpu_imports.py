"""What a plain CPU lacks, put in place on import, for SGLang's tools that load no plug-in: its load generator, say.

`make install` has each Python of .venv run `prepare`; SGLang's servers get the same from replica/plugin.py.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def prepare() -> None:
    """Imports nothing yet: most programs of a .venv need neither torch nor SGLang."""
    if any(isinstance(finder, _WithoutDatasets) for finder in sys.meta_path):
        return  # a folder of packages with two names is read twice
    sys.meta_path.insert(0, _BeforeTorchvision())
    sys.meta_path.append(_WithoutDatasets())


class _BeforeTorchvision(MetaPathFinder):
    """Declares torchvision's operators right before it is imported; where it comes from is for others to find."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "torchvision" and self in sys.meta_path:
            sys.meta_path.remove(self)
            from replica.plugin import declare_torchvision_ops

            declare_torchvision_ops()
        return None


class _WithoutDatasets(MetaPathFinder, Loader):
    """A stand-in for the package `datasets`, asked last; SGLang's load generator wants it for one workload."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        is_wanted = name == "datasets" and "sglang.benchmark.datasets" in sys.modules
        return ModuleSpec(name, self) if is_wanted else None

    def exec_module(self, module: ModuleType) -> None:
        def load_dataset(*_: object, **__: object) -> object:
            raise ImportError("this workload needs the package datasets: pip install datasets")

        module.__dict__["load_dataset"] = load_dataset
