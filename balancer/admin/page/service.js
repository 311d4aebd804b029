// Which of the balancer's services the page is about: `?service=NAME` in its address, else the first.
import { $, element } from "./dom.js";

const named = new URLSearchParams(location.search).get("service");

// `path`, asked about that service.
export function about(path) {
  return named === null ? path : `${path}?${new URLSearchParams({ service: named })}`;
}

// Links to all services, where there are several.
export async function showServices() {
  const answer = await fetch("services").catch(() => null);
  const names = answer?.ok ? (await answer.json()).map(({ service }) => service.name) : [];
  $("services").hidden = names.length < 2;
  $("services").replaceChildren(...names.map((name) => {
    const link = element("a", { href: `?${new URLSearchParams({ service: name })}`, textContent: name });
    if (name === (named ?? names[0])) link.setAttribute("aria-current", "page");
    return link;
  }));
}
