// Who had which shared GPU in the last five minutes: a strip for each GPU, with a lane for each replica.
import { arrange, element, say, seconds } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const SHOWN = 300; // seconds

function lane() {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${SHOWN} 10`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.append(document.createElementNS(SVG, "path"));
  return element("div", { className: "lane" }, element("span"), svg);
}

function updateLane(row, { service, replica, turns }) {
  say(row.firstElementChild, replica);
  row.firstElementChild.title = service;
  let line = "";
  let had = 0;
  for (const [began, ended] of turns) {
    if (ended >= SHOWN) continue;
    const length = Math.min(began, SHOWN) - ended;
    had += length;
    // At least a hair's breadth, so that a short turn is seen.
    line += `M${(SHOWN - ended - length).toFixed(2)} 0h${Math.max(length, 0.5).toFixed(2)}v10H${(SHOWN - ended - length).toFixed(2)}z`;
  }
  row.querySelector("path").setAttribute("d", line);
  const now = turns.some(([, ended]) => ended === 0) ? "has it now, and " : "";
  row.querySelector("svg").setAttribute("aria-label", `${replica} ${now}had it for ${seconds(had)} of the last five minutes`);
}

// The GPU as a replica that leased it calls it: with its number and kind.
function called(gpu, replicas) {
  const leased = replicas.flatMap((replica) => (replica.leased ?? "").match(/GPU \d+ \([^)]*\)/g) ?? []);
  return leased.find((words) => words.endsWith(` ${gpu})`)) ?? gpu;
}

// `turns`: for each GPU and replica, when it had its turn, as pairs of how many seconds ago one began and ended.
export function showTurns(section, list, turns, replicas) {
  section.hidden = turns.length === 0;
  arrange(list, [...new Set(turns.map(({ gpu }) => gpu))], (gpu) => gpu,
    () => element("figure", { className: "strip" }, element("figcaption"), element("div")),
    (figure, gpu) => {
      say(figure.firstElementChild, called(gpu, replicas));
      arrange(figure.lastElementChild, turns.filter((turn) => turn.gpu === gpu),
        ({ service, replica }) => `${service}/${replica}`, lane, updateLane);
    });
}
