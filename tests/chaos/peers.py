"""The balancers that play the same faults: each as tests/bench/peers.py starts it, configured with care for this use.

Care means, wherever the program offers it: another replica for a request that failed before its answer began, checks of
each replica's /ready, a replica that fails left out for a moment, and the time-outs of tests/chaos/stage.py, in whole
seconds where there are no others. None of them queues requests here, as groundserve does.
"""

from collections.abc import Callable
from functools import partial

from tests.bench import peers
from tests.bench.peers import Launch, Place
from tests.chaos.stage import SETTINGS

CONNECT, FIRST_BYTE = SETTINGS["connect_timeout"], SETTINGS["first_byte_timeout"]
CHECK, PATIENCE = SETTINGS["ready_interval"], SETTINGS["ready_timeout"]
LONGEST = 5  # seconds for a whole answer, where a program has no time-out for silence; undisturbed, one takes 2 at most


def nginx(place: Place) -> Launch:
    """It checks no replica by itself. `non_idempotent`: a POST, too, is sent again."""
    return peers.nginx(
        place,
        each="max_fails=1 fail_timeout=1s",
        pool="keepalive_timeout 4s;",  # SGLang closes an idle connection after five
        passing=f"proxy_connect_timeout {CONNECT * 1000:.0f}ms; proxy_read_timeout {FIRST_BYTE:.0f}s; "
        "proxy_next_upstream error timeout http_502 http_503 http_504 non_idempotent; proxy_next_upstream_tries 3;",
    )


def envoy(place: Place) -> Launch:
    protocol = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    cluster = {
        "connect_timeout": f"{CONNECT}s",
        "health_checks": [
            {
                "timeout": f"{PATIENCE}s",
                "interval": f"{CHECK}s",
                "no_traffic_interval": f"{CHECK}s",
                "unhealthy_threshold": 2,
                "healthy_threshold": 1,
                "http_health_check": {"path": "/ready"},
            }
        ],
        "outlier_detection": {"interval": "0.5s", "base_ejection_time": "0.5s", "max_ejection_time": "1s"},
        "typed_extension_protocol_options": {
            protocol: {
                "@type": f"type.googleapis.com/{protocol}",
                "common_http_protocol_options": {"idle_timeout": "4s"},
                "explicit_http_config": {"http_protocol_options": {}},
            }
        },
    }
    route = {
        "idle_timeout": f"{4 * FIRST_BYTE}s",  # all attempts
        "retry_policy": {
            "retry_on": "connect-failure,refused-stream,reset,retriable-status-codes",
            "retriable_status_codes": [502, 503, 504],
            "num_retries": 2,
            "per_try_idle_timeout": f"{FIRST_BYTE}s",
            "retry_host_predicate": [
                {
                    "name": "envoy.retry_host_predicates.previous_hosts",
                    "typed_config": {
                        "@type": "type.googleapis.com/"
                        "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
                    },
                }
            ],
            "host_selection_retry_max_attempts": 5,
        },
    }
    return peers.envoy(place, cluster, route)


# Both retry by themselves. Their circuit breakers would leave a replica out for a minute.
ROUTERS = (
    *("--health-check-endpoint", "/ready", "--health-check-interval-secs", "1", "--health-check-timeout-secs", "1"),
    *("--health-failure-threshold", "2", "--health-success-threshold", "1"),
    *("--retry-max-retries", "3", "--retry-max-backoff-ms", "500", "--request-timeout-secs", str(LONGEST)),
    *("--cb-failure-threshold", "3", "--cb-success-threshold", "1"),
    *("--cb-timeout-duration-secs", "1", "--cb-window-duration-secs", "5"),
    *("--request-id-headers", "x-request-id"),
)

PEERS: dict[str, Callable[[Place], Launch]] = {
    "nginx": nginx,
    "envoy": envoy,
    "smg": partial(peers.smg, settings=peers.ONE_THREAD, more=ROUTERS),
    "vllm-router": partial(peers.vllm_router, settings=peers.ONE_THREAD, more=ROUTERS),
}
