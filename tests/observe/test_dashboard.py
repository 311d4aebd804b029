"""Every query of the Grafana dashboard and of the alert rules, held against live metrics: names, labels, values."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families as parse

from tests.lab.model import ModelSettings
from tests.lab.replica import LabReplica
from tests.observe.serving import CHAT, chat, client_of, run, serving, stream
from tests.support.until import until

DOCKER = Path(__file__).parents[2] / "docker"
DASHBOARD = DOCKER / "grafana/dashboards/groundserve.json"
ALERTS = DOCKER / "prometheus/alerts.yml"

SELECTOR = re.compile(r"\b((?:groundserve|process|sglang|up)[\w:]*)\s*(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
GROUPING = re.compile(r"\b(?:by|without)\s*\(([^)]*)\)")

Series = dict[str, list[dict[str, str]]]


def queries() -> Iterator[tuple[str, str]]:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Series:
    """The series of a balancer to which a little of everything has happened, as Prometheus would label them."""
    found: Series = {"up": [{"job": "balancer"}]}
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("k\n")

    async def main() -> None:
        one = LabReplica(model=ModelSettings(prefill_rate=100_000.0, itl_base=0.002))
        two = LabReplica()
        quick = {"max_in_flight": 1, "queue_size": 0}
        async with (
            one,
            two,
            serving(one, two, api_keys=keys, policy="prefix_aware", settings=quick) as balancer,
            client_of(balancer, headers={"Authorization": "Bearer k"}) as client,
        ):
            text = "again and again " * 60
            for _ in range(3):
                await client.post(CHAT, json=chat(text))
            await client.post(CHAT, json=stream(text))
            for replica in (one, two):
                replica.next(1, cut="after_tokens")
            with pytest.raises(httpx.RemoteProtocolError):
                await client.post(CHAT, json=stream())
            for replica in (one, two):
                replica.next(1, cut="after_tokens")
            with pytest.raises(httpx.RemoteProtocolError):
                await client.post(CHAT, json=stream() | {"seed": 1})
            one.forget_next()
            two.forget_next()
            for replica, status in ((one, 503), (two, 503), (one, 500), (two, 500)):
                replica.next(1, status=status)
            for _ in range(2):
                await client.post(CHAT, json=chat())
            one.set(hang="before_head")
            two.set(hang="before_head")
            held = [asyncio.ensure_future(client.post(CHAT, json=chat())) for _ in range(3)]
            await until(lambda: any(task.done() for task in held))  # one too many: queue_full
            await note(found, balancer.admin_endpoint, client, job="balancer", instance="balancer:30002")
            for replica in (one, two):
                await note(found, replica.url, client, job="replica", instance="replica:8000")
            for task in held:
                task.cancel()
            await asyncio.gather(*held, return_exceptions=True)

    run(main())
    return found


async def note(found: Series, url: str, client: httpx.AsyncClient, **target: str) -> None:
    for family in parse((await client.get(url + "/metrics")).text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append({**sample.labels, **target})


def fits(labels: dict[str, str], matchers: list[tuple[str, str, str]]) -> bool:
    """Would Prometheus select a series with these labels?"""
    for label, operator, wanted in matchers:
        is_equal = re.fullmatch(wanted, labels.get(label, "")) if "~" in operator else labels.get(label, "") == wanted
        if bool(is_equal) is operator.startswith("!"):
            return False
    return True


@pytest.mark.parametrize(("title", "query"), list(queries()))
def test_every_query_finds_series(title: str, query: str, live: Series) -> None:
    used: set[str] = set()
    selectors = SELECTOR.findall(re.sub(r"\b(?:by|without)\s*\([^)]*\)", "", query))
    assert selectors, query
    for name, inside in selectors:
        assert name in live, f"{title}: no metric {name}"
        matchers = MATCHER.findall(inside)
        labels = {label for series in live[name] for label in series}
        used |= labels
        for label, _, _ in matchers:
            assert label in labels, f"{title}: {name} has no label {label}"
        assert any(fits(series, matchers) for series in live[name]), f"{title}: nothing fits {name}{{{inside}}}"
    for grouping in GROUPING.findall(query):
        for label in re.split(r"\s*,\s*", grouping.strip()):
            assert label in used, f"{title}: none of its metrics has a label {label}"
    assert query.count("(") == query.count(")"), title


def test_every_metric_of_ours_is_on_the_dashboard(live: Series) -> None:
    shown = {name for _, query in queries() for name, _ in SELECTOR.findall(query)}
    ours = {re.sub(r"_(bucket|count|sum)$", "", name) for name in live if name.startswith("groundserve_")}
    missing = {name for name in ours if not {name, name + "_bucket"} & shown}
    assert missing == {"groundserve_balancer_info", "groundserve_replica_info", "groundserve_replica_up"}


def test_alerts_say_what_to_do_and_speak_of_errors_that_exist() -> None:
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["annotations"].keys() == {"summary", "action"}, rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
    source = (DOCKER.parent / "balancer/errors.py").read_text()
    for _, query in queries():
        for codes in re.findall(r'code=~"([^"]*)"', query):
            for code in codes.split("|"):
                assert f'"{code}"' in source


def test_panels_do_not_overlap_and_have_names_of_their_own() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    places = [
        (x, y)
        for panel in panels
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(places)) == len(places)
    assert max(x for x, _ in places) < 24
    titles = [panel["title"] for panel in panels]
    assert len(set(titles)) == len(titles)
