/** What pages share: loading, polling and the route. */

import { useCallback, useEffect, useRef, useState } from "preact/hooks";
import { call, Problem, type Page } from "./api";

export interface Loaded<T> {
  value: T | null;
  problem: Problem | null;
  reload: () => void;
}

const WORST_SECONDS = 60;

/** Loads a path, and again each `seconds` while `live` says so and the tab is visible; a refusal doubles the wait. */
export function useLoaded<T>(path: string | null, live: (value: T) => boolean = () => false, seconds = 2): Loaded<T> {
  const [value, setValue] = useState<T | null>(null);
  const [problem, setProblem] = useState<Problem | null>(null);
  const [turn, setTurn] = useState(0);
  const isLive = useRef(live);
  isLive.current = live;
  useEffect(() => setValue(null), [path]);
  useEffect(() => {
    if (path === null) return;
    const stop = new AbortController();
    let timer = 0;
    let wait = seconds;
    const load = async (): Promise<void> => {
      try {
        const found = await call<T>(path, { signal: stop.signal });
        setValue(found);
        setProblem(null);
        wait = seconds;
        if (isLive.current(found)) again();
      } catch (error) {
        if (stop.signal.aborted) return;
        const refused = error instanceof Problem ? error : new Problem(0, String(error));
        setProblem(refused);
        wait = Math.min(WORST_SECONDS, Math.max(wait * 2, refused.retryAfter ?? 0));
        if (refused.status === 0 || refused.status === 429 || refused.status >= 500) again();
      }
    };
    const again = (): void => {
      timer = window.setTimeout(() => (document.hidden ? again() : void load()), wait * 1000);
    };
    void load();
    return () => {
      stop.abort();
      window.clearTimeout(timer);
    };
  }, [path, seconds, turn]);
  return { value, problem, reload: useCallback(() => setTurn((n) => n + 1), []) };
}

export interface Listed<T> {
  items: T[];
  more: (() => void) | null;
  loading: boolean;
  problem: Problem | null;
  reload: () => void;
}

/** Loads a list page by page; its first page again each `seconds` while one of its items is open. */
export function useListed<T extends { id?: string; name?: string }>(
  path: string,
  open: (item: T) => boolean,
  seconds = 3,
): Listed<T> {
  const first = useLoaded<Page<T>>(path, (page) => page.results.some(open), seconds);
  const [older, setOlder] = useState<T[]>([]);
  const [next, setNext] = useState<string | null | undefined>(undefined);
  const [loading, setLoading] = useState(false);
  const [problem, setProblem] = useState<Problem | null>(null);
  useEffect(() => {
    setOlder([]);
    setNext(undefined);
  }, [path]);
  const following = next === undefined ? (first.value?.next ?? null) : next;
  const load = async (from: string): Promise<void> => {
    setLoading(true);
    try {
      const page = await call<Page<T>>(from);
      setOlder((known) => [...known, ...page.results]);
      setNext(page.next);
      setProblem(null);
    } catch (error) {
      setProblem(error instanceof Problem ? error : new Problem(0, String(error)));
    } finally {
      setLoading(false);
    }
  };
  const key = (item: T): string => item.id ?? item.name ?? "";
  const newest = first.value?.results ?? [];
  const seen = new Set(newest.map(key));
  return {
    items: [...newest, ...older.filter((item) => !seen.has(key(item)))],
    more: following && !loading ? () => void load(following) : null,
    loading: loading || (first.value === null && first.problem === null),
    problem: problem ?? first.problem,
    reload: first.reload,
  };
}

export interface Route {
  path: string[];
  query: URLSearchParams;
}

function routeOf(hash: string): Route {
  const [path = "", query = ""] = hash.replace(/^#\/?/, "").split("?", 2);
  return { path: path.split("/").filter(Boolean).map(decoded), query: new URLSearchParams(query) };
}

function decoded(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** The route behind `#/`. */
export function useRoute(): Route {
  const [route, setRoute] = useState(() => routeOf(location.hash));
  useEffect(() => {
    const changed = (): void => setRoute(routeOf(location.hash));
    window.addEventListener("hashchange", changed);
    return () => window.removeEventListener("hashchange", changed);
  }, []);
  return route;
}

/** Makes a link of the console: each part of the path is escaped, so that a hostile id stays one part. */
export function href(path: string[], query: Record<string, string> = {}): string {
  const asked = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== "")).toString();
  return `#/${path.map(encodeURIComponent).join("/")}${asked ? `?${asked}` : ""}`;
}

export function go(path: string[], query: Record<string, string> = {}): void {
  location.hash = href(path, query);
}
