// The service, its replicas and its routing decisions, from the feed, every second.
import { $, arrange, element, facts, number, say, seconds, share, span } from "./dom.js";
import { ask } from "./admin.js";
import { draw, spark } from "./spark.js";
import { showTurns } from "./turns.js";
import { startPlayground } from "./playground.js";
import { about, showServices } from "./service.js";
import { offerUsage } from "./accounts.js";

const history = { kept: 180, service: [], replicas: new Map() };
const statuses = new Map();

function badge(node, { status, phase }) {
  say(node, status);
  node.className = `badge ${phase}`;
}

// The facts about a replica, in this order; a new one is added here.
const FACTS = [
  ({ id }) => `replica ${id}`,
  ({ version }) => `version ${version}`,
  ({ endpoint }) => endpoint,
  ({ infra }) => infra,
  ({ resources }) => resources,
  ({ leased }) => leased,
  ({ node }) => node && `on ${node}`,
  ({ ends_in_seconds: left }) => left != null && `ends in ${span(left)}`,
  ({ launched_seconds: age }) => `launched ${span(age)} ago`,
  ({ reason }) => reason,
];

const SERVICE_SPARKS = [["Requests/s", "requests_per_second"], ["In flight", "in_flight"], ["Waiting", "queue_depth"]];
const REPLICA_SPARKS = [
  ["Tokens/s", "tokens_per_second", number, null],
  ["First token", "ttft_seconds", seconds, null],
  ["Cached", "cached_share", share, 1],
];

function waiting({ queue_depth: depth, expected_wait_seconds: wait }) {
  return wait ? `${number(depth)}, a new one about ${seconds(wait)}` : number(depth);
}

function showService(service) {
  say($("service-name"), service.name);
  document.title = `${service.name}: ${service.status.toLowerCase().replaceAll("_", " ")}`;
  badge($("service-status"), service);
  facts($("service"), [
    ["Endpoint", service.endpoint],
    ["Replicas ready", `${service.ready} of ${service.total}`],
    ["In flight", number(service.in_flight)],
    ["Waiting", waiting(service)],
    ["Policy", service.policy],
    ["Version", service.version],
    ["Up", span(service.uptime_seconds)],
  ]);
  $("service-reason").hidden = !service.reason;
  say($("service-reason"), service.reason ?? "");
  [...$("service-sparks").children].forEach((figure, index) => {
    const values = history.service.map((sample) => sample[SERVICE_SPARKS[index][1]]);
    draw(figure, values, number, values.at(-1));
  });
}

function makeCard(replica) {
  const button = element("button", { type: "button" });
  button.addEventListener("click", async () => {
    button.disabled = true;
    const { failure = "" } = await ask(about(`replicas/${replica.id}/${button.dataset.verb}`), "POST");
    button.disabled = false;
    const place = card.querySelector(".failure");
    place.hidden = !failure;
    say(place, failure);
  });
  const heading = element("h3", { id: `replica-${replica.id}` });
  const card = element("article", { className: "card" },
    element("header", {}, heading, element("span", { className: "badge" }), button),
    element("p", { className: "about" }),
    element("p", { className: "failure", hidden: true, role: "alert" }),
    element("dl", { className: "facts" }),
    element("div", { className: "sparks" }, ...REPLICA_SPARKS.map(([title]) => spark(title))));
  card.setAttribute("aria-labelledby", heading.id);
  return card;
}

function updateCard(card, replica) {
  say(card.querySelector("h3"), replica.name);
  badge(card.querySelector(".badge"), replica);
  const texts = FACTS.map((fact) => fact(replica)).filter((text) => text && text !== "-");
  say(card.querySelector(".about"), texts.join(" · "));
  const button = card.querySelector("button");
  button.dataset.verb = replica.draining ? "undrain" : "drain";
  say(button, replica.draining ? "Undrain" : "Drain");
  button.setAttribute("aria-label", `${replica.draining ? "Undrain" : "Drain"} ${replica.name}`);
  facts(card.querySelector("dl"), [
    ["In flight", `${number(replica.in_flight)} of ${number(replica.limit)}`],
    ["Requests", number(replica.requests_total)],
    ["Failures", number(replica.failures_total)],
  ]);
  const samples = history.replicas.get(replica.id) ?? [];
  [...card.querySelectorAll(".spark")].forEach((figure, index) => {
    const [, field, words, highest] = REPLICA_SPARKS[index];
    draw(figure, samples.map((sample) => sample[field]), words, replica[field], highest);
  });
}

