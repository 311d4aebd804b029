// The keys that are issued: listed, issued, rotated and revoked. A secret is shown once, and stays until it is hidden.
import { $, arrange, element, number, say } from "./dom.js";
import { ask } from "./admin.js";

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
  const rotate = surely("Rotate", () => change(`${path}/rotate`, "POST"));
  const revoke = surely("Revoke", () => change(path, "DELETE"));
  rotate.setAttribute("aria-label", `Rotate ${name}`);
  revoke.setAttribute("aria-label", `Revoke ${name}`);
  return element("tr", {}, ...cells, element("td", {}, rotate, revoke));
}

function updateRow(row, key) {
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

async function issue(event) {
  event.preventDefault();
  const said = new FormData($("issue"));
  const terms = { priority: said.get("priority"), models: said.get("models").split(",").map((one) => one.trim()).filter(Boolean) };
  for (const name of LIMITS) if (said.get(name)) terms[name] = Number(said.get(name));
  if (said.get("expires")) terms.expires = said.get("expires");
  if (await change(`keys/${encodeURIComponent(said.get("name"))}`, "POST", terms)) $("issue").reset();
}

export function startKeys() {
  $("issue").addEventListener("submit", issue);
  $("secret-seen").addEventListener("click", () => {
    $("secret-text").value = "";
    $("secret").hidden = true;
  });
}
