"""The Kubernetes engine as far as it can be told without a cluster; tests/e2e/kubernetes has a real one."""

import asyncio
import base64
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from balancer.contract.words import State
from balancer.errors import ConfigError
from balancer.operate.controller.wanted import Wanted
from balancer.operate.engines.addresses import AddressFlags
from balancer.operate.engines.engine import CannotStart
from balancer.operate.engines.kubernetes import engine, objects
from balancer.operate.engines.kubernetes.cluster import Cluster
from balancer.operate.engines.kubernetes.engine import KubernetesEngine
from balancer.operate.recipe.recipe import Recipe, recipe
from balancer.operate.state.service_folder import ServiceFolder
from balancer.spec.kubernetes import Kubernetes
from balancer.spec.service_file import parse
from tests.support.until import until


def pod(name: str, **labels: str) -> dict[str, object]:
    return {
        "metadata": {
            "name": name,
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"app.kubernetes.io/component": "replica", **labels},
        },
        "spec": {"nodeName": "h1"},
        "status": {"phase": "Running", "podIP": "10.0.0.1"},
    }


TWO_NODES = """\
name: x
service: {replicas: 2}
num_nodes: 2
x-groundserve: {kubernetes: {image: replica, balancer_image: balancer}}
run: python -m replica --model smollm2-135m
"""
LABELS = {objects.ID: "1", objects.VERSION: "1", objects.DIGEST: "d"}
OURS = pod("x-1", **LABELS)


def made_of(
    version: int, secret: str = "", kubernetes: str = "image: replica, balancer_image: balancer", more: str = ""
) -> Recipe:
    """A recipe; with a `secret`, if one is given."""
    text = f"name: x\nservice: {{replicas: 2}}\nx-groundserve: {{kubernetes: {{{kubernetes}}}}}\n{more}\n"
    secrets = {"HF_TOKEN": secret} if secret else {}
    return recipe(
        parse(f"{text}run: python -m replica --model smollm2-135m\n", source="x.yaml", secrets=secrets), version
    )


def kubectl(folder: Path, cases: str) -> None:
    """What it does, as the cases of sh, besides writing down what was typed."""
    program = f'#!/bin/sh\necho "$*" >>{folder}/typed\ncase "$*" in {cases}\nesac\n'
    (folder / "kubectl").write_text(program)
    (folder / "kubectl").chmod(0o755)


def typed(folder: Path) -> str:
    return (folder / "typed").read_text()


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KubernetesEngine:
    """An engine whose kubectl prints the file `pods`."""
    kubectl(tmp_path, f'*" get "*) cat {tmp_path}/pods;;')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(engine, "_LOOK", 0.05)
    folder = ServiceFolder(tmp_path / "state", "x")
    folder.path.mkdir(parents=True)
    made = KubernetesEngine(folder)
    made._cluster = Cluster("x", Kubernetes(image="replica", balancer_image="balancer"))
    return made


def test_garbage_ends_nothing_and_is_outlived(made: KubernetesEngine, tmp_path: Path) -> None:
    """What kubectl prints is no answer until it can be read."""

    async def run() -> None:
        listed = tmp_path / "pods"
        listed.write_text(json.dumps({"items": [OURS, pod("stranger", **{objects.ID: "2"})]}))
        assert [survivor.id for survivor in await made.found()] == [1]
        for garbage in ("", "[]", '{"items": [{}]}', json.dumps({"items": [OURS | {"status": None}]})):
            listed.write_text(garbage)
            await until(lambda: "unknown whether it runs" in made.running()[1].reason)
            listed.write_text(json.dumps({"items": [OURS]}))
            await until(lambda: not made.running()[1].reason)
        assert made.ended() == ()
        listed.write_text('{"items": []}')
        await until(lambda: not made.running())
        assert "removed by somebody else" in made.ended()[0].reason
        await made.close()

    asyncio.run(run())


def test_the_next_controller_knows_that_a_pod_fetches(made: KubernetesEngine, tmp_path: Path) -> None:
    """The log begins anew with it, and the pod's whole output comes in."""
    said = "fetching a/b: 12 GB of 140 GB"
    kubectl(tmp_path, f'*" get "*) cat {tmp_path}/pods;; *" logs "*) echo "replica: {said}"; exec sleep 60;;')

    async def run() -> None:
        (tmp_path / "pods").write_text(json.dumps({"items": [OURS]}))
        await made.found()
        listing = await until(lambda: (one := made.running()[1]).reason and one)
        assert (listing.state, listing.reason) == (State.FETCHING, said)
        await made.close()

    asyncio.run(run())


