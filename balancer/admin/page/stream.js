// Reads a stream of server-sent events whose data is JSON, as chat completions have it.

export async function* events(body) {
  const decoder = new TextDecoder();
  let rest = "";
  let isDone = false;
  for await (const bytes of pieces(body)) {
    rest += decoder.decode(bytes, { stream: true });
    const whole = rest.split(/\r?\n\r?\n/);
    rest = whole.pop();
    for (const event of whole) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (data === "[DONE]") isDone = true;
      else if (data) yield JSON.parse(data);
    }
  }
  if (!isDone) throw new Error("The answer broke off: what came so far is incomplete.");
}

// Not every browser iterates over a stream by itself.
async function* pieces(body) {
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
