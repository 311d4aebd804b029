"""prefix_aware as it was at an earlier commit, from git, so that it can be played beside today's."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from balancer.routing.policies import Policy

ROOT = Path(__file__).parents[2]
# What it consists of, in the order of its imports. A module that was not there yet is left out; everything else, the
# rest of the balancer and the simulator, is today's.
MODULES = ("prefix_index", "popularity", "prefix_aware")
IMPORTED = re.compile(rf"\bfrom balancer\.routing\.({'|'.join(MODULES)}) import")


@cache
def prefix_aware(commit: str) -> type[Policy]:
    """Its class. Raises ValueError if git does not know the commit, or it has no such policy."""
    for name in MODULES:
        show = ["git", "show", f"{commit}:balancer/routing/{name}.py"]
        shown = subprocess.run(show, cwd=ROOT, capture_output=True, text=True, check=False)
        if shown.returncode:
            if name == "popularity":
                continue  # it came later
            raise ValueError(f"{' '.join(show)}: {shown.stderr.strip()}")
        module = ModuleType(f"{name}_at_{commit}")
        sys.modules[module.__name__] = module
        text = IMPORTED.sub(rf"from \1_at_{commit} import", shown.stdout)
        exec(compile(text, module.__name__, "exec"), vars(module))
    policy: type[Policy] = vars(module)["PrefixAware"]
    policy.reads_prompts = True  # which the first versions did not say
    return policy
