"""What is wanted of which version, without a process."""

from dataclasses import replace
from typing import Any

import pytest

from balancer.contract.listing import ReplicaListing
from balancer.contract.status import ServiceRow, Snapshot
from balancer.contract.words import ServiceStatus, State, Status
from balancer.errors import ConfigError
from balancer.operate.controller.plan import Replica, Stage
from balancer.operate.controller.report import Report
from balancer.operate.controller.traffic import Traffic
from balancer.operate.controller.wanted import Load, UpdateResult, Wanted
from balancer.operate.engines.engine import Survivor
from balancer.operate.recipe.recipe import Recipe, recipe
from balancer.spec.service_file import parse


def made(version: int = 1, run: str = "serve $GROUNDSERVE_PORT", service: str = "replicas: 2", **more: Any) -> Recipe:
    text = f"service: {{{service}}}\nrun: {run}\n"
    return replace(recipe(parse(text, source="x.yaml"), version), **more)


def left(id: int, version: int, digest: str) -> Survivor:
    return Survivor(id, ReplicaListing(f"x-{id}", f"http://127.0.0.1:{id}", id=id, version=version), digest)


def ready(id: int, version: int = 1) -> Replica:
    return Replica(id, version, Stage.RUNNING, status=Status.READY, was_ready=True, is_proven=True)


AUTOSCALED = "replica_policy: {min_replicas: 0, max_replicas: 3, target_qps_per_replica: 1}"


def test_scaling_is_what_was_said() -> None:
    wanted = Wanted(made())
    assert wanted.counts([], Load(), 0.0) == ({1: 2}, None)
    wanted.scale(5)
    assert wanted.counts([], Load(), 0.0) == ({1: 5}, None)


@pytest.mark.parametrize(
    ("first", "target", "said"),
    [
        (made(service=AUTOSCALED), 2, "x scales with its load, 0 to 3: change its replica_policy"),
        (made(run="serve", service="ports: 80"), 2, "x listens on port 80 only: it can have one replica"),
        (made(fits=3), 4, "x with 4 replicas does not fit: there is room for 3"),
    ],
)
def test_a_number_that_cannot_be_is_refused(first: Recipe, target: int, said: str) -> None:
    wanted = Wanted(first)
    before = wanted.target
    with pytest.raises(ConfigError, match=said):
        wanted.scale(target)
    assert wanted.target == before


def test_a_number_from_before_that_nobody_can_have() -> None:
    """It was written down by a `scale` with some zeros too many."""
    assert Wanted(made(), target=10**9).target == 10_000


def test_the_load_decides_where_the_file_says_so() -> None:
    wanted = Wanted(made(service=AUTOSCALED))
    assert wanted.is_asleep
    assert wanted.counts([], Load(queued=1), 0.0) == ({1: 1}, None)
    assert not wanted.is_asleep


def test_an_update_replaces_one_by_one_and_is_then_what_serves() -> None:
    wanted = Wanted(made())
    wanted.update(made(2, "serve --better $GROUNDSERVE_PORT"), "rolling")
    assert wanted.newest.version == 2
    assert wanted.counts([ready(1), ready(2)], Load(), 0.0) == ({1: 2, 2: 1}, None)
    assert wanted.counts([ready(1), ready(2), ready(3, 2)], Load(), 0.0) == ({1: 1, 2: 1}, None)
    assert wanted.counts([ready(3, 2), ready(4, 2)], Load(), 0.0) == ({1: 0, 2: 2}, UpdateResult(2))
    assert (wanted.serving.version, wanted.coming) == (2, None)
    assert wanted.counts([ready(3, 2), ready(4, 2)], Load(), 0.0) == ({2: 2}, None)


def test_a_failed_update_leaves_the_old_version() -> None:
    wanted = Wanted(made())
    wanted.update(made(2, "serve --worse $GROUNDSERVE_PORT"), "rolling")
    lost = Replica(3, 2, Stage.GIVEN_UP, reason="no such flag")
    assert wanted.counts([ready(1), ready(2), lost], Load(), 0.0) == (
        {1: 2, 2: 0},
        UpdateResult(2, "no such flag", failed=lost.id),
    )
    assert (wanted.serving.version, wanted.coming) == (1, None)


