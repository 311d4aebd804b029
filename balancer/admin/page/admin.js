// Changes on the admin port. The admin key is asked for when it is wanted, and kept in memory only.
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

// POSTs to `path`; asks for the key as often as it is wrong. Returns what went wrong in words, or "".
export async function change(path) {
  for (;;) {
    let answer;
    try {
      answer = await fetch(path, { method: "POST", headers: adminKey ? { Authorization: `Bearer ${adminKey}` } : {} });
    } catch {
      return "The balancer does not answer.";
    }
    if (answer.ok) return "";
    if (answer.status !== 401) {
      const said = await answer.json().catch(() => null);
      return said?.error?.message ?? `The balancer said ${answer.status}.`;
    }
    if (!(await askForKey())) return "";
  }
}
