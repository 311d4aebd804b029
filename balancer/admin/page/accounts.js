// Keys and what was used with them, for a balancer that keeps both. They may want the admin key, so they are shown on demand.
import { $, arrange, element, number, say } from "./dom.js";
import { ask } from "./admin.js";
import { drawChart } from "./chart.js";
import { showKeys, startKeys } from "./keys.js";

const EVERY = 30_000; // milliseconds
const FIGURES = ["requests", "failed", "prompt_tokens", "cached_tokens", "completion_tokens"];

function makeRow() {
  const figures = FIGURES.map(() => element("td", { className: "number" }));
  return element("tr", {}, element("td"), element("td"), ...figures);
}

function updateRow(row, used) {
  [used.key || "–", used.model, ...FIGURES.map((name) => number(used[name]))]
    .forEach((text, index) => say(row.children[index], text));
}

// Returns whether there was an answer.
async function showUsage() {
  const { answer, failure } = await ask("usage?by=key,model&since=30d");
  $("usage-failure").hidden = !failure;
  say($("usage-failure"), failure ?? "");
  if (!answer) return false;
  const { data } = await answer.json();
  arrange($("used"), data, ({ key, model }) => JSON.stringify([key, model]), makeRow, updateRow);
  const { answer: byDay } = await ask("usage?by=key,day&since=30d");
  if (byDay) drawChart((await byDay.json()).data);
  $("usage-chart").hidden = !byDay;
  return true;
}

async function show() {
  if (await showUsage()) {
    $("usage-table").hidden = $("keys").hidden = false;
    $("show-usage").hidden = true;
    await showKeys();
  }
  if (!$("usage-table").hidden) setTimeout(show, EVERY);
}

export function offerUsage() {
  if (!$("usage").hidden) return;
  $("usage").hidden = $("to-usage").hidden = false;
  $("show-usage").addEventListener("click", show);
  startKeys();
}