def test_blue_green_hides_the_new_version() -> None:
    """Blue-green hides the new version until it is ready and the balancer has seen that."""
    wanted = Wanted(made())
    wanted.update(made(2, "serve --better $GROUNDSERVE_PORT"), "blue_green")
    old = [ready(1), ready(2)]
    assert wanted.hidden == {2}
    assert wanted.counts(old, Load(), 0.0) == ({1: 2, 2: 2}, None)
    both = [*old, ready(3, 2), ready(4, 2)]
    assert wanted.counts(both, Load(), 0.0) == ({1: 2, 2: 2}, None)
    assert wanted.hidden == frozenset()
    starting = [*old, *(replace(replica, status=Status.STARTING) for replica in both[2:])]
    assert wanted.counts(starting, Load(), 0.0) == ({1: 2, 2: 2}, None)
    assert wanted.counts(both, Load(), 0.0) == ({1: 0, 2: 2}, None)
    assert wanted.counts(both[2:], Load(), 0.0) == ({1: 0, 2: 2}, UpdateResult(2))


def test_what_changes_only_the_balancer_touches_no_replica() -> None:
    wanted = Wanted(made())
    wanted.update(made(2, service="replicas: 3, load_balancing_policy: least_load"), "rolling")
    assert (wanted.serving.version, wanted.coming, wanted.target) == (2, None, 3)


@pytest.mark.parametrize(
    ("first", "second", "mode", "said"),
    [
        (made(), made(2, "b $GROUNDSERVE_PORT", fits=3), "blue_green", "wants both versions side by side, 4 replicas"),
        (
            made(run="serve", service="ports: 80"),
            made(2, "better", service="ports: 80"),
            "blue_green",
            "both versions would listen on port 80",
        ),
        (
            made(),
            made(2, "b $GROUNDSERVE_PORT", service="replicas: 2, readiness_probe: /up"),
            "rolling",
            "replicas and readiness_probe change together: use --mode blue_green",
        ),
        *(
            (
                made(),
                made(2, "b $GROUNDSERVE_PORT", service="replicas: 2, readiness_probe: /up", fits=2),
                mode,
                "change together, and blue_green wants .* room for 2: update with the new readiness_probe alone",
            )
            for mode in ("rolling", "blue_green")
        ),
        (
            made(run="serve", service="ports: 80"),
            made(2, "better", service="ports: 80, readiness_probe: /up"),
            "rolling",
            "change together, and both versions would listen on port 80: update with the new readiness_probe alone",
        ),
    ],
)
def test_an_update_that_cannot_come_that_way_is_refused(first: Recipe, second: Recipe, mode: Any, said: str) -> None:
    wanted = Wanted(first)
    with pytest.raises(ConfigError, match=said):
        wanted.update(second, mode)
    assert (wanted.newest, wanted.coming) == (first, None)


def test_a_new_update_supersedes_one_under_way() -> None:
    """The replicas that the superseded one already has serve until those of the new one do."""
    wanted = Wanted(made())
    wanted.update(made(2, "b $GROUNDSERVE_PORT"), "rolling")
    assert wanted.update(made(3, "c $GROUNDSERVE_PORT"), "rolling") is None
    mixed = [ready(1), ready(3, 2), Replica(4, 2, Stage.RUNNING)]
    assert wanted.counts(mixed, Load(), 0.0) == ({1: 1, 2: 1, 3: 0}, None)
    assert wanted.counts([*mixed[:2], ready(5, 3)], Load(), 0.0) == ({1: 0, 2: 1, 3: 1}, None)
    assert wanted.counts([ready(5, 3), ready(6, 3)], Load(), 0.0)[1] == UpdateResult(3)
    assert (wanted.serving.version, wanted.coming) == (3, None)


