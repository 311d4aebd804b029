// What the admin port asks a key for. The admin key is asked for when it is wanted, and kept in memory only.
import { $ } from "./dom.js";

let adminKey = "";

function askForKey() {
  const dialog = $("admin");
  $("admin-key").value = "";
  dialog.returnValue = "cancel";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      adminKey = dialog.returnValue === "use" ? $("admin-key").value : "";
      $("admin-key").value = "";
      resolve(adminKey !== "");
    }, { once: true });
  });
}

// Asks for the key as often as it is wrong. Returns the answer, or in `failure` what went wrong in words ("": nothing,
// the user gave no key).
export async function ask(path, method = "GET", body = undefined) {
  for (;;) {
    let answer;
    try {
      const headers = adminKey ? { Authorization: `Bearer ${adminKey}` } : {};
      if (body !== undefined) headers["Content-Type"] = "application/json";
      answer = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
    } catch {
      return { failure: "The balancer does not answer." };
    }
    if (answer.ok) return { answer };
    if (answer.status !== 401) {
      const said = await answer.json().catch(() => null);
      return { failure: said?.error?.message ?? `The balancer said ${answer.status}.` };
    }
    if (!(await askForKey())) return { failure: "" };
  }
}
