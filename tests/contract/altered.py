"""The project with a fact about replicas that nobody has thought of yet: one line more in each of three files."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.program import ROOT, Program
from tests.support.until import wait_until

EDITS = {
    "contract/listing.py": ('    resources: str = "-"', '    rack: str = "-"'),
    "operate/commands/table.py": (
        '    _Column("RESOURCES", lambda replica: replica.resources),',
        '    _Column("RACK", lambda replica: replica.rack),',
    ),
    "admin/page/page.js": ("const FACTS = [", "  ({ rack }) => rack,"),
}
CONTROLLER = """
import json
from balancer.contract.listing import ReplicaListing
from balancer.operate.controller.plan import Replica, Stage
from balancer.operate.controller.report import Report
from balancer.operate.controller.wanted import Wanted
from balancer.operate.recipe.recipe import recipe
from balancer.spec.service_file import parse

wanted = Wanted(recipe(parse("service: {replicas: 1}\\nrun: serve --port $GROUNDSERVE_PORT", source="x.yaml")))
report = Report("x", lambda: "http://127.0.0.1:1", "local")
report.note({1: ReplicaListing("x-1", "http://127.0.0.1:9", id=1, rack="r7")}, {1})
print(json.dumps(report.listing([Replica(1, 1, Stage.RUNNING)], wanted, 0.0).to_json()))
"""


class Altered:
    """A copy of the balancer's package with these lines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "balancer", folder / "balancer", ignore=shutil.ignore_patterns("__pycache__"))
        for name, (after, line) in EDITS.items():
            path = folder / "balancer" / name
            before, found, rest = path.read_text().partition(after)
            assert found, f"{name} has no line {after!r} any more"
            end_of_line, _, rest = rest.partition("\n")
            path.write_text(f"{before}{after}{end_of_line}\n{line}\n{rest}")

    def program(self, code: str, *arguments: str, **environ: str) -> Program:
        here = f"import sys; sys.path.insert(0, {str(self.folder)!r})\n"
        return Program("-c", here + code, *arguments, environ=environ)

    def printed(self, code: str, *arguments: str, **environ: str) -> str:
        with self.program(code, *arguments, **environ) as program:
            assert program.wait() == 0, program.tail()
            return program.text

    def told(self) -> dict[str, Any]:
        """What its controller tells of a replica that an engine runs in the rack r7."""
        return dict(json.loads(self.printed(CONTROLLER)))

    @contextlib.contextmanager
    def balancer(self) -> Iterator[str]:
        """Its balancer; where the admin port is."""
        ports = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
        main = "import runpy; runpy.run_module('balancer', run_name='__main__', alter_sys=True)"
        with self.program(main, *ports) as balancer:
            yield wait_until(lambda: balancer.check_alive() and balancer.said("admin on "), balancer.tail)
