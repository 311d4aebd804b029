// What was used, by key and model, for a balancer that keeps it.
import { $, arrange, element, number, say } from "./dom.js";

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

export async function showUsage() {
  try {
    const answer = await fetch("usage?by=key,model&since=30d");
    if (answer.ok) {
      const { data } = await answer.json();
      $("usage").hidden = data.length === 0;
      arrange($("used"), data, ({ key, model }) => JSON.stringify([key, model]), makeRow, updateRow);
    }
  } catch {
    // The balancer does not answer now, which the page says elsewhere.
  }
  setTimeout(showUsage, EVERY);
}
