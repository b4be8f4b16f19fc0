// The page: a prompt, the progress of the model, and the picture. It calls /api/pictures only, and holds no token.

"use client";

import { useRef, useState, type FormEvent } from "react";

type Line = { progress?: string; picture?: string; mediaType?: string; error?: string };

export default function Page() {
  const [progress, setProgress] = useState("");
  const [picture, setPicture] = useState("");
  const [busy, setBusy] = useState(false);
  const asked = useRef({ prompt: "", key: "" });

  async function generate(event: FormEvent<HTMLFormElement>) {
    event.preventDefault();
    const prompt = String(new FormData(event.currentTarget).get("prompt"));
    // A second try of the same prompt keeps its key, so that it returns the prediction of the first one.
    if (asked.current.prompt !== prompt) asked.current = { prompt, key: crypto.randomUUID() };
    setBusy(true);
    setPicture("");
    setProgress("starting");
    try {
      for await (const line of linesOf(await post(asked.current))) {
        if (line.progress) setProgress(line.progress);
        if (line.error) {
          asked.current = { prompt: "", key: "" }; // it has failed: the next try is another prediction
          setProgress(line.error);
        }
        if (line.picture) {
          asked.current = { prompt: "", key: "" };
          setProgress("");
          setPicture(`data:${line.mediaType};base64,${line.picture}`);
        }
      }
    } catch (error) {
      setProgress(`${error}. Try again: it returns the same picture.`);
    }
    setBusy(false);
  }

  return (
    <main>
      <form onSubmit={generate}>
        <input name="prompt" placeholder="a lighthouse at dusk" required maxLength={1000} />
        <button disabled={busy}>Generate</button>
      </form>
      <p role="status">{progress}</p>
      {picture && <img src={picture} alt="the generated picture" />}
    </main>
  );
}

async function post(body: { prompt: string; key: string }): Promise<ReadableStream<Uint8Array>> {
  const headers = { "Content-Type": "application/json" };
  const response = await fetch("/api/pictures", { method: "POST", headers, body: JSON.stringify(body) });
  if (!response.ok || !response.body) throw new Error(`The server responded ${response.status}`);
  return response.body;
}

async function* linesOf(stream: ReadableStream<Uint8Array>): AsyncGenerator<Line> {
  const reader = stream.pipeThrough(new TextDecoderStream() as ReadableWritablePair<string, Uint8Array>).getReader();
  let text = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const lines = (text + part.value).split("\n");
    text = lines.pop() ?? "";
    for (const line of lines) yield JSON.parse(line) as Line;
  }
}
