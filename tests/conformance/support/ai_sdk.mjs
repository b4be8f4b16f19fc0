// The flows of the Vercel AI SDK that its major versions spell alike: images.

import assert from "node:assert/strict";
import { ACCESS_TOKEN, API_URL, creates, run, unique } from "./flows.mjs";

const isPicture = ({ uint8Array }) => assert.deepEqual([...uint8Array.subarray(1, 4)], [...Buffer.from("PNG")]);

// `slow` and `failed` assert what the version makes of a model that takes longer than the wait, or fails.
export async function runFlows({ generateImage, createReplicate, replicate, keyed, slow, failed }) {
  const generated = async (model, options = {}, from = replicate) => {
    const { images } = await generateImage({ model: from.image(model), prompt: "a fox", maxRetries: 0, ...options });
    images.forEach(isPicture);
    return images;
  };
  await run({
    async run_file() {
      assert.equal((await generated("local/painter")).length, 1);
    },
    async run_list() {
      assert.equal((await generated("local/series", { providerOptions: { replicate: { count: 3 } } })).length, 3);
    },
    async run_by_version() {
      const headers = { authorization: `Bearer ${ACCESS_TOKEN}` };
      const { latest_version } = await (await fetch(`${API_URL}/models/local/painter`, { headers })).json();
      assert.equal((await generated(`local/painter:${latest_version.id}`)).length, 1);
    },
    async run_file_object() {
      const [{ uint8Array }] = await generated("local/painter");
      const prompt = { text: "as an etching", images: [uint8Array] };
      assert.equal((await generated("local/etcher", { prompt })).length, 1);
    },
    async run_longer_than_wait() {
      const providerOptions = { replicate: { count: 1, delay_seconds: 3, maxWaitTimeInSeconds: 1 } };
      return slow(generated("local/series", { providerOptions }));
    },
    async run_failed() {
      const providerOptions = { replicate: { message: "no paint" } };
      return failed(generated("local/crasher", { providerOptions }));
    },
    async idempotency_key() {
      const prompt = unique();
      for (let call = 0; call < 2; call += 1) await keyed(prompt, prompt);
      assert.equal((await creates(prompt)).length, 1);
    },
    async error_unauthorized() {
      const stranger = createReplicate({ apiToken: "nobody", baseURL: API_URL });
      await assert.rejects(generated("local/painter", {}, stranger), { statusCode: 401 });
    },
    async error_not_found() {
      await assert.rejects(generated("local/unknown"), { statusCode: 404 });
    },
    async error_invalid_input() {
      await assert.rejects(generated("local/painter", { seed: -1 }), ({ statusCode, message, responseBody }) => {
        assert.equal(statusCode, 422);
        assert.match(`${message} ${responseBody}`, /input\.seed/);
        return true;
      });
    },
  });
}
