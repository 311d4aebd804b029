"""A service that is meant to exist, made up."""

from dataclasses import replace

from balancer.operate.state.desired import Desired, Version


def version(number: int) -> Version:
    return Version(number, f"the file of {number}", "x.yaml", {"A": "1"}, ("TOKEN",))


def desired(**changed: object) -> Desired:
    made = Desired(
        engine="local",
        is_left=False,
        listen="127.0.0.1:1",
        admin="127.0.0.1:2",
        is_open=False,
        api_keys=None,
        admin_key=None,
        join=None,
        base="/",
        serving=2,
        target=3,
        before=3,
        coming=None,
        mode="rolling",
        versions=(version(1), version(2)),
    )
    return replace(made, **changed)  # type: ignore[arg-type]
