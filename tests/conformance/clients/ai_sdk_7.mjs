// The Vercel AI SDK, major version 7: see support/ai_sdk.mjs.

// /// client
// title = "Vercel AI SDK 7"
// packages = ["@ai-sdk/replicate@3.0.46", "ai@7.0.173", "zod@4.1.12"]
// ///

import assert from "node:assert/strict";
import { createReplicate } from "@ai-sdk/replicate";
import { generateImage } from "ai";
import { runFlows } from "../support/ai_sdk.mjs";
import { ACCESS_TOKEN, API_URL } from "../support/flows.mjs";

// docs:point
const replicate = createReplicate({ apiToken: ACCESS_TOKEN, baseURL: API_URL });
// docs:end

const keyed = (prompt, key) => {
  // docs:key
  const headers = { "Idempotency-Key": key };
  return generateImage({ model: replicate.image("local/painter"), prompt, headers });
  // docs:end
};

const slow = async (generated) => {
  assert.equal((await generated).length, 1);
};

const failed = (generated) => assert.rejects(generated, /failed: .*no paint/);

await runFlows({ generateImage, createReplicate, replicate, keyed, slow, failed });
