"""SkyServe's own autoscaler behind standard input and output: run by the Python of its own environment, not ours.

The first line is the `service:` of a service file, as JSON. Each further one, {"now", "arrived", "decide", "replicas":
[{"id", "is_ready"}]}, tells of the requests since the last (their times; null: none are told) and is answered with
{"launch": count, "end": [ids], "interval": seconds until it wants to decide again}. Time is what the lines say.
"""

import json
import logging
import sys
import types
from dataclasses import dataclass

from sky.serve import autoscalers, serve_state
from sky.serve.service_spec import SkyServiceSpec


@dataclass
class Replica:
    """What its autoscaler looks at of a ReplicaInfo."""

    replica_id: int
    is_ready: bool
    version: int = 1
    is_terminal: bool = False
    cluster_name: str = ""

    @property
    def status(self) -> serve_state.ReplicaStatus:
        return serve_state.ReplicaStatus.READY if self.is_ready else serve_state.ReplicaStatus.STARTING

    @property
    def status_property(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(unrecoverable_failure=lambda: False)


def main() -> None:
    logging.disable(logging.CRITICAL)
    clock = types.SimpleNamespace(now=0.0)
    autoscalers.time = types.SimpleNamespace(time=lambda: clock.now)
    scaler = autoscalers.Autoscaler.from_spec(
        "bench", SkyServiceSpec.from_yaml_config(json.loads(sys.stdin.readline()))
    )
    for line in sys.stdin:
        told = json.loads(line)
        clock.now = told["now"]
        if told["arrived"] is not None:
            scaler.collect_request_information({"timestamps": told["arrived"]})
        launch, end = 0, []
        if told["decide"]:
            replicas = [Replica(one["id"], one["is_ready"]) for one in told["replicas"]]
            for decision in scaler.generate_scaling_decisions(replicas, [1]):
                if decision.operator is autoscalers.AutoscalerDecisionOperator.SCALE_UP:
                    launch += 1
                else:
                    end.append(decision.target)
        print(json.dumps({"launch": launch, "end": end, "interval": scaler.get_decision_interval()}), flush=True)


if __name__ == "__main__":
    main()