def test_a_new_update_that_is_the_old_version() -> None:
    """It needs no new replicas, and those that are gone come back before the others go."""
    wanted = Wanted(made())
    wanted.update(made(2, "b $GROUNDSERVE_PORT"), "rolling")
    assert wanted.update(made(3), "rolling") == 1
    assert (wanted.serving.version, wanted.coming) == (3, None)
    assert wanted.counts([ready(1, 3), ready(3, 2)], Load(), 0.0) == ({2: 1, 3: 2}, None)
    assert wanted.counts([ready(1, 3), ready(4, 3), ready(3, 2)], Load(), 0.0) == ({2: 0, 3: 2}, None)
    assert wanted.counts([ready(1, 3), ready(4, 3)], Load(), 0.0) == ({3: 2}, None)


def test_a_new_update_that_changes_only_the_balancer() -> None:
    wanted = Wanted(made())
    wanted.update(made(2, "b $GROUNDSERVE_PORT"), "rolling")
    policy = "replicas: 2, load_balancing_policy: least_load"
    assert wanted.update(made(3, "b $GROUNDSERVE_PORT", policy), "rolling") == 2
    assert wanted.counts([ready(3, 3), ready(4, 3)], Load(), 0.0)[1] == UpdateResult(3)


@pytest.mark.parametrize("is_aborted", [False, True])
def test_a_failed_update_restores_the_number(is_aborted: bool) -> None:
    wanted = Wanted(made())
    wanted.scale(6)
    wanted.update(made(2, "b $GROUNDSERVE_PORT", "replicas: 1"), "rolling")
    six = [ready(id) for id in range(1, 7)]
    if is_aborted:
        assert wanted.abort() == UpdateResult(2, "the update was aborted")
    else:
        lost = Replica(7, 2, Stage.GIVEN_UP, reason="no such flag")
        assert wanted.counts([*six, lost], Load(), 0.0) == (
            {1: 6, 2: 0},
            UpdateResult(2, "no such flag", failed=lost.id),
        )
    assert wanted.counts(six, Load(), 0.0) == ({1: 6}, None)


@pytest.mark.parametrize("mode", ["rolling", "blue_green"])
def test_a_lower_number_comes_with_the_new_version(mode: Any) -> None:
    """The old version keeps its replicas until one of the new version has lasted."""
    wanted = Wanted(made())
    wanted.scale(4)
    wanted.update(made(2, "b $GROUNDSERVE_PORT", "replicas: 1"), mode)
    four = [ready(id) for id in range(1, 5)]
    assert wanted.counts(four, Load(), 0.0) == ({1: 4, 2: 1}, None)
    assert wanted.counts([*four, Replica(5, 2, Stage.RUNNING)], Load(), 0.0) == ({1: 4, 2: 1}, None)
    wanted.counts([*four, ready(5, 2)], Load(), 0.0)
    assert wanted.counts([*four, ready(5, 2)], Load(), 0.0) == ({1: 0, 2: 1}, None)
    assert wanted.counts([ready(5, 2)], Load(), 0.0)[1] == UpdateResult(2)


def test_a_higher_number_comes_with_the_new_version() -> None:
    """No replica of the old version is started for it."""
    wanted = Wanted(made())
    wanted.update(made(2, "b $GROUNDSERVE_PORT", "replicas: 5"), "rolling")
    assert wanted.counts([ready(1), ready(2)], Load(), 0.0) == ({1: 2, 2: 1}, None)


def test_no_update_to_abort() -> None:
    with pytest.raises(ConfigError, match="x is at version 1 and not being updated"):
        Wanted(made()).abort()


def test_going_back_takes_one_replica_at_a_time() -> None:
    """Those of the failed version that are ready serve until the old ones are back."""
    wanted = Wanted(made())
    wanted.update(made(2, "b $GROUNDSERVE_PORT"), "rolling")
    wanted.abort()
    assert wanted.counts([ready(1), ready(3, 2)], Load(), 0.0) == ({1: 2, 2: 1}, None)
    assert wanted.counts([ready(1), ready(4), ready(3, 2)], Load(), 0.0) == ({1: 2, 2: 0}, None)


def test_nobody_sees_an_unseen_version_that_is_given_up() -> None:
    wanted = Wanted(made())
    wanted.update(made(2, "b $GROUNDSERVE_PORT"), "blue_green")
    wanted.abort()
    both = [ready(1), ready(2), ready(3, 2)]
    assert wanted.counts(both, Load(), 0.0) == ({1: 2, 2: 0}, None)
    assert wanted.hidden == {2}
    wanted.counts(both[:2], Load(), 0.0)
    assert wanted.hidden == frozenset()


