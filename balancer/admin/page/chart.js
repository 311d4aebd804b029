// A chart of tokens by day: a bar for each day, one colour for each key, and a table of the same for who cannot see it.
import { $, arrange, element, number, say } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const DAYS = 30;
const WIDTH = 600;
const HEIGHT = 120;
const GAP = 4;
const COLOURS = 5; // .shade-0 and so on; the last one stands for all other keys

const day = (ago) => new Date(Date.now() - ago * 86_400_000).toISOString().slice(0, 10);
const tokens = (row) => row.prompt_tokens + row.completion_tokens;

// The keys with the most tokens, the most first; the rest have the last colour together.
function shades(rows) {
  const sums = new Map();
  for (const row of rows) sums.set(row.key, (sums.get(row.key) ?? 0) + tokens(row));
  const names = [...sums.keys()].sort((a, b) => sums.get(b) - sums.get(a));
  const own = names.length > COLOURS ? COLOURS - 1 : names.length;
  return { names: names.slice(0, own), others: names.slice(own) };
}

function bar(x, y, width, height, shade) {
  const rect = document.createElementNS(SVG, "rect");
  for (const [name, value] of Object.entries({ x, y, width, height })) rect.setAttribute(name, value.toFixed(1));
  rect.setAttribute("class", `shade-${shade}`);
  return rect;
}

// `rows`: what was used, by key and day.
export function drawChart(rows) {
  const days = Array.from({ length: DAYS }, (_, index) => day(DAYS - 1 - index));
  const { names, others } = shades(rows);
  const shown = others.length ? [...names, null] : names;
  const sums = new Map(days.map((name) => [name, shown.map(() => 0)]));
  for (const row of rows) {
    const place = names.indexOf(row.key);
    const sum = sums.get(row.day);
    if (sum) sum[place < 0 ? names.length : place] += tokens(row);
  }
  const totals = days.map((name) => sums.get(name).reduce((a, b) => a + b, 0));
  const most = Math.max(...totals, 1);
  const step = WIDTH / DAYS;
  const svg = $("chart");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.replaceChildren(...days.flatMap((name, index) => {
    let top = HEIGHT;
    return sums.get(name).flatMap((value, shade) => {
      if (!value) return [];
      const height = Math.max((value / most) * HEIGHT, 1);
      top -= height;
      return [bar(index * step + GAP / 2, top, step - GAP, height, shade)];
    });
  }));
  const busiest = days[totals.indexOf(Math.max(...totals))];
  const sum = totals.reduce((a, b) => a + b, 0);
  svg.setAttribute("aria-label", sum
    ? `Tokens a day, last ${DAYS} days: ${number(sum)} in all, most on ${busiest}: ${number(most)}`
    : `No tokens in the last ${DAYS} days`);
  say($("chart-scale"), sum ? `Up to ${number(most)} tokens a day (${busiest}); ${days[0]} to ${days.at(-1)}` : "Nothing was used yet.");
  arrange($("legend"), shown, (name) => name ?? "/others", () => element("li", {}, element("span"), element("span")), (item, name) => {
    item.firstElementChild.className = `swatch shade-${shown.indexOf(name)}`;
    say(item.lastElementChild, name === null ? `${others.length} others` : name || "without a key");
  });
}
