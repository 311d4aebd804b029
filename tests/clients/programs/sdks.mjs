// What the official SDKs for Node do with an endpoint: one JSON line a check. node sdks.mjs URL MODEL, beside node_modules.
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const [url, model] = process.argv.slice(2);
const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const anthropic = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Name the capital of France." }];
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const tools = [{ type: "function", function: { name: "weather", description: "weather", parameters } }];

const checks = {
  "openai (Node)": {
    async models() {
      const ids = [];
      for await (const one of openai.models.list()) ids.push(one.id);
      assert(ids.includes(model), ids.join());
    },
    async chat() {
      const said = await openai.chat.completions.create({ model, messages });
      assert.match(said.choices[0].message.content, /Paris/);
      assert(said._request_id);
    },
    async chat_stream() {
      let text = "";
      for await (const chunk of await openai.chat.completions.create({ model, messages, stream: true }))
        text += chunk.choices[0]?.delta?.content ?? "";
      assert.match(text, /Paris/);
    },
    async chat_tools_run() {
      const run = openai.chat.completions.runTools({
        model,
        messages,
        tools: [{ type: "function", function: { function: () => "sunny", parse: JSON.parse, ...tools[0].function } }],
      });
      assert.match(await run.finalContent(), /sunny/);
    },
    async responses() {
      assert.match((await openai.responses.create({ model, input: "Name the capital of France." })).output_text, /Paris/);
    },
    async responses_stream() {
      const kinds = [];
      const stream = await openai.responses.create({ model, input: "Name the capital of France.", stream: true });
      for await (const event of stream) kinds.push(event.type);
      assert.deepEqual([kinds[0], kinds.at(-1)], ["response.created", "response.completed"]);
    },
    async nothing_is_kept() {
      await assert.rejects(openai.files.list(), (error) => error.status === 404 && error.code === "not_found");
    },
  },
  "anthropic (Node)": {
    async message() {
      const said = await anthropic.messages.create({ model, max_tokens: 50, messages });
      assert.match(said.content.at(-1).text, /Paris/);
      assert(said._request_id);
    },
    async message_stream() {
      assert.match(await anthropic.messages.stream({ model, max_tokens: 50, messages }).finalText(), /Paris/);
    },
    async message_tool_call() {
      const offered = [{ name: "weather", description: "weather", input_schema: parameters }];
      const said = await anthropic.messages.create({ model, max_tokens: 90, messages, tools: offered });
      assert.deepEqual(said.content.at(-1).input, { city: "Paris" });
    },
    async mistake() {
      const wrong = anthropic.messages.create({ model, max_tokens: -1, messages });
      await assert.rejects(wrong, (error) => error.type === "invalid_request_error" && Boolean(error.requestID));
    },
  },
};

for (const [suite, tests] of Object.entries(checks))
  for (const [check, test] of Object.entries(tests)) {
    let problem = "";
    try {
      await test();
    } catch (error) {
      problem = `${error.name}: ${error.message}`.slice(0, 400);
    }
    console.log(JSON.stringify({ suite, check, problem }));
  }