def test_an_update_of_a_sleeping_service_starts_one_replica() -> None:
    wanted = Wanted(made(service=AUTOSCALED))
    wanted.update(made(2, "b $GROUNDSERVE_PORT", AUTOSCALED), "rolling")
    assert wanted.counts([], Load(), 0.0) == ({1: 0, 2: 1}, None)
    lost = Replica(1, 2, Stage.GIVEN_UP, reason="no such flag")
    assert wanted.counts([lost], Load(), 1.0) == ({1: 0, 2: 0}, UpdateResult(2, "no such flag", failed=lost.id))
    assert wanted.serving.version == 1
    wanted.update(made(3, "c $GROUNDSERVE_PORT", AUTOSCALED), "rolling")
    assert wanted.counts([ready(2, 3)], Load(), 2.0)[1] == UpdateResult(3)
    assert wanted.counts([ready(2, 3)], Load(), 3.0) == ({3: 0}, None)


def test_a_restart_replaces_all() -> None:
    wanted = Wanted(made())
    assert wanted.update(made(2), "rolling", is_restart=True) is None
    assert wanted.counts([ready(1), ready(2)], Load(), 0.0) == ({1: 2, 2: 1}, None)


def test_two_versions_on_one_port_take_turns() -> None:
    wanted = Wanted(made(run="serve", service="ports: 80"))
    wanted.update(made(2, "better", service="ports: 80"), "rolling")
    assert wanted.counts([ready(1)], Load(), 0.0) == ({1: 0, 2: 0}, None)
    assert wanted.counts([], Load(), 0.0) == ({1: 0, 2: 1}, None)


# What arrived


def snapshot(arrived: int, generating: int = 0, queued: int = 0, turned_away: int = 0) -> Snapshot:
    service = ServiceRow(
        "x", "1", ServiceStatus.READY, 1.0, "http://e", "round_robin", 1, 1, queue_depth=99, in_flight=99
    )
    counts = {"arrived_total": arrived, "turned_away_total": turned_away}
    return Snapshot(replace(service, generating=generating, generating_queued=queued, **counts))


def test_load_since_the_last_look() -> None:
    """The load is the requests that arrived since the last look."""
    traffic = Traffic()
    traffic.note(snapshot(0), 0)
    traffic.note(snapshot(12, turned_away=3), 1)
    assert traffic.take() == Load(12, 0, 0, 3)
    traffic.note(snapshot(13, generating=2, queued=3, turned_away=4), 1)
    traffic.note(snapshot(15, generating=4, queued=1, turned_away=6), 1)
    assert traffic.take() == Load(3, 4, 1, 3)
    assert traffic.take() is None, "nobody has said anything since"


def test_load_counts_from_the_controllers_start() -> None:
    """Requests before the controller's start are no load, and a new balancer counts from zero."""
    traffic = Traffic()
    traffic.note(snapshot(50_000, turned_away=70), 1)
    assert traffic.take() == Load(0, 0, 0, 0)
    traffic.note(snapshot(5, turned_away=2), 1)
    assert traffic.take() == Load(5, 0, 0, 2)


def test_a_silent_balancer_is_not_taken_for_no_load() -> None:
    """Nor is what it says first for a burst: the number of replicas stays as it is."""
    policy = "min_replicas: 1, max_replicas: 20, target_qps_per_replica: 10, upscale_delay_seconds: 20"
    service = f"replica_policy: {{{policy}, downscale_delay_seconds: 30}}"
    wanted, traffic, targets = Wanted(made(service=service), 6), Traffic(), set()
    for second in range(600):
        if not 200 <= second < 440:
            traffic.note(snapshot(60 * second, generating=50), second)
        wanted.counts([ready(id) for id in range(1, 7)], traffic.take(), second)
        if second > 150:
            targets.add(wanted.target)
    assert targets == {6}


# What an earlier controller left running