def test_a_replica_on_two_nodes_has_both_pods_or_none(made: KubernetesEngine, tmp_path: Path) -> None:
    """It runs where both do; when one of them ends, the other is removed."""
    labels = {objects.VERSION: "1", objects.DIGEST: "d", objects.NODES: "2"}
    first, half = (pod(f"x-{id}", **labels, **{objects.ID: id, objects.RANK: "0"}) for id in "12")
    part = pod("x-1-part1", **labels, **{objects.ID: "1", objects.RANK: "1", "app.kubernetes.io/component": "part"})
    part["spec"] = {"nodeName": "h2"}

    def typed() -> str:
        return (tmp_path / "typed").read_text()

    async def run() -> None:
        listed = tmp_path / "pods"
        listed.write_text(json.dumps({"items": [part, first, half]}))
        assert [survivor.id for survivor in await made.found()] == [1]
        assert "delete pod x-2 " in typed()
        listing = made.running()[1]
        assert (listing.node, listing.endpoint) == ("h1,h2", "http://10.0.0.1:8000")
        conditions = [{"type": "Ready", "status": "False"}, {"type": "ContainersReady", "status": "True"}]
        cut_off = {"phase": "Running", "podIP": "10.0.0.2", "conditions": conditions}
        listed.write_text(json.dumps({"items": [part | {"status": cut_off}, first]}))
        await until(lambda: made.lost([]) == {1: "h2 does not answer its cluster"})
        listed.write_text(json.dumps({"items": [part | {"status": {"phase": "Pending"}}, first]}))
        await until(lambda: made.running()[1].state is State.PROVISIONING)
        ended = {"exitCode": 3, "message": "no such device\n"}
        over = {"phase": "Failed", "containerStatuses": [{"state": {"terminated": ended}}]}
        listed.write_text(json.dumps({"items": [part | {"status": over}, first]}))
        await until(lambda: "delete pod x-1-part1 --ignore-not-found --wait=false --force" in typed())
        await until(lambda: "delete pod x-1 --ignore-not-found --wait=false --grace-period=1" in typed())
        assert made.running()[1].state is State.SHUTTING_DOWN
        assert made.ended() == (), "its first pod still has its GPUs"
        listed.write_text('{"items": []}')
        await until(lambda: not made.running())
        (end,) = made.ended()
        assert "no such device" in end.reason
        assert not end.is_blameless
        await made.close()

    asyncio.run(run())


def test_two_replicas_do_not_wait_for_each_others_nodes(made: KubernetesEngine, tmp_path: Path) -> None:
    """Each has one node and lacks another: the second gives its own back, and takes none while the first waits."""

    def parts(id: str, *, is_placed: bool = False) -> list[dict[str, object]]:
        labels = {objects.ID: id, objects.VERSION: "1", objects.DIGEST: "d", objects.NODES: "2"}
        first = pod(f"x-{id}", **labels, **{objects.RANK: "0"})
        part = pod(f"x-{id}-part1", **labels, **{objects.RANK: "1", "app.kubernetes.io/component": "part"})
        if not is_placed:
            unplaced = {"type": "PodScheduled", "status": "False", "message": "2 Insufficient nvidia.com/gpu"}
            part |= {"spec": {}, "status": {"phase": "Pending", "conditions": [unplaced]}}
        return [first, part]

    async def run() -> None:
        listed = tmp_path / "pods"
        listed.write_text(json.dumps({"items": parts("1") + parts("2")}))
        assert [survivor.id for survivor in await made.found()] == [1, 2]
        await until(lambda: "delete pod x-2 x-2-part1 " in (tmp_path / "typed").read_text())
        listed.write_text(json.dumps({"items": parts("1")}))
        await until(lambda: 2 not in made.running())
        (end,) = made.ended()
        assert (end.id, end.waits_for_gpu) == (2, True)
        assert "to replica 1" in end.reason
        await made.start(2, recipe(parse(TWO_NODES, source="x.yaml")))
        assert [again.waits_for_gpu for again in made.ended()] == [True]
        assert 2 not in made.running()
        assert "create" not in (tmp_path / "typed").read_text()
        await made.close()

    asyncio.run(run())


