// Replicate's own MCP server over stdio, as a host runs it, with the official MCP client.

// /// client
// title = "MCP server"
// packages = ["replicate-mcp@0.9.0", "@modelcontextprotocol/sdk@1.32.2", "zod@4.1.12"]
// ///

import assert from "node:assert/strict";
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StdioClientTransport } from "@modelcontextprotocol/sdk/client/stdio.js";
import {
  ACCESS_TOKEN,
  API_URL,
  NARRATION,
  WEAK_TOKEN,
  assertPicture,
  creates,
  ended,
  growing,
  pause,
  run,
  unique,
} from "../support/flows.mjs";

async function connected(token, ...options) {
  const server = {
    command: process.execPath,
    args: ["node_modules/replicate-mcp/index.js", ...options],
    // docs:point
    env: { REPLICATE_API_TOKEN: token, REPLICATE_BASE_URL: API_URL },
    // docs:end
    stderr: "ignore",
  };
  const client = new Client({ name: "conformance", version: "1.0.0" });
  await client.connect(new StdioClientTransport(server));
  return client;
}

async function call(client, name, input = {}) {
  const { content, isError } = await client.callTool({ name, arguments: input });
  assert(!isError, content[0]?.text);
  return JSON.parse(content[0].text);
}

const refusal = async (client, name, input) => {
  const failed = await client.callTool({ name, arguments: input }).then(
    ({ content, isError }) => isError && content[0].text,
    (error) => error.message
  );
  assert(failed, "it was not refused");
  return failed;
};

const client = await connected(ACCESS_TOKEN);
const tool = (name, input) => call(client, name, input);
const create = (model, input, more = {}) => tool("create_predictions", { version: `local/${model}`, input, ...more });
const get = (id) => tool("get_predictions", { prediction_id: id });

async function watched() {
  const { id } = await create("narrator", NARRATION);
  const seen = [];
  for (let found = await get(id); found.status !== "succeeded"; found = await get(id)) {
    if (found.status === "processing") seen.push(found);
    await pause(300);
  }
  return seen;
}

await run({
  async run_file() {
    const { output } = await create("painter", { prompt: "a fox" }, { Prefer: "wait=20" });
    await assertPicture(output);
  },
  async run_longer_than_wait() {
    const { id, status } = await create("sleeper", { seconds: 3 }, { Prefer: "wait=1" });
    assert.equal(status, "starting");
    assert.equal((await ended(get, id)).output, "slept well");
  },
  async run_failed() {
    const { id } = await create("crasher", { message: "no paint" });
    const { status, error } = await ended(get, id);
    assert.equal(status, "failed");
    assert.match(error, /no paint/);
  },
  async create_by_model() {
    const input = { prompt: "a fox", max_tokens: 12 };
    const created = await tool("create_models_predictions", { model_owner: "local", model_name: "storyteller", input });
    assert.equal((await ended(get, created.id)).output.length, 12);
  },
  async create_by_version_id() {
    const { latest_version } = (await tool("list_models")).results.find(({ name }) => name === "sleeper");
    const created = await tool("create_predictions", { version: latest_version.id, input: { seconds: 0 } });
    assert.equal((await ended(get, created.id)).output, "slept well");
  },
  async no_output_yet() {
    const created = await create("sleeper", { seconds: 20 });
    const found = await get(created.id);
    for (const open of [created, found]) {
      assert(["starting", "processing"].includes(open.status), open.status);
      assert.deepEqual([open.output ?? null, open.error], [null, null]);
    }
    await tool("cancel_predictions", { prediction_id: created.id });
  },
  async predictions_list() {
    const { id } = await create("sleeper", { seconds: 0 });
    const { results } = await tool("list_predictions");
    assert(results.some((each) => each.id === id));
  },
  async predictions_cancel() {
    const { id } = await create("sleeper", { seconds: 60 });
    await tool("cancel_predictions", { prediction_id: id });
    assert.equal((await ended(get, id)).status, "canceled");
  },
  async idempotency_key() {
    // Its HTTP client counts its retries, which the stack knows; a tool that is called again is another request.
    const prompt = unique();
    await create("painter", { prompt });
    await create("painter", { prompt });
    assert.equal((await creates(prompt)).length, 2);
    return "no way to send one; the retries of its HTTP client are recognized";
  },
  async models_get() {
    assert.equal(await tool("get_models", { model_owner: "local", model_name: "painter" }), "Successful tool call");
    return "drops what it gets, from Replicate as well; `list_models` shows the model";
  },
  async models_list() {
    const { results } = await tool("list_models");
    assert(results.some(({ name }) => name === "painter"));
  },
  async models_search() {
    await refusal(client, "search_models", { body: "lighthouse" });
    return "404: sends the method QUERY, which API Gateway does not know";
  },
  async account_get() {
    assert.equal((await tool("get_account")).username, "local");
  },
  async hardware_list() {
    assert((await tool("list_hardware")).some(({ sku }) => sku === "cpu"));
  },
  async dynamic_tools() {
    const dynamic = await connected(ACCESS_TOKEN, "--tools=dynamic");
    const names = (await dynamic.listTools()).tools.map(({ name }) => name);
    assert.deepEqual(names.toSorted(), ["get_api_endpoint_schema", "invoke_api_endpoint", "list_api_endpoints"]);
    const args = { version: "local/sleeper", input: { seconds: 0, text: "by name" }, Prefer: "wait=20" };
    const created = await call(dynamic, "invoke_api_endpoint", { endpoint_name: "create_predictions", args });
    assert.equal(created.output, "by name");
    await dynamic.close();
  },
  async error_unauthorized() {
    const stranger = await connected("nobody");
    assert.match(await refusal(stranger, "get_account", {}), /401/);
    await stranger.close();
  },
  async error_forbidden() {
    const reader = await connected(WEAK_TOKEN);
    const input = { version: "local/sleeper", input: {} };
    assert.match(await refusal(reader, "create_predictions", input), /403.*predict/s);
    await reader.close();
  },
  async error_not_found() {
    assert.match(await refusal(client, "get_predictions", { prediction_id: "unknown" }), /404/);
  },
  async error_invalid_input() {
    const input = { version: "local/painter", input: { seed: -1 } };
    assert.match(await refusal(client, "create_predictions", input), /422.*input\.prompt.*input\.seed/s);
  },
  async live_logs() {
    growing((await watched()).map(({ logs }) => logs));
  },
  async live_output() {
    growing((await watched()).map(({ output }) => output));
  },
});
await client.close();
