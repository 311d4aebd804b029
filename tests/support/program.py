"""Programs that a test starts: `python -m ...` in its own process, with its output in files, and sure to be ended."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.until import until, wait_until

ROOT = Path(__file__).parents[2]
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def printed(
    *arguments: str, environ: Mapping[str, str], folder: Path = ROOT, code: int = 0, within: float = 60.0
) -> str:
    """What `python ARGUMENTS` prints, standard error last; asserts its exit status. These are all its variables."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environ,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=within,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def _die_with_the_test() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed test run leaves nothing behind


class Program:
    """A program that is started at once.

    Its standard output and standard error go to the file `log`, or to a temporary one; with `has_own_errors`, standard
    error goes to its own file beside it. `environ` is added to the test's own variables. The program inherits the
    descriptors in `pass_fds`.
    """

    def __init__(
        self,
        *arguments: str,
        name: str = "",
        log: Path | None = None,
        has_own_errors: bool = False,
        environ: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.name = name or " ".join(arguments[:2])
        self._folder = None if log else tempfile.mkdtemp(prefix="program-")
        self.log = log or Path(self._folder or "", "log")
        self.errors = self.log.with_name(f"{self.log.name}.errors") if has_own_errors else self.log
        self._arguments = arguments
        self._environ = {**os.environ, **(environ or {})}
        self._pass_fds = pass_fds
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as output, self.errors.open("ab") as errors:
            return subprocess.Popen(
                [sys.executable, *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                cwd=ROOT,
                env=self._environ,
                preexec_fn=_die_with_the_test,
                pass_fds=self._pass_fds,
            )

    def restart(self) -> None:
        """Starts the program again after it has ended; its output is appended."""
        assert self.process.poll() is not None
        self.process = self._start()

    # Its output

    @property
    def text(self) -> str:
        """Its standard output so far, with its standard error if both go to one file."""
        return self.log.read_text(errors="replace")

    def lines(self) -> list[str]:
        """All complete lines without their line ends; those of standard error last, if it has its own file."""
        texts = [file.read_text(errors="replace") for file in dict.fromkeys((self.log, self.errors))]
        return [line for text in texts for line in text[: text.rfind("\n") + 1].splitlines()]

    def said(self, start: str) -> str:
        """The rest of the first line that begins with `start`; empty while there is none."""
        return next((line.removeprefix(start) for line in self.lines() if line.startswith(start)), "")

    def until(self, text: str, within: float = 60.0) -> str:
        """Waits for a line with this text, and returns the first one."""

        def look() -> list[str]:
            return [line for line in self.lines() if text in line]

        return wait_until(look, lambda: f"{self.name} says {text!r}:\n{self.tail()}", within)[0]

    def tail(self, lines: int = 40) -> str:
        return "\n".join(line[:300] for line in self.lines()[-lines:])

    # Its process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def memory(self) -> int:
        """Its resident memory in bytes."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    @property
    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def check_alive(self) -> bool:
        """True, for use in a condition to wait for; if the program has ended, the test fails at once."""
        assert self.process.poll() is None, f"{self.name} ended with {self.process.returncode}:\n{self.tail()}"
        return True

    # Its end

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, within: float = 60.0) -> int:
        """Waits until it has ended, and returns its exit status, negative for a signal."""
        return self.process.wait(timeout=within)

    async def ended(self, within: float = 60.0) -> int:
        """The same while the test's event loop runs."""
        await until(lambda: self.process.poll() is not None, f"{self.name} has ended", within)
        return self.process.returncode

    def close(self) -> None:
        """Kills it if it still runs, and removes its temporary files."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=30)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class BalancerProgram(Program):
    """`python -m balancer` on free ports, in front of replicas at these URLs."""

    def __init__(
        self,
        replicas: Sequence[str],
        *flags: str,
        log: Path | None = None,
        has_own_errors: bool = False,
        pass_fds: Sequence[int] = (),
    ) -> None:
        listed = [word for url in replicas for word in ("--replica", url)]
        ports = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
        super().__init__(
            "-m", "balancer", *ports, *flags, *listed, log=log, has_own_errors=has_own_errors, pass_fds=pass_fds
        )

    @property
    def url(self) -> str:
        return self.said("listening on ")

    @property
    def admin_url(self) -> str:
        return self.said("admin on ")

    def is_listening(self) -> bool:
        return self.check_alive() and bool(self.admin_url)
