// LangChain in JavaScript: its class for language models on Replicate, which is built on the official client. The host
// is the client's default, so a subclass gives it another one.

// /// client
// title = "LangChain, JavaScript"
// packages = ["@langchain/community@1.1.29", "@langchain/core@1.4.0", "replicate@1.4.0"]
// ///

import assert from "node:assert/strict";
import { Replicate } from "@langchain/community/llms/replicate";
import Client from "replicate";
import { ACCESS_TOKEN, API_URL, NARRATION, creates, run, streamReader, unique } from "../support/flows.mjs";

// docs:point
class StackReplicate extends Replicate {
  _prepareReplicate = async () => new Client({ auth: ACCESS_TOKEN, baseUrl: API_URL });
}
// docs:end

const settings = { apiKey: ACCESS_TOKEN, promptKey: "prompt" };
const storyteller = (input = {}) =>
  new StackReplicate({ ...settings, model: "local/storyteller", input: { max_tokens: 12, ...input }, maxRetries: 0 });
const narrator = () => {
  const { prompt, ...input } = NARRATION;
  return new StackReplicate({ ...settings, model: "local/narrator", input, maxRetries: 0 });
};
const words = (text) => text.trim().split(/\s+/).length;

async function refused(model, status) {
  const error = await model.invoke("a fox").then(
    () => assert.fail("it was not refused"),
    (error) => error
  );
  assert.equal(error.response?.status, status, error);
  return error;
}

await run({
  async run_text() {
    assert.equal(words(await storyteller().invoke("a fox")), 12);
  },
  async run_by_version() {
    const client = new Client({ auth: ACCESS_TOKEN, baseUrl: API_URL });
    const { latest_version } = await client.models.get("local", "storyteller");
    // Without promptKey, the first property of the version's schema.
    const model = `local/storyteller:${latest_version.id}`;
    const told = await new StackReplicate({ apiKey: ACCESS_TOKEN, model, input: { max_tokens: 5 } }).invoke("a fox");
    assert.equal(words(told), 5);
  },
  async run_failed() {
    const crasher = new StackReplicate({ ...settings, promptKey: "message", model: "local/crasher", maxRetries: 0 });
    await assert.rejects(crasher.invoke("no paint"), /no paint/);
  },
  async no_output_yet() {
    assert.equal(words(await narrator().invoke("a fox")), 10);
  },
  async stream() {
    const pieces = [];
    const heard = [];
    const callbacks = [{ handleLLMNewToken: (token) => void heard.push(token) }];
    for await (const piece of await storyteller().stream("a fox", { callbacks })) pieces.push(piece);
    assert.equal(words(pieces.join("")), 12);
    assert(words(heard.join("")) >= 12);
    return "from Replicate's own address, not through the stack";
  },
  async stream_token() {
    const told = await streamReader(async () => {
      for await (const _ of await storyteller().stream("a fox"));
    });
    assert.equal(told, "missing");
    return "sends it no token";
  },
  async idempotency_key() {
    const prompt = unique();
    const key = prompt;
    // docs:key
    const keyed = (url, init) => {
      const headers = new Headers(init.headers);
      headers.set("Idempotency-Key", key);
      return fetch(url, { ...init, headers });
    };
    class KeyedReplicate extends Replicate {
      _prepareReplicate = async () => new Client({ auth: ACCESS_TOKEN, baseUrl: API_URL, fetch: keyed });
    }
    // docs:end
    for (let call = 0; call < 2; call += 1) {
      await new KeyedReplicate({ ...settings, model: "local/storyteller" }).invoke(prompt);
    }
    assert.equal((await creates(prompt)).length, 1);
  },
  async error_not_found() {
    await refused(new StackReplicate({ ...settings, model: "local/unknown", maxRetries: 0 }), 404);
  },
  async error_invalid_input() {
    assert.match((await refused(storyteller({ max_tokens: 0 }), 422)).message, /input\.max_tokens/);
  },
});
