"""A service on a real Kubernetes, whose replicas are simulated: nothing is lost but what the design says."""

import json
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from threading import Thread

import httpx
import pytest

from tests.e2e.kubernetes.served import FLAGS, NAME, Served
from tests.lab.hosts import Host, Hosts
from tests.lab.kubernetes.control_plane import GPU, ControlPlane
from tests.operate.streaming import Streams, streaming
from tests.support.until import wait_until

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(900)]

# A simulated replica whose answers take 15 seconds.
LONG = "--tokens 300 --token-interval 0.05 --drain-grace 0.5"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}


def streams_at_all(stack: ExitStack, served: Served, clients: int = 2) -> list[Streams]:
    """Clients of each balancer, for as long as the stack is open."""
    return [stack.enter_context(streaming(url, clients, BODY)) for url in served.endpoints()]


def test_up_scale_and_down_under_streams(served: Served) -> None:
    served.up()
    rows = served.until_ready(2)
    assert {row["node"] for row in rows} <= {"h1", "h2"}
    assert len(served.endpoints()) == 2
    assert rows[0]["leased"].startswith("GPU 0 (L4, ")
    with ExitStack() as stack:
        clients = streams_at_all(stack, served)
        served("scale", NAME, "4")
        assert {row["node"] for row in served.until_ready(4)} == {"h1", "h2"}
        served("scale", NAME, "6")
        status = wait_until(
            served.status,
            within=120,
            fits=lambda s: sum("Insufficient" in row.get("reason", "") for row in s["replicas"]) == 2,
        )
        assert len([row for row in status["replicas"] if row["status"] == "READY"]) == 4
        served("scale", NAME, "2")
        served.until_ready(2)
        assert len(served.cluster.pods("replica")) == 2
    assert [one.failed for one in clients] == [[], []]
    assert "lab is down" in served("down", NAME)
    assert served.cluster.pods("replica") + served.cluster.pods("balancer") == []


def test_an_update_loses_no_stream(served: Served) -> None:
    served.up()
    served.until_ready(2)
    with ExitStack() as stack:
        clients = streams_at_all(stack, served)
        assert "is at version 2" in served("update", NAME, served.file(flags=f"{FLAGS} --served-model other"))
        assert {row["version"] for row in served.until_ready(2)} == {2}
    assert [one.failed for one in clients] == [[], []]


def test_streams_go_on_when_a_node_dies(served: Served, hosts: Hosts, cluster: ControlPlane) -> None:
    """Those of its replicas continue elsewhere; others take their place, which wait until it is back."""
    served.up(served.file(4))
    assert [row["node"] for row in served.until_ready(4)].count("h2") == 2
    balancers = {pod["spec"]["nodeName"]: pod["status"]["podIP"] for pod in cluster.pods("balancer")}
    with streaming(f"http://{balancers['h1']}:30001", 4, BODY) as client:
        hosts["h2"].power_off()
        wait_until(
            served.status,
            within=240,
            fits=lambda s: sum("Insufficient" in row.get("reason", "") for row in s["replicas"]) == 2,
        )
        assert {row["node"] for row in served.ready()} == {"h1"}
    assert client.failed == []
    hosts["h2"].power_on()
    cluster.join("h2")
    cluster.wait_for("h2")
    assert {row["node"] for row in served.until_ready(4)} == {"h1", "h2"}


def test_a_killed_controller_is_followed_by_the_next(served: Served) -> None:
    first = served.up()
    rows = served.until_ready(2)
    with ExitStack() as stack:
        clients = streams_at_all(stack, served)
        first.signal(signal.SIGKILL)
        first.wait()
        second = served.up()
        assert "found 2 of its replicas running" in second.text
        assert {row["name"] for row in served.until_ready(2)} == {row["name"] for row in rows}
    assert [one.failed for one in clients] == [[], []]


def uids(cluster: ControlPlane, name: str = "") -> set[str]:
    """Of the replicas' pods, or of the one of that name: another one with the same name has another uid."""
    pods = [pod["metadata"] for pod in cluster.pods("replica") + cluster.pods("part")]
    return {pod["uid"] for pod in pods if pod["name"] == name or not name}


