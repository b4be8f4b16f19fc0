// What the flows of every client in JavaScript share; see flows.py, which has the same for those in Python.

import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";

export const { API_URL, ACCESS_TOKEN, WEAK_TOKEN, RECORD_URL, LIVE } = process.env;
assert(API_URL && ACCESS_TOKEN && WEAK_TOKEN && RECORD_URL, "see flows.py for the environment");

export const NOT_OFFERED = "–";
export const NARRATION = { prompt: "a fox", words_total: 10, seconds: 5 };

// Runs the flows that are named on the command line, or all that are possible here.
export async function run(flows) {
  for (const flow of process.argv.length > 2 ? process.argv.slice(2) : Object.keys(flows)) {
    if (flow.startsWith("live_") && !LIVE) continue;
    let ok = true;
    let detail;
    try {
      detail = (await flows[flow]()) ?? "";
    } catch (error) {
      ok = false;
      detail = String(error?.stack ?? error);
    }
    process.stdout.write(`${JSON.stringify({ flow, ok, detail })}\n`);
  }
}

export const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

// A prompt that no other request has; as a key, too.
export const unique = () => `fox-${randomUUID()}`;

export async function fetched(url) {
  const answer = await fetch(url);
  assert.equal(answer.status, 200, `${url} is answered ${answer.status}`);
  return Buffer.from(await answer.arrayBuffer());
}

export async function assertPicture(url) {
  // On AWS a FileOutput; the local cloud's URLs are http, which clients leave as text.
  const bytes = await fetched(String(url));
  assert.deepEqual([...bytes.subarray(1, 4)], [...Buffer.from("PNG")], `${url} is no PNG`);
  return bytes;
}

export async function ended(get, id) {
  for (const deadline = Date.now() + 240_000; Date.now() < deadline; ) {
    const found = await get(id);
    if (["succeeded", "failed", "canceled"].includes(found.status)) return found;
    await pause(300);
  }
  return assert.fail(`${id} did not end within 240 s`);
}

// The requests that the stand-in for Replicate got, oldest first.
export const record = async () => (await (await fetch(RECORD_URL)).json()).requests;

// The creates at Replicate whose input has a prompt.
export async function creates(prompt) {
  const posted = (await record()).filter(({ method, path }) => method === "POST" && path.endsWith("/predictions"));
  return posted.filter(({ body }) => body?.input?.prompt === prompt);
}

// How a client identified itself to the host of streams: `missing`, `wrong` (a token that is not Replicate's), or
// undefined if it did not connect.
export async function streamReader(streamed) {
  const before = (await record()).length;
  await streamed();
  const readers = (await record()).slice(before).filter(({ path }) => path.startsWith("/stream/"));
  return readers.at(-1)?.authorization;
}

// What was seen of something while `processing` grew.
export function growing(values) {
  const lengths = values.map((value) => value?.length ?? 0);
  assert.deepEqual(lengths, lengths.toSorted((a, b) => a - b));
  assert(new Set(lengths).size >= 3, `seen while processing: ${lengths}`);
}
