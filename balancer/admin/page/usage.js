// What was used, by key and model, for a balancer that keeps it. It may want the admin key, so it is shown on demand.
import { $, arrange, element, number, say } from "./dom.js";
import { ask } from "./admin.js";

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

async function showUsage() {
  const { answer, failure } = await ask("usage?by=key,model&since=30d");
  $("usage-failure").hidden = !failure;
  say($("usage-failure"), failure ?? "");
  if (answer) {
    const { data } = await answer.json();
    arrange($("used"), data, ({ key, model }) => JSON.stringify([key, model]), makeRow, updateRow);
  }
  $("usage-table").hidden = !answer && !$("used").children.length;
  $("show-usage").hidden = !$("usage-table").hidden;
  if (!$("usage-table").hidden) setTimeout(showUsage, EVERY);
}

export function offerUsage() {
  if (!$("usage").hidden) return;
  $("usage").hidden = false;
  $("show-usage").addEventListener("click", showUsage);
}