def test_replicas_of_the_same_recipe_are_kept() -> None:
    """Replicas of the same recipe are kept under their version."""
    ours = made()
    wanted = Wanted(ours)
    wanted.adopt([left(1, 3, ours.digest), left(2, 3, ours.digest)])
    assert wanted.serving.version == wanted.newest.version == 3
    assert wanted.counts([ready(1, 3), ready(2, 3)], Load(), 0.0) == ({3: 2}, None)


def test_replicas_of_another_recipe() -> None:
    """Replicas of another recipe are replaced by a rolling update."""
    wanted = Wanted(made())
    wanted.adopt([left(1, 2, "another"), left(2, 2, "another")])
    assert (wanted.serving.version, wanted.newest.version, wanted.hidden) == (2, 3, frozenset())
    counts, result = wanted.counts([ready(1, 2), ready(2, 2)], Load(), 0.0)
    assert (counts, result) == ({2: 2, 3: 1}, None)
    assert wanted.recipes[2].version == 2


def test_replicas_of_another_recipe_are_never_hidden() -> None:
    """They serve until they are replaced, also where the last update was blue-green."""
    wanted = Wanted(made(), 2, mode="blue_green")
    wanted.adopt([left(1, 1, "another"), left(2, 1, "another")])
    assert (wanted.newest.version, wanted.mode, wanted.hidden) == (2, "rolling", frozenset())
    assert wanted.counts([ready(1), ready(2)], Load(), 0.0) == ({1: 2, 2: 1}, None)


def test_the_number_that_the_load_asked_for_is_kept() -> None:
    """What serves six busy replicas is not scaled down to one because its controller is another."""
    policy = "replica_policy: {min_replicas: 1, max_replicas: 8, target_qps_per_replica: 1}"
    ours = made(service=policy)
    for wanted in (Wanted(ours), Wanted(ours, target=6)):
        wanted.adopt([left(id, 1, ours.digest) for id in range(1, 7)])
        assert wanted.counts([ready(id) for id in range(1, 7)], Load(), 0.0) == ({1: 6}, None)


@pytest.mark.parametrize(
    ("first", "target", "kept"),
    [
        (made(service=AUTOSCALED), 9, 3),
        (made(), 5, 5),
        (made(fits=3), 5, 3),
        (made(run="serve", service="ports: 80"), 2, 1),
    ],
)
def test_a_number_from_before_is_kept_as_far_as_it_can_be(first: Recipe, target: int, kept: int) -> None:
    assert Wanted(first, target).target == kept


def test_an_update_from_before_goes_on() -> None:
    """Its versions have the numbers that they had, also where only the balancer's settings differed."""
    old, new = made(2), made(4, "b $GROUNDSERVE_PORT")
    wanted = Wanted(old, 2, new)
    found = [left(1, 1, old.digest), left(2, 3, new.digest), left(3, 3, "another")]
    assert wanted.adopt(found) == {1: 2, 2: 4, 3: 3}
    assert (wanted.serving.version, wanted.newest.version) == (2, 4)
    assert wanted.counts([ready(1, 2), ready(2, 4), ready(3, 3)], Load(), 0.0) == ({2: 0, 3: 1, 4: 1}, None)


def test_a_restart_from_before_goes_on() -> None:
    old, new = made(1), made(2)
    assert Wanted(old, 2, new).adopt([left(1, 1, old.digest), left(2, 2, old.digest)]) == {1: 1, 2: 2}


def test_an_update_of_replicas_of_other_recipes_goes_on() -> None:
    """Each version that we know has the recipe that it had."""
    old, new = made(1), made(2, "b $GROUNDSERVE_PORT")
    wanted = Wanted(old, 2, new)
    assert wanted.adopt([left(1, 1, "a"), left(2, 2, "b")]) == {1: 1, 2: 2}
    assert (wanted.recipes[1], wanted.recipes[2]) == (old, new)