def container_of(cluster: ControlPlane, pod: str) -> tuple[Host, str]:
    """The host that its replica runs on, and the container there."""
    pods = cluster.pods("replica") + cluster.pods("part")
    (found,) = (one for one in pods if one["metadata"]["name"] == pod)
    container = found["status"]["containerStatuses"][0]["containerID"].removeprefix("docker://")
    return cluster.host(found["spec"]["nodeName"]), container


def crash(cluster: ControlPlane, pod: str) -> None:
    """As if its program had crashed: PID 1 of a container hears no SIGKILL from within."""
    host, container = container_of(cluster, pod)
    host.run("docker", "kill", "--signal=KILL", container)


def test_a_silent_api_server_is_waited_out(served: Served, cluster: ControlPlane) -> None:
    """Streams go on, nothing is taken for gone, and what was asked for meanwhile is done when it is back."""
    served.up()
    before = {row["name"] for row in served.until_ready(2)}
    with ExitStack() as stack:
        clients = streams_at_all(stack, served)
        cluster.kill("kube-apiserver")
        try:
            status = wait_until(
                served.status,
                within=120,
                fits=lambda s: all("it is unknown whether it runs" in row.get("reason", "") for row in s["replicas"]),
            )
            assert {row["name"] for row in status["replicas"]} == before
            served("scale", NAME, "3")
        finally:
            cluster.start_api()
        assert before < {row["name"] for row in served.until_ready(3)}
    assert [one.failed for one in clients] == [[], []]


def test_a_pod_that_somebody_deletes_finishes_and_is_replaced(served: Served, cluster: ControlPlane) -> None:
    served.up()
    served.until_ready(2)
    with ExitStack() as stack:
        clients = streams_at_all(stack, served)
        (stays,) = uids(cluster) - (gone := uids(cluster, f"{NAME}-1"))
        cluster.kubectl("delete", "pod", f"{NAME}-1", "--wait=false")
        now = wait_until(lambda: uids(cluster), within=120, fits=lambda now: len(now) == 2 and not now & gone)
        assert stays in now
        served.until_ready(2)
    assert [one.failed for one in clients] == [[], []]


def test_a_replica_that_crashes_is_replaced(served: Served, cluster: ControlPlane) -> None:
    """Its streams continue at the other one."""
    served.up()
    served.until_ready(2)
    with ExitStack() as stack:
        clients = streams_at_all(stack, served)
        before = uids(cluster)
        crash(cluster, f"{NAME}-1")
        wait_until(lambda: uids(cluster), within=120, fits=lambda now: len(now) == 2 and now != before)
        served.until_ready(2)
    assert [one.failed for one in clients] == [[], []]
    assert "killed by signal 9" in served("events", NAME)


def test_a_replica_on_two_nodes(served: Served, cluster: ControlPlane) -> None:
    """Both of its pods run, or neither: one that crashes takes the other along, and both are started anew."""
    served.up(served.file(replicas=1, nodes=2, flags=LONG.replace("300", "160")))
    (row,) = served.until_ready(1)
    assert sorted(row["node"].split(",")) == ["h1", "h2"]
    before = uids(cluster)
    assert len(before) == 2
    with ExitStack() as stack:
        clients = streams_at_all(stack, served)
        served("restart", NAME)
        now = wait_until(lambda: uids(cluster), within=120, fits=lambda now: len(now) == 2 and not now & before)
        served.until_ready(1)
    assert [one.failed for one in clients] == [[], []]
    (row,) = served.ready()
    crash(cluster, f"{NAME}-{row['id']}-part1")
    wait_until(lambda: uids(cluster), within=120, fits=lambda new: len(new) == 2 and not new & now)
    served.until_ready(1)
    assert "killed by signal 9" in served("events", NAME)
    drained = cluster.pods("part")[0]["spec"]["nodeName"]
    (balancer,) = [
        f"http://{pod['status']['podIP']}:30001"
        for pod in cluster.pods("balancer")
        if pod["spec"]["nodeName"] != drained
    ]
    with ExitStack() as stack:
        last = [stack.enter_context(one_answer(balancer)) for _ in range(4)]
        wait_until(lambda: [one.events for one in last], fits=all)
        try:
            cluster.kubectl("drain", drained, "--delete-emptydir-data", "--timeout=150s")
        finally:
            cluster.kubectl("uncordon", drained)
    assert [one.is_whole for one in last] == [True] * 4, "its part stayed until they had ended"
    served.until_ready(1)
    served("down", NAME)
    assert uids(cluster) == set()


