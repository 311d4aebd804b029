// Builds what the page shows. Text goes in as text only, so nothing that a replica or a client says can become markup.

export const $ = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// Sets a text only where it changed, so that a selection or a screen reader is not disturbed each second.
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Brings the children of `parent` to one for each item, in order; `make` builds one, `update` fills it in.
export function arrange(parent, items, key, make, update) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let place = parent.firstElementChild;
  for (const item of items) {
    const name = String(key(item));
    let child = known.get(name);
    known.delete(name);
    if (!child) {
      child = make(item);
      child.dataset.key = name;
    }
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
    update(child, item);
  }
  for (const gone of known.values()) gone.remove();
}

export function facts(list, pairs) {
  arrange(list, pairs, ([name]) => name,
    ([name]) => element("div", {}, element("dt", { textContent: name }), element("dd")),
    (row, [, value]) => say(row.lastElementChild, value));
}

const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
export const number = (value) => (value == null ? "–" : plain.format(value));
export const share = (value) => (value == null ? "–" : `${Math.round(value * 100)} %`);

export function seconds(value) {
  if (value == null) return "–";
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${plain.format(value)} s`;
}

export function span(value) {
  if (value == null) return "–";
  const [d, h, m, s] = [value / 86400, value / 3600 % 24, value / 60 % 60, value % 60].map(Math.floor);
  return d ? `${d}d ${h}h` : h ? `${h}h ${m}m` : m ? `${m}m ${s}s` : `${s}s`;
}