def test_an_update_that_was_under_way_goes_on() -> None:
    ours = made()
    wanted = Wanted(ours)
    wanted.adopt([left(1, 1, "old"), left(2, 2, ours.digest)])
    assert (wanted.serving.version, wanted.newest.version) == (1, 2)
    everything = [ready(1, 1), ready(2, 2)]
    assert wanted.counts(everything, Load(), 0.0)[0][2] == 2
    counts, result = wanted.counts([ready(2, 2), ready(3, 2)], Load(), 1.0)
    assert (counts, result) == ({1: 0, 2: 2}, UpdateResult(2))
    assert wanted.serving.version == 2


def test_versions_that_came_after_ours_are_left_behind_too() -> None:
    ours = made()
    wanted = Wanted(ours)
    wanted.adopt([left(1, 1, ours.digest), left(2, 2, "broken")])
    assert (wanted.serving.version, wanted.newest.version) == (2, 3)


def test_old_versions_are_forgotten() -> None:
    """Only versions that have replicas, or will have some, are remembered.

    A service that is updated for years does not remember each of its files.
    """
    wanted = Wanted(made())
    for version in range(2, 50):
        wanted.update(made(version, f"serve {version} $GROUNDSERVE_PORT"), "rolling")
        old, new = [ready(1, version - 1), ready(2, version - 1)], [ready(3, version), ready(4, version)]
        wanted.counts(old, Load(), 0.0)
        assert wanted.recipes.keys() == {version - 1, version}
        assert wanted.counts(new, Load(), 0.0)[1] == UpdateResult(version)
    wanted.counts(new, Load(), 0.0)
    assert wanted.recipes.keys() == {49}
    wanted.update(made(50, "serve --worse $GROUNDSERVE_PORT"), "rolling")
    lost = Replica(5, 50, Stage.GIVEN_UP, reason="no such flag")
    assert wanted.counts([*new, lost], Load(), 0.0)[1] == UpdateResult(50, "no such flag", failed=lost.id)
    wanted.counts([*new, replace(lost, stage=Stage.STOPPING)], Load(), 0.0)
    assert wanted.recipes.keys() == {49, 50}, "it is still there, and asked for"
    wanted.counts(new, Load(), 0.0)
    assert wanted.recipes.keys() == {49}


def test_a_replica_that_is_gone_is_nowhere_any_more() -> None:
    report, wanted = Report("x", lambda: "http://127.0.0.1:1", "local"), Wanted(made())
    for id in range(1, 100):
        report.note({id: ReplicaListing(f"x-{id}", f"http://127.0.0.1:{id}", id=id)}, {id})
    gone, there = report.listing([ready(98), ready(99)], wanted, 0.0).replicas
    assert (gone.endpoint, gone.state) == ("", State.PROVISIONING)
    assert (there.endpoint, there.state) == ("http://127.0.0.1:99", State.RUNNING)
    report.note({}, {99})
    assert report.listing([ready(99)], wanted, 0.0).replicas[0].endpoint == "http://127.0.0.1:99", "where it was last"


def test_one_that_its_engine_has_told_to_end_takes_nothing_new() -> None:
    """Also while it drains: the balancer would take one that runs again for another."""
    report, wanted = Report("x", lambda: "http://127.0.0.1:1", "kubernetes"), Wanted(made())
    report.note({1: ReplicaListing("x-1", "http://127.0.0.1:1", id=1, state=State.SHUTTING_DOWN)}, {1})
    for stage in (Stage.RUNNING, Stage.DRAINING):
        (replica,) = report.listing([replace(ready(1), stage=stage)], wanted, 0.0).replicas
        assert replica.state is State.SHUTTING_DOWN


def test_replica_without_a_place() -> None:
    """A replica without a place is PROVISIONING, whatever its stage.

    A running one has an address, or the balancer would refuse the whole list.
    """
    report, wanted = Report("x", lambda: "http://127.0.0.1:1", "compose"), Wanted(made())
    report.note({1: ReplicaListing("x-1", id=1, state=State.PROVISIONING)}, {1})
    (replica,) = report.listing([ready(1)], wanted, 0.0).replicas
    assert (replica.endpoint, replica.state) == ("", State.PROVISIONING)
    (lost,) = report.listing([replace(ready(1), stage=Stage.GIVEN_UP)], wanted, 0.0).replicas
    assert lost.state is State.FAILED