def placed(cluster: ControlPlane) -> list[int]:
    """How many pods of each replica have a node."""
    counts: Counter[str] = Counter()
    for pod in cluster.pods("replica") + cluster.pods("part"):
        counts[pod["metadata"]["labels"]["groundserve.id"]] += "nodeName" in pod["spec"]
    return sorted(counts.values())


def test_a_node_dies_under_a_part(served: Served, hosts: Hosts, cluster: ControlPlane) -> None:
    """The whole replica is replaced. Of two that want both nodes one gets them, and the other has none meanwhile."""
    served.up(served.file(replicas=1, nodes=2, gpus=2))
    (row,) = served.until_ready(1)
    first, part = cluster.pods("replica") + cluster.pods("part")
    assert {first["spec"]["nodeName"], part["spec"]["nodeName"]} == {"h1", "h2"}
    for pod in (first, part):
        assert pod["spec"]["containers"][0]["resources"]["limits"] == {GPU: "2"}
    served("scale", NAME, "2")
    wait_until(
        served.status, within=120, fits=lambda s: [r for r in s["replicas"] if "Insufficient" in r.get("reason", "")]
    )
    assert placed(cluster) == [0, 2]
    before = uids(cluster, f"{NAME}-{row['id']}") | uids(cluster, f"{NAME}-{row['id']}-part1")
    host, container = container_of(cluster, f"{NAME}-{row['id']}")
    dead = part["spec"]["nodeName"]
    hosts[dead].power_off()
    wait_until(lambda: uids(cluster), within=240, fits=lambda now: len(now) == 4 and not now & before)
    left = host.run("docker", "ps", "--no-trunc", "--quiet")
    assert container not in left, "it would have its GPUs still"
    hosts[dead].power_on()
    cluster.join(dead)
    cluster.wait_for(dead)

    wait_until(served.ready, within=240, fits=lambda ready: len(ready) == 1)
    assert placed(cluster) in ([2], [0, 2])
    served("down", NAME)
    assert uids(cluster) == set()


def test_a_drained_node_cuts_no_stream(served: Served, cluster: ControlPlane) -> None:
    """Its replicas and its balancer finish; others take their places at once, where they are to be."""
    served.up(served.file(flags=LONG))
    row, _ = served.until_ready(2)
    balancers = {pod["spec"]["nodeName"]: f"http://{pod['status']['podIP']}:30001" for pod in cluster.pods("balancer")}
    drained = row["node"]
    (stays,) = (node for node in balancers if node != drained)
    before, gone = uids(cluster), uids(cluster, f"{NAME}-{row['id']}")
    with ExitStack() as stack:
        client = stack.enter_context(streaming(balancers[stays], 4, BODY))
        last = [stack.enter_context(one_answer(balancers[drained])) for _ in range(4)]
        wait_until(lambda: [one.events for one in last], fits=all)
        try:
            draining = stack.enter_context(ThreadPoolExecutor(1)).submit(
                cluster.kubectl, "drain", drained, "--delete-emptydir-data", "--timeout=150s"
            )
            new = wait_until(lambda: uids(cluster) - before, within=120)
            assert uids(cluster) & gone, "its successor does not wait until it has ended"
            draining.result()
            assert {row["node"] for row in served.until_ready(2)} == {stays}
            assert new <= uids(cluster)
        finally:
            cluster.kubectl("uncordon", drained)
    assert client.failed == []
    assert [one.is_whole for one in last] == [True] * 4


class Answer:
    """One answer, as it comes: how many events there were so far, and whether it ended as it should."""

    def __init__(self) -> None:
        self.events = 0
        self.is_whole = False


