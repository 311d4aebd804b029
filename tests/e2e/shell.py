"""A bash that is typed into line by line, as a person does who follows a page of docs/."""

import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
_DONE = "-- done, with code "


def commands(page: str) -> list[list[str]]:
    """The commands of each ```bash block on a page of docs/; what is indented goes on with the line before."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    return [re.findall(r"^\S.*\n(?:\s+\S.*\n)*", block, re.MULTILINE) for block in blocks]


class Shell:
    """One bash, so that a variable set by one command is there for the next. Standard error goes to `errors`."""

    def __init__(self, folder: Path, environ: Mapping[str, str]) -> None:
        self.folder = folder
        self.errors = folder / "stderr"
        # All that was printed, on standard output and, by `errors`, on standard error.
        self.printed = ""
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                ["bash"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=folder,
                env=dict(environ),
            )

    def __call__(self, command: str, code: int = 0) -> str:
        """What the command prints to standard output; asserts its exit code."""
        assert self.process.stdin is not None
        self.process.stdin.write(f'{command}\necho "\n{_DONE}$?"\n')
        self.process.stdin.flush()
        lines = list(self._until_done())
        printed = "".join(lines[:-1]).removesuffix("\n")
        self.printed += printed
        assert lines[-1] == f"{_DONE}{code}\n", f"{command}{printed}\n{self.errors.read_text()}"
        return printed

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _until_done(self) -> Iterator[str]:
        assert self.process.stdout is not None
        while not (line := self.process.stdout.readline()).startswith(_DONE):
            assert line, f"bash ended:\n{self.errors.read_text()}"
            yield line
        yield line
