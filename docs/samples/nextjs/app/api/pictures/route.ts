// POST /api/pictures {"prompt", "key"}: generate a picture on the stack, and stream its progress to the page.
//
// The response has one JSON object a line: {"progress"} while the model runs, at last {"picture", "mediaType"} or
// {"error"}. The AI SDK polls the stack; its own polls show how far the model is. The access token stays on the server:
// it is read from REPLICATE_API_TOKEN, and REPLICATE_BASE_URL is the stack's output ApiUrl.

import { createReplicate } from "@ai-sdk/replicate";
import { generateImage } from "ai";

export const maxDuration = 300; // seconds, if the host of the app allows as many

type Line = { progress: string } | { picture: string; mediaType: string } | { error: string };

export async function POST(request: Request): Promise<Response> {
  // Check the session of the app's user here: each call of this route costs a prediction.
  const { prompt, key } = (await request.json()) as { prompt?: unknown; key?: unknown };
  if (typeof prompt !== "string" || !prompt || typeof key !== "string" || !/^[\w-]{16,128}$/.test(key)) {
    return Response.json({ error: "prompt must be a text, and key 16 to 128 of A-Z, a-z, 0-9, _ and -" }, { status: 400 });
  }
  const gone = new AbortController();
  const encoder = new TextEncoder();
  const lines = new ReadableStream<Uint8Array>({
    async start(controller) {
      const send = (line: Line) => {
        if (!gone.signal.aborted) controller.enqueue(encoder.encode(`${JSON.stringify(line)}\n`));
      };
      try {
        const { base64, mediaType } = await generated(prompt, key, gone.signal, (progress) => send({ progress }));
        send({ picture: base64, mediaType });
      } catch (error) {
        send({ error: error instanceof Error ? error.message : String(error) });
      }
      if (!gone.signal.aborted) controller.close();
    },
    // The visitor has left. The prediction completes all the same, and the same key returns it.
    cancel: () => gone.abort(),
  });
  return new Response(lines, { headers: { "Content-Type": "application/x-ndjson", "Cache-Control": "no-store" } });
}

async function generated(prompt: string, key: string, abortSignal: AbortSignal, onProgress: (text: string) => void) {
  const { REPLICATE_BASE_URL, REPLICATE_API_TOKEN, MODEL = "black-forest-labs/flux-schnell" } = process.env;
  if (!REPLICATE_BASE_URL || !REPLICATE_API_TOKEN) throw new Error("REPLICATE_BASE_URL or REPLICATE_API_TOKEN is not set");
  const watched: typeof fetch = async (input, init) => {
    const response = await fetch(input, { ...init, cache: "no-store" });
    if (response.ok && response.headers.get("content-type")?.includes("json")) {
      const { status, logs } = (await response.clone().json()) as { status: string; logs?: string | null };
      onProgress(logs?.trim().split("\n").at(-1) || status);
    }
    return response;
  };
  const replicate = createReplicate({ apiToken: REPLICATE_API_TOKEN, baseURL: REPLICATE_BASE_URL, fetch: watched });
  const { image } = await generateImage({
    model: replicate.image(MODEL as `${string}/${string}`),
    prompt,
    abortSignal,
    // All attempts of one picture, those of the SDK and of the page, are one prediction.
    headers: { "Idempotency-Key": key },
    // Poll from the first second on, instead of waiting for the result without progress.
    providerOptions: { replicate: { maxWaitTimeInSeconds: 1, pollIntervalMillis: 1000, maxPollAttempts: 280 } },
  });
  return image;
}