@contextmanager
def one_answer(endpoint: str) -> Iterator[Answer]:
    """Asks for it meanwhile; it is over, one way or the other, at the end of the block."""
    seen = Answer()

    def client() -> None:
        with httpx.stream("POST", f"{endpoint}/v1/chat/completions", json=BODY, timeout=60) as answer:
            for line in answer.iter_lines():
                seen.events += 1
                seen.is_whole |= line == "data: [DONE]"

    thread = Thread(target=client)
    thread.start()
    try:
        yield seen
    finally:
        thread.join()


def test_commands_in_the_controllers_pod(served: Served, cluster: ControlPlane) -> None:
    """What they change is known to the controller in the next pod; what would not last is refused."""
    served.up_in_the_cluster()
    assert served.in_the_pod("status").count("READY") == 3  # the service, and its replicas
    served.in_the_pod("scale", NAME, "3")
    served.balancers_know(3)
    assert "2 to 3: it was asked for" in served.in_the_pod("events", NAME)
    assert "leased" in served.in_the_pod("logs", NAME, "1")
    before = uids(cluster)
    for words in (["update", NAME, "/service/service.yaml"], ["rollback", NAME], ["down", NAME]):
        assert f"{NAME} is what its cluster was given" in served.in_the_pod(*words, code=1)
    assert "kubectl rollout restart deployment/lab-balancer" in served.in_the_pod("down", NAME, "--balancer", code=1)
    wait_until(lambda: cluster.kubectl("get", "configmap", f"{NAME}-state", "-o", "json"), fits=wants_three)
    (pod,) = (one["metadata"]["name"] for one in cluster.pods("controller"))
    cluster.kubectl("delete", "pod", pod)
    wait_until(
        lambda: [one["metadata"]["name"] for one in cluster.pods("controller")],
        within=120,
        fits=lambda names: len(names) == 1 and names != [pod],
    )
    cluster.kubectl("wait", "--for=condition=Available", f"deploy/{NAME}-controller", "--timeout=120s")
    wait_until(
        lambda: cluster.kubectl("logs", f"deploy/{NAME}-controller"),
        within=120,
        fits=lambda log: "found 3 of its replicas running" in log,
    )
    served.balancers_know(3)
    served.in_the_pod("scale", NAME, "2")
    served.balancers_know(2)
    assert uids(cluster) < before


def wants_three(config_map: str) -> bool:
    data = json.loads(config_map).get("data", {})
    return bool(data) and json.loads(data["desired.json"])["target"] == 3


def test_the_controller_in_the_cluster(served: Served, cluster: ControlPlane) -> None:
    """With the rights of its Role. The next one takes over what runs, and a changed file replaces it."""

    def digests() -> set[str]:
        return {pod["metadata"]["labels"]["groundserve.digest"] for pod in cluster.pods("replica")}

    def controllers_log() -> str:
        (pod, *others) = cluster.pods("controller") or [None]
        is_one = pod is not None and not others and pod["status"]["phase"] == "Running"
        return cluster.kubectl("logs", pod["metadata"]["name"]) if is_one and pod is not None else ""

    served.up_in_the_cluster()
    with ExitStack() as stack:
        clients = streams_at_all(stack, served)
        before, (digest,) = uids(cluster), digests()
        (first,) = (pod["metadata"]["name"] for pod in cluster.pods("controller"))
        cluster.kubectl("delete", "pod", first)
        wait_until(controllers_log, within=120, fits=lambda log: "found 2 of its replicas running" in log)
        served.balancers_know(2)
        assert uids(cluster) == before
        changed = served.manifests(served.file(flags=f"{FLAGS} --served-model other"))
        cluster.kubectl("apply", "-f", str(changed))
        wait_until(digests, within=300, fits=lambda found: found and digest not in found)
        served.balancers_know(2)
    assert [one.failed for one in clients] == [[], []]
    cluster.kubectl("delete", "-f", str(changed), "--wait=false")
    wait_until(lambda: cluster.pods("replica") + cluster.pods("controller"), within=180, fits=lambda pods: not pods)
