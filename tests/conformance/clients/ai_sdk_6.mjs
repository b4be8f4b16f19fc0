// The Vercel AI SDK, major version 6: see support/ai_sdk.mjs.

// /// client
// title = "Vercel AI SDK 6"
// packages = ["@ai-sdk/replicate@2.0.57", "ai@6.0.325", "zod@4.1.12"]
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

// It reads nothing but the output of the create, which has to be there.
const slow = async (generated) => {
  await assert.rejects(generated, /Invalid JSON response/);
  return "fails: takes a create that is answered `starting` for an error, instead of polling";
};

const failed = async (generated) => {
  await assert.rejects(generated, /Invalid JSON response/);
  return "fails without the model's error: takes the answer for an invalid one";
};

await runFlows({ generateImage, createReplicate, replicate, keyed, slow, failed });
