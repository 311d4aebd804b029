// The keys that are issued: listed, issued, changed, rotated and revoked. A secret is shown once, and stays until it is
// hidden.
import { $, arrange, element, number, say } from "./dom.js";
import { ask } from "./admin.js";

// What each key has, by name, as last told; the one whose limits the form changes, null for a new key; and the day on
// which that one expires, as the form showed it.
const known = new Map();
let changing = null;
let shownDay = "";

const LIMITS = ["max_in_flight", "requests_per_minute", "requests_per_day", "tokens_per_minute", "tokens_per_day"];

function status({ revoked, expires }) {
  if (revoked) return "revoked";
  return expires && new Date(expires) <= new Date() ? "expired" : "in use";
}

function button(text, act) {
  const made = element("button", { type: "button", textContent: text });
  made.addEventListener("click", act);
  return made;
}

// The second click does it; a click elsewhere takes the first one back.
function surely(text, act) {
  const made = button(text, async () => {
    if (!made.dataset.sure) {
      made.dataset.sure = "yes";
      say(made, `${text}: sure?`);
      return;
    }
    back();
    made.disabled = true;
    await act();
    made.disabled = false;
  });
  const back = () => {
    delete made.dataset.sure;
    say(made, text);
  };
  made.addEventListener("blur", back);
  return made;
}

function makeRow({ name }) {
  const path = `keys/${encodeURIComponent(name)}`;
  const cells = ["", "", ...LIMITS.map(() => "number"), "", "text", ""].map((className) => element("td", { className }));
  const limits = button("Change", () => fill(known.get(name)));
  const rotate = surely("Rotate", () => change(`${path}/rotate`, "POST"));
  const revoke = surely("Revoke", () => change(path, "DELETE"));
  limits.setAttribute("aria-label", `Change ${name}`);
  rotate.setAttribute("aria-label", `Rotate ${name}`);
  revoke.setAttribute("aria-label", `Revoke ${name}`);
  return element("tr", {}, ...cells, element("td", {}, limits, rotate, revoke));
}

function updateRow(row, key) {
  known.set(key.name, key);
  const texts = [key.name, status(key), ...LIMITS.map((name) => number(key[name])), key.priority,
    key.models.join(", ") || "all", key.expires ?? "–"];
  texts.forEach((text, index) => say(row.children[index], text));
  for (const one of row.lastElementChild.children) one.hidden = key.revoked !== null;
}

function tell(failure) {
  $("keys-failure").hidden = !failure;
  say($("keys-failure"), failure ?? "");
}

export async function showKeys() {
  const { answer, failure } = await ask("keys");
  tell(failure);
  if (!answer) return;
  const keys = await answer.json();
  $("no-keys").hidden = keys.length > 0;
  $("keys-table").hidden = !keys.length;
  arrange($("issued"), keys, ({ name }) => name, makeRow, updateRow);
}

// Returns whether it was done.
async function change(path, method, body) {
  const { answer, failure } = await ask(path, method, body);
  tell(failure);
  if (!answer) return false;
  const { name, key } = await answer.json();
  if (key) {
    say($("secret-of"), `The key of ${name}, shown this once:`);
    $("secret-text").value = key;
    $("secret").hidden = false;
    $("secret-text").select();
  }
  await showKeys();
  return true;
}

// Makes the form one that changes this key; null: one for a new key.
function fill(key) {
  const form = $("issue");
  form.reset();
  changing = key;
  form.elements.name.readOnly = Boolean(key);
  say($("issue-it"), key ? "Change" : "Issue");
  say($("issue-what"), key ? `Change ${key.name}` : "Issue a key");
  $("change-none").hidden = !key;
  if (!key) return;
  for (const name of ["name", "priority", ...LIMITS]) form.elements[name].value = key[name] ?? "";
  form.elements.models.value = key.models.join(", ");
  shownDay = key.expires?.match(/^\d{4}-\d\d-\d\d/)?.[0] ?? ""; // dates may be written in ways that the field does not know
  form.elements.expires.value = shownDay;
  $("issue-box").open = true;
  form.elements.max_in_flight.focus();
}

async function issue(event) {
  event.preventDefault();
  const said = new FormData($("issue"));
  const terms = { priority: said.get("priority"), models: said.get("models").split(",").map((one) => one.trim()).filter(Boolean) };
  for (const name of LIMITS) if (said.get(name)) terms[name] = Number(said.get(name));
  const day = said.get("expires");
  if (changing && day === shownDay) terms.expires = changing.expires; // with its time, which the field does not show
  else if (day) terms.expires = day;
  const path = `keys/${encodeURIComponent(said.get("name"))}`;
  if (await change(path, changing ? "PUT" : "POST", terms)) fill(null);
}

export function startKeys() {
  $("issue").addEventListener("submit", issue);
  $("change-none").addEventListener("click", () => fill(null));
  $("secret-seen").addEventListener("click", () => {
    $("secret-text").value = "";
    $("secret").hidden = true;
  });
}