def test_a_pod_that_was_told_to_end_takes_nothing_new(made: KubernetesEngine, tmp_path: Path) -> None:
    """Also where an earlier controller looked after it: it counts, until it is gone."""
    told = {"deletionTimestamp": "2999-01-01T00:00:00Z"}
    leaving = OURS | {"metadata": {**OURS["metadata"], **told}}  # type: ignore[dict-item]
    (tmp_path / "pods").write_text(json.dumps({"items": [leaving]}))

    async def run() -> None:
        (survivor,) = await made.found()
        assert survivor.listing.state is State.SHUTTING_DOWN
        assert survivor.listing.ends_in_seconds is not None
        await made.close()

    asyncio.run(run())


def test_in_a_pod_kubectl_is_left_to_find_its_cluster(
    made: KubernetesEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --request-timeout it takes its settings for somebody's own, and asks localhost:8080."""
    (tmp_path / "pods").write_text('{"items": []}')
    asyncio.run(made._here.pods())
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    asyncio.run(made._here.pods())
    outside, inside = (tmp_path / "typed").read_text().splitlines()
    assert "--request-timeout=10s" in outside
    assert "--request-timeout" not in inside


def test_a_stop_ends_when_its_node_is_called_dead_late(
    made: KubernetesEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its grace is over, that is. Until the stop returns, no update goes on."""
    for name in ("_MARGIN", "_AGAIN"):
        monkeypatch.setattr(engine, name, 0.1)
    told = pod("x-1", **LABELS)
    told["metadata"] |= {"deletionTimestamp": "2026-01-01T00:00:20Z"}  # type: ignore[operator]
    conditions = [{"type": "Ready", "status": "False"}, {"type": "ContainersReady", "status": "True"}]
    cut_off = told | {"status": {"phase": "Running", "podIP": "10.0.0.1", "conditions": conditions}}

    async def run() -> None:
        listed = tmp_path / "pods"
        listed.write_text(json.dumps({"items": [OURS]}))
        await made.found()
        stopping = asyncio.create_task(made.stop(1, 0.1))
        listed.write_text(json.dumps({"items": [told]}))
        await until(lambda: "delete pod x-1 --ignore-not-found --wait=false --grace-period=1" in typed(tmp_path))
        await asyncio.sleep(0.5)
        assert "--force" not in typed(tmp_path), "its processes may still have its GPUs"
        listed.write_text(json.dumps({"items": [cut_off]}))
        await until(lambda: "delete pod x-1 --ignore-not-found --wait=false --force" in typed(tmp_path))
        listed.write_text('{"items": []}')
        await asyncio.wait_for(stopping, 5)
        await made.close()

    asyncio.run(run())


def that_is_created(tmp_path: Path, then: str) -> Recipe:
    """A recipe of which `kubectl create` makes a pod, and does `then`. Nothing is listed while there is a `silent`."""
    ours = made_of(1)
    (tmp_path / "made").write_text(json.dumps({"items": [pod("x-1", **LABELS | {objects.DIGEST: ours.digest})]}))
    (tmp_path / "pods").write_text('{"items": []}')
    kubectl(
        tmp_path,
        f'*" get configmap"*) printf uid;;\n'
        f'*" create "*) cp {tmp_path}/made {tmp_path}/pods; {then};;\n'
        f'*" get "*) [ -e {tmp_path}/silent ] && exit 1; cat {tmp_path}/pods;;',
    )
    return ours


def test_a_pod_whose_creation_got_no_answer_is_removed(made: KubernetesEngine, tmp_path: Path) -> None:
    ours = that_is_created(tmp_path, f"touch {tmp_path}/silent; exit 1")

    async def run() -> None:
        await made.found()
        with pytest.raises(CannotStart):
            await made.start(1, ours)
        assert "delete pod" not in typed(tmp_path)
        (tmp_path / "silent").unlink()
        await until(lambda: "delete pod x-1 --ignore-not-found --wait=false --grace-period=1" in typed(tmp_path))
        await made.close()

    asyncio.run(run())


def test_a_pod_that_is_being_created_is_no_stray(made: KubernetesEngine, tmp_path: Path) -> None:
    ours = that_is_created(tmp_path, "sleep 0.5")

    async def run() -> None:
        await made.found()
        await made.start(1, ours)
        assert made.running().keys() == {1}
        assert "delete pod" not in typed(tmp_path)
        await made.close()

    asyncio.run(run())


def test_each_version_has_its_own_secrets(made: KubernetesEngine, tmp_path: Path) -> None:
    """A pod of the old one may start, or start again, while the new one comes; what no pod needs is removed."""
    old, new = (made_of(n, f"the {n}st") for n in (1, 2))
    kubectl(
        tmp_path,
        '*" get configmap"*) printf uid;;\n'
        f'*" apply "*|*" create "*) cat >>{tmp_path}/given; echo >>{tmp_path}/given;;\n'
        f'*" get "*) cat {tmp_path}/pods;;',
    )

    def pods(**digests: str) -> None:
        items = [pod(f"x-{id[2:]}", **LABELS | {objects.ID: id[2:], objects.DIGEST: d}) for id, d in digests.items()]
        (tmp_path / "pods").write_text(json.dumps({"items": items}))

    async def run() -> None:
        pods()
        await made.found()
        pods(id3=new.digest, id1=old.digest)
        await made.start(3, new)
        await made.start(1, old)
        given = [one for line in (tmp_path / "given").read_text().splitlines() for one in json.loads(line)["items"]]
        secrets = {one["metadata"]["name"]: one for one in given if one["kind"] == "Secret"}
        for number, version in ((3, new), (1, old)):
            name = f"x-secrets-{version.digest}"
            created = next(one for one in given if one["metadata"]["name"] == f"x-{number}")
            assert f'"secretKeyRef": {{"name": "{name}"' in json.dumps(created)
            value = base64.b64decode(secrets[name]["data"]["HF_TOKEN"]).decode()
            assert value == f"the {version.version}st"
            assert secrets[name]["metadata"]["ownerReferences"][0]["uid"] == "uid"
        pods(id3=new.digest)
        kept = f"groundserve.digest,groundserve.digest notin ({new.digest})"
        await until(lambda: f"delete secret -l {objects.everything_of('x')},{kept} " in typed(tmp_path))
        await made.close()

    asyncio.run(run())


def test_a_secret_whose_removal_got_no_answer_is_made_again(made: KubernetesEngine, tmp_path: Path) -> None:
    """It may be gone, and its pod would wait for it for ever. That is tried again, and says nothing of what runs."""
    old, other = made_of(1, "secret"), made_of(2)
    kubectl(
        tmp_path,
        '*" get configmap"*) printf uid;;\n'
        f'*" get "*) cat {tmp_path}/pods;;\n'
        f'*" delete secret "*) echo >>{tmp_path}/removals; exit 1;;',
    )
    first, second = (
        pod(f"x-{id}", **LABELS | {objects.ID: id, objects.DIGEST: one.digest})
        for id, one in (("1", old), ("2", other))
    )

    def removals() -> int:
        return len((tmp_path / "removals").read_text())

    async def run() -> None:
        listed = tmp_path / "pods"
        listed.write_text(json.dumps({"items": [first, second]}))
        (tmp_path / "removals").touch()
        await made.found()
        await until(lambda: len(made._following) == 2)
        await made.start(1, old)
        assert typed(tmp_path).count(" apply ") == 1
        listed.write_text(json.dumps({"items": [second]}))
        await until(lambda: made.running().keys() == {2})
        before = removals()
        await until(lambda: removals() > before + 2)
        assert made.running()[2].reason == ""
        listed.write_text(json.dumps({"items": [first, second]}))
        await made.start(1, old)
        assert typed(tmp_path).count(" apply ") == 2
        await made.close()

    asyncio.run(run())


def test_without_secrets_there_are_none_to_remove(made: KubernetesEngine, tmp_path: Path) -> None:
    """At first there may be some that an earlier controller left; then there is the Secret of the old version."""
    old, new = made_of(1, "secret"), made_of(2)
    kubectl(tmp_path, f'*" get configmap"*) printf uid;;\n*" get "*) cat {tmp_path}/pods;;')

    def asked(what: str) -> int:
        return typed(tmp_path).count(what)

    async def there(*recipes: Recipe) -> None:
        """Returns when these have a pod, and the engine has looked at them."""
        items = [
            pod(f"x-{one.version}", **LABELS | {objects.ID: f"{one.version}", objects.DIGEST: one.digest})
            for one in recipes
        ]
        (tmp_path / "pods").write_text(json.dumps({"items": items}))
        for one in recipes:
            if one.version not in made.running():
                await made.start(one.version, one)
        await until(lambda: made.running().keys() == {one.version for one in recipes})
        looks = asked(" get pods ")
        await until(lambda: asked(" get pods ") > looks + 2)

    async def run() -> None:
        (tmp_path / "pods").write_text('{"items": []}')
        await made.found()
        await until(lambda: asked(" delete secret ") == 1)
        await there(old, new)
        assert asked(" delete secret ") == 1
        await there(new)
        assert asked(" delete secret ") == 2
        await there()
        assert asked(" delete secret ") == 2
        await made.close()

    asyncio.run(run())


def test_balancers_of_another_image_are_replaced(
    made: KubernetesEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubernetes does, told what stands there from now on; a budget for several is removed with the second one."""
    monkeypatch.setattr(Cluster, "check", lambda _: (1, 32))
    kubectl(tmp_path, f'*" apply "*) cat >{tmp_path}/given;;')

    async def run() -> None:
        first = made_of(1)
        made.prepare(first, AddressFlags(is_open=True))
        balancer = made.balancer(first)
        await balancer.keep_up()
        await balancer.renew(made_of(2, kubernetes="image: replica, balancer_image: newer, balancers: 1"))
        given = json.loads((tmp_path / "given").read_text())["items"]
        (deployment,) = (one for one in given if one["kind"] == "Deployment")
        assert deployment["spec"]["replicas"] == 1
        assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == "newer"
        assert "delete poddisruptionbudget x-balancer " in typed(tmp_path)
        await balancer.leave()

    asyncio.run(run())


@pytest.mark.parametrize(
    "change",
    [
        {"kubernetes": "image: newer, balancer_image: balancer"},
        {"kubernetes": "image: replica, balancer_image: balancer, node_selector: {pool: b}"},
        {"kubernetes": "image: replica, balancer_image: balancer, models: {claim: models}"},
        {"kubernetes": "image: replica, balancer_image: balancer, shared_memory: 32Gi"},
        {"more": "resources: {memory: 64}"},
        {"more": "resources: {cpus: 8}"},
    ],
)
def test_what_goes_into_a_pod_makes_it_another(made: KubernetesEngine, change: dict[str, str]) -> None:
    """An update to that replaces the replicas, and so does the next controller with that file."""
    old, new = made.fit(made_of(1))[0], made.fit(made_of(2, **change))[0]
    assert not new.starts_like(old)
    assert new.digest != old.digest
    wanted = Wanted(old)
    assert wanted.update(new, "rolling") is None
    assert wanted.coming is new


def test_what_is_the_balancers_makes_no_other_pod(made: KubernetesEngine) -> None:
    old = made.fit(made_of(1))[0]
    new = made.fit(made_of(2, kubernetes="image: replica, balancer_image: newer, balancers: 3"))[0]
    assert new.starts_like(old)
    assert new.digest == old.digest


def test_a_key_that_no_file_has_yet_makes_no_other_pod(made: KubernetesEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version that knows one more starts nobody anew."""

    class Later(Kubernetes):
        newer: str | None = None

    ours = made_of(1, kubernetes="image: replica, balancer_image: balancer, models: {claim: models}")
    monkeypatch.setattr(objects, "_OF_A_POD", {*objects._OF_A_POD, "newer"})
    section = Later(**objects.of(ours.spec).model_dump())
    operation = ours.spec.operation.model_copy(update={"kubernetes": section})
    later = replace(ours, spec=replace(ours.spec, operation=operation))
    assert made.fit(later)[0].digest == made.fit(ours)[0].digest


def test_a_service_stays_in_its_namespace(made: KubernetesEngine) -> None:
    with pytest.raises(ConfigError, match="stays in its namespace"):
        made.fit(made_of(2, kubernetes="image: replica, balancer_image: balancer, namespace: other"))
