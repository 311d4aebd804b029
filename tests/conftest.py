"""What the tests take from whoever runs them, and what not."""

import signal


def pytest_configure() -> None:
    """A signal that was ignored when we started (nohup, a shell's &) would stay so in the programs under test."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
