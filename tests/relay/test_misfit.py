"""An answer that is no stream, where one was promised."""

from balancer.errors import ServeError
from balancer.relay.misfit import LARGEST, Misfit
from balancer.relay.request import Request


class Nothing:
    def write(self, data: bytes) -> None: ...

    def answered(self, keep: bool) -> None: ...


def test_no_more_of_it_is_kept_than_the_bound() -> None:
    """Whatever the sizes of its pieces."""

    def failed(_: ServeError) -> None: ...

    request = Request(b"POST", b"/v1/x", "1.1", 0.0)
    request.id = b"id"
    misfit = Misfit(Nothing(), request, 500, True, failed)
    for size in (LARGEST - 1, LARGEST, LARGEST):
        misfit.write(b"x" * size)
    assert len(misfit._body) == LARGEST
