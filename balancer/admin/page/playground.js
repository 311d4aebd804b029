// A chat with the service through its own endpoint: text and images in, a streamed answer out, and who gave it.
import { $, element, say, seconds } from "./dom.js";
import { events } from "./stream.js";

let talk = []; // the messages so far, as the API has them
let pictures = []; // data: URLs that go with the next message
let leaving = null; // aborts the answer that is being streamed

const headers = () => ($("api-key").value ? { Authorization: `Bearer ${$("api-key").value}` } : {});

async function findModels() {
  const answer = await fetch("playground/v1/models", { headers: headers() }).catch(() => null);
  const models = answer?.ok ? (await answer.json()).data.map((model) => model.id) : [];
  const chosen = $("model").value;
  $("model").replaceChildren(...models.map((name) => element("option", { value: name, textContent: name })));
  if (models.includes(chosen)) $("model").value = chosen;
  return models.length > 0;
}

function follow() {
  $("talk").scrollTop = $("talk").scrollHeight;
}

function show(className, text, images = []) {
  const said = element("p", { textContent: text });
  const how = element("p", { className: "how" });
  const bubble = element("div", { className: `said ${className}` },
    ...images.map((url, index) => element("img", { src: url, alt: `image ${index + 1}` })), said, how);
  $("talk").append(bubble);
  follow();
  return { bubble, said, how };
}

function fail(bubble, message) {
  bubble.append(element("p", { className: "failure", role: "alert", textContent: message }));
  follow();
}

function content(text, images) {
  if (!images.length) return text;
  const parts = images.map((url) => ({ type: "image_url", image_url: { url } }));
  return [...parts, { type: "text", text }];
}

function describe(answer, times, usage) {
  const parts = [`from ${answer.headers.get("x-replica-id") ?? "the balancer"}`];
  const reason = answer.headers.get("x-route-reason");
  if (reason) parts.push(`chosen: ${reason.split(";")[0]}`);
  if (times.first) parts.push(`first token after ${seconds((times.first - times.sent) / 1000)}`);
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    parts.push(`${usage.prompt_tokens} prompt tokens${cached == null ? "" : `, ${cached} of them cached`}`);
    parts.push(`${usage.completion_tokens} tokens in ${seconds((times.last - times.sent) / 1000)}`);
  }
  return parts.join(" · ");
}

async function ask(text, images) {
  const messages = talk; // a new conversation may begin meanwhile
  show("mine", text, images);
  messages.push({ role: "user", content: content(text, images) });
  const { bubble, said, how } = show("theirs", "");
  bubble.setAttribute("aria-busy", "true");
  const times = { sent: performance.now(), first: 0, last: 0 };
  let whole = "";
  let usage = null;
  leaving = new AbortController();
  try {
    if (!$("model").value) await findModels();
    const answer = await fetch("playground/v1/chat/completions", {
      method: "POST",
      signal: leaving.signal,
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify({
        model: $("model").value || "default",
        messages,
        max_tokens: Number($("most").value) || 256,
        temperature: Number($("temperature").value) || 0,
        stream: true,
        stream_options: { include_usage: true },
      }),
    });
    if (!answer.ok) {
      const error = await answer.json().catch(() => null);
      throw new Error(error?.error?.message ?? error?.message ?? `The endpoint said ${answer.status}.`);
    }
    say(how, describe(answer, times, null));
    for await (const event of events(answer.body)) {
      if (event.error) throw new Error(event.error.message ?? "The stream broke.");
      usage = event.usage ?? usage;
      const piece = event.choices?.[0]?.delta?.content;
      if (piece) {
        times.last = performance.now();
        times.first ||= times.last;
        whole += piece;
        said.append(piece);
      }
      say(how, describe(answer, times, usage));
      follow();
    }
  } catch (error) {
    if (error.name === "AbortError") fail(bubble, "Stopped.");
    else fail(bubble, error.message || "The endpoint did not answer.");
  } finally {
    leaving = null;
    bubble.removeAttribute("aria-busy");
  }
  // What was not answered is no part of the conversation: it may be asked again.
  if (whole) messages.push({ role: "assistant", content: whole });
  else messages.pop();
}

function showPictures() {
  $("pictures").replaceChildren(...pictures.map((url, index) => {
    const remove = element("button", { type: "button", textContent: "Remove" });
    remove.setAttribute("aria-label", `Remove image ${index + 1}`);
    remove.addEventListener("click", () => {
      pictures.splice(index, 1);
      showPictures();
    });
    return element("div", {}, element("img", { src: url, alt: `image ${index + 1} to send` }), remove);
  }));
}

async function add(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) continue;
    pictures.push(await new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(reader.error);
      reader.readAsDataURL(file);
    }));
  }
  showPictures();
}

export function startPlayground() {
  const form = $("ask");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const text = $("prompt").value.trim();
    if (leaving || (!text && !pictures.length)) return;
    const images = pictures;
    pictures = [];
    $("prompt").value = "";
    showPictures();
    $("send").disabled = true;
    $("stop").hidden = false;
    await ask(text || "Describe this image.", images);
    $("send").disabled = false;
    $("stop").hidden = true;
    $("prompt").focus();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  $("stop").addEventListener("click", () => leaving?.abort());
  $("anew").addEventListener("click", () => {
    leaving?.abort();
    talk = [];
    $("talk").replaceChildren();
    $("prompt").focus();
  });
  $("files").addEventListener("change", async () => {
    await add($("files").files);
    $("files").value = "";
  });
  form.addEventListener("paste", (event) => add(event.clipboardData.files));
  form.addEventListener("dragover", (event) => {
    event.preventDefault();
    form.classList.add("dropping");
  });
  form.addEventListener("dragleave", () => form.classList.remove("dropping"));
  form.addEventListener("drop", (event) => {
    event.preventDefault();
    form.classList.remove("dropping");
    add(event.dataTransfer.files);
  });
  $("api-key").addEventListener("change", findModels);
  findModels();
}
