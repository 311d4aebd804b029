// Sparklines: one small line of the last fifteen minutes, with its newest and its highest value in words.
import { element, say } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 180;
const HEIGHT = 40;
const FEWEST = 24; // samples that fill the width while there are few: two minutes

export function spark(title) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  const base = document.createElementNS(SVG, "line");
  for (const [name, value] of [["x1", 0], ["x2", WIDTH], ["y1", HEIGHT - 0.5], ["y2", HEIGHT - 0.5]]) base.setAttribute(name, value);
  svg.append(base, document.createElementNS(SVG, "path"));
  const caption = element("figcaption", {}, element("span", { textContent: title }), element("span"));
  const figure = element("figure", { className: "spark" }, svg, caption);
  figure.dataset.title = title;
  return figure;
}

// `values`: oldest first, null where nothing was measured. `words` puts a value in words, `now` is the one to name,
// `highest` the top of the scale where that is known.
export function draw(figure, values, words, now, highest = null) {
  const kept = Math.max(values.length, FEWEST);
  const measured = values.filter((value) => value != null);
  const top = highest ?? Math.max(...measured, 0);
  const step = WIDTH / (kept - 1);
  const first = kept - values.length;
  let line = "";
  let pen = "M";
  values.forEach((value, index) => {
    if (value == null) {
      pen = "M";
      return;
    }
    const y = HEIGHT - 1.5 - (top ? (value / top) * (HEIGHT - 3) : 0);
    const x = (first + index) * step;
    // A single value between two gaps would be a line of no length.
    line += pen === "M" ? `M${x.toFixed(1)} ${y.toFixed(1)}h.1` : `L${x.toFixed(1)} ${y.toFixed(1)}`;
    pen = "L";
  });
  figure.querySelector("path").setAttribute("d", line);
  say(figure.querySelector("figcaption").lastElementChild, words(now));
  const most = measured.length ? words(Math.max(...measured)) : "nothing yet";
  figure.querySelector("svg").setAttribute("aria-label", `${figure.dataset.title}: now ${words(now)}, highest in 15 minutes ${most}`);
}