function showReplicas(replicas) {
  $("no-replicas").hidden = replicas.length > 0;
  arrange($("cards"), replicas, (replica) => replica.id, makeCard, updateCard);
  const news = [];
  for (const { id, name, status } of replicas) {
    if (statuses.has(id) && statuses.get(id) !== status) news.push(`${name} is ${status.toLowerCase().replaceAll("_", " ")}`);
    statuses.set(id, status);
  }
  const present = new Set(replicas.map((replica) => replica.id));
  for (const id of statuses.keys()) {
    if (!present.has(id)) {
      statuses.delete(id);
      history.replicas.delete(id);
    }
  }
  if (news.length) say($("announcer"), news.join(", "));
}

function showDecisions(decisions) {
  $("no-decisions").hidden = decisions.length > 0;
  const number_ = "number";
  arrange($("rows"), decisions, (decision) => decision.number,
    () => element("tr", {}, ...["", "text", "", "text", "", number_, number_, number_, number_, number_, ""]
      .map((name) => element("td", { className: name }))),
    (row, d) => {
      row.className = d.status >= 500 ? "bad" : "";
      const cached = d.prompt_tokens ? `${number(d.cached_tokens)} of ${number(d.prompt_tokens)}` : "–";
      [`${span(d.ago_seconds)} ago`, d.path, d.replica || "–", d.reason || "–", String(d.status), number(d.attempts),
        seconds(d.queued_seconds), seconds(d.ttft_seconds), seconds(d.duration_seconds), cached, d.key || "–"]
        .forEach((text, index) => say(row.children[index], text));
      row.children[1].title = d.path;
      row.children[3].title = d.reason;
    });
}

function noteHistory({ data }) {
  const { kept, service, replicas } = JSON.parse(data);
  history.kept = kept;
  history.service = service;
  history.replicas = new Map(Object.entries(replicas).map(([id, samples]) => [Number(id), samples]));
}

function noteSample({ data }) {
  const { service, replicas } = JSON.parse(data);
  history.service = [...history.service, service].slice(-history.kept);
  for (const [id, sample] of Object.entries(replicas)) {
    // A replica with fewer samples than have been seen here has restarted.
    const before = (history.replicas.get(Number(id)) ?? []).slice(-history.kept);
    history.replicas.set(Number(id), [...before, sample].slice(-sample.count));
  }
}

function show({ data }) {
  const { service, replicas, turns, decisions, keeps_usage } = JSON.parse(data);
  if (keeps_usage) offerUsage();
  showService(service);
  showReplicas(replicas);
  showTurns($("turns"), $("strips"), turns, replicas);
  showDecisions(decisions);
  document.body.dataset.live = "yes";
}

function watch() {
  const feed = new EventSource(about("feed"));
  feed.addEventListener("history", noteHistory);
  feed.addEventListener("sample", noteSample);
  feed.addEventListener("state", show);
  feed.addEventListener("open", () => say($("connection"), ""));
  feed.addEventListener("error", () => {
    document.body.dataset.live = "no";
    say($("connection"), "The balancer does not answer; trying again …");
    // A browser reconnects on its own after a lost connection, but not after a response that is not an event stream.
    if (feed.readyState === EventSource.CLOSED) setTimeout(watch, 3000);
  });
}

$("service-sparks").append(...SERVICE_SPARKS.map(([title]) => spark(title)));
watch();
showServices();
startPlayground();
