/** The API of this stack, as the console calls it. */

export interface Cost {
  micro_dollars: number | null;
  reason: string | null;
  price: string | null;
}

export interface OutputFile {
  path: string;
  key?: string;
  bytes?: number;
  sha256?: string;
  content_type?: string;
  error?: string;
}

export type Status = "starting" | "processing" | "succeeded" | "failed" | "canceled" | "aborted";

export interface Prediction {
  id: string;
  model: string;
  version: string;
  deployment?: string;
  input: Record<string, unknown>;
  output?: unknown;
  logs: string;
  error: string | null;
  status: Status;
  created_at: string;
  started_at?: string | null;
  completed_at?: string | null;
  metrics?: Record<string, unknown>;
  cost?: Cost;
  labels?: Record<string, string>;
  data_removed: boolean;
  origin: string;
  deadline: string;
  webhook?: string;
  urls: { get: string; cancel: string };
  output_files: OutputFile[];
}

export interface Batch {
  id: string;
  status: string;
  recipe: string | null;
  total: number | null;
  counts: Record<string, number> | null;
  attempt: number;
  cancel_requested: boolean;
  error: string | null;
  results: { uri: string; url: string } | null;
  created_at: string;
  completed_at: string | null;
}

export interface PipelineStep {
  name: string;
  status: string;
  needs: string[];
  predictions: string[];
  output: unknown;
  error: string | null;
  seconds: number | null;
  cost: Cost | null;
}

export interface Pipeline {
  id: string;
  status: string;
  error: string | null;
  created_at: string;
  completed_at: string | null;
  input?: unknown;
  steps?: PipelineStep[];
  cost?: Cost | null;
}

export interface Recipe {
  name: string;
  model?: string;
  version?: string;
  deployment?: string;
  input: Record<string, unknown>;
  s3?: unknown;
  schedule?: unknown;
  pattern?: unknown;
  state: string;
  deployed: boolean;
  updated_at: string;
}

export interface Model {
  owner: string;
  name: string;
  description: string | null;
  cover_image_url?: string | null;
  latest_version?: { id: string; openapi_schema?: unknown } | null;
}

export interface Page<T> {
  previous: string | null;
  next: string | null;
  results: T[];
}

/** A refusal: an RFC 7807 problem, or that there was no response. */
export class Problem extends Error {
  constructor(
    readonly status: number,
    detail: string,
    readonly fields: Record<string, string> = {},
    readonly retryAfter: number | null = null,
  ) {
    super(detail);
  }
}

const BASE = document.querySelector<HTMLMetaElement>('meta[name="api"]')?.content ?? "";
const TOKEN = "token";

export const apiUrl = location.origin + BASE;

/** The access token lives as long as the tab: `sessionStorage` is neither shared with other tabs nor kept. */
export const session = {
  get token(): string | null {
    return sessionStorage.getItem(TOKEN);
  },
  begin(token: string): void {
    sessionStorage.setItem(TOKEN, token);
  },
  end(): void {
    sessionStorage.removeItem(TOKEN);
  },
};

interface Call {
  method?: "GET" | "POST" | "PUT" | "DELETE";
  body?: unknown;
  headers?: Record<string, string>;
  signal?: AbortSignal;
}

/** Calls the API: a path such as `/predictions`, or a link of a response, of which only path and query are used. */
export async function call<T>(path: string, { method = "GET", body, headers = {}, signal }: Call = {}): Promise<T> {
  const sent: Record<string, string> = { ...headers, Authorization: `Bearer ${session.token ?? ""}` };
  if (body !== undefined) sent["Content-Type"] = "application/json";
  let response: Response;
  try {
    response = await fetch(BASE + within(path), {
      method,
      headers: sent,
      body: body === undefined ? null : JSON.stringify(body),
      signal: signal ?? null,
      cache: "no-store",
      credentials: "omit",
      referrerPolicy: "no-referrer",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Problem(0, "The API could not be reached. Is this machine online?");
  }
  if (response.status === 204) return undefined as T;
  const text = await response.text();
  if (response.ok) return JSON.parse(text) as T;
  throw problemOf(response, text);
}

/** The token of a link's query would be sent to whoever the link names: only this stack's own paths are called. */
function within(path: string): string {
  if (path.startsWith("/")) return path;
  const url = new URL(path);
  return url.pathname.slice(url.pathname.startsWith(`${BASE}/`) ? BASE.length : 0) + url.search;
}

function problemOf(response: Response, text: string): Problem {
  let body: { detail?: unknown; title?: unknown; invalid_fields?: unknown } = {};
  try {
    body = JSON.parse(text);
  } catch {
    // not of this API, as a proxy's page
  }
  const fields: Record<string, string> = {};
  if (Array.isArray(body.invalid_fields)) {
    for (const each of body.invalid_fields) fields[String(each.field)] = String(each.detail);
  }
  const detail = String(body.detail ?? body.title ?? `The API responded with ${response.status}.`);
  const after = Number(response.headers.get("Retry-After"));
  return new Problem(response.status, detail, fields, Number.isFinite(after) && after > 0 ? after : null);
}

/** Uploads a file and returns its URL, which models can read. */
export async function upload(file: File, progress: (share: number) => void): Promise<string> {
  const type = file.type || "application/octet-stream";
  const made = await call<{
    urls: { get: string };
    upload: { url: string; headers: Record<string, string> };
    download_url?: string;
  }>("/uploads", { method: "POST", body: { filename: file.name, size: file.size, type } });
  await put(made.upload.url, made.upload.headers, file, progress);
  return made.urls.get;
}

function put(url: string, headers: Record<string, string>, file: File, progress: (share: number) => void): Promise<void> {
  // fetch tells no progress of what is sent.
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("PUT", url);
    for (const [name, value] of Object.entries(headers)) {
      if (!/^(content-length|host)$/i.test(name)) request.setRequestHeader(name, value);
    }
    request.upload.onprogress = (event) => progress(event.lengthComputable ? event.loaded / event.total : 0);
    request.onload = () =>
      request.status < 300 ? resolve() : reject(new Problem(request.status, `S3 refused the file (${request.status}).`));
    request.onerror = () => reject(new Problem(0, "The file could not be sent to S3."));
    request.send(file);
  });
}
