/** Parts that pages share. */

import type { ComponentChildren, JSX } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { Problem } from "./api";

export function Title({ children }: { children: string }): JSX.Element {
  const heading = useRef<HTMLHeadingElement>(null);
  useEffect(() => {
    document.title = `${children} · Console`;
  }, [children]);
  // A screen reader starts at the new page's heading, as it would after a page load.
  useEffect(() => heading.current?.focus({ preventScroll: true }), []);
  return (
    <h1 tabIndex={-1} ref={heading}>
      {children}
    </h1>
  );
}

const OPEN = new Set(["starting", "processing", "running", "preparing", "finishing", "waiting"]);

export function isOpen(status: string): boolean {
  return OPEN.has(status);
}

export function StatusMark({ status }: { status: string }): JSX.Element {
  return <span class={`status ${isOpen(status) ? "open" : status}`}>{status}</span>;
}

export function Refusal({ problem }: { problem: Problem | null }): JSX.Element | null {
  if (problem === null) return null;
  const { fields } = problem;
  return (
    <div role="alert" class="refusal">
      <p>{problem.message}</p>
      {Object.keys(fields).length > 0 && (
        <ul>
          {Object.entries(fields).map(([field, detail]) => (
            <li key={field}>
              <code>{field}</code>: {detail}
            </li>
          ))}
        </ul>
      )}
    </div>
  );
}

/** A button whose work takes time: it cannot be pressed twice, and shows why its work failed. */
export function Action({
  children,
  run,
  confirm,
  kind = "secondary",
}: {
  children: ComponentChildren;
  run: () => Promise<void>;
  confirm?: string;
  kind?: "secondary" | "primary" | "danger";
}): JSX.Element {
  const [busy, setBusy] = useState(false);
  const [asking, setAsking] = useState(false);
  const [problem, setProblem] = useState<Problem | null>(null);
  const start = async (): Promise<void> => {
    setAsking(false);
    setBusy(true);
    setProblem(null);
    try {
      await run();
    } catch (error) {
      setProblem(error instanceof Problem ? error : new Problem(0, String(error)));
    } finally {
      setBusy(false);
    }
  };
  return (
    <span class="action">
      {asking ? (
        <span role="group" aria-label={confirm ?? ""}>
          {confirm}{" "}
          <button type="button" class="danger" onClick={() => void start()}>
            Yes
          </button>{" "}
          <button type="button" class="secondary outline" onClick={() => setAsking(false)}>
            No
          </button>
        </span>
      ) : (
        <button
          type="button"
          class={kind === "primary" ? "" : `${kind} outline`}
          aria-busy={busy}
          disabled={busy}
          onClick={() => (confirm ? setAsking(true) : void start())}
        >
          {children}
        </button>
      )}
      <Refusal problem={problem} />
    </span>
  );
}

export function Copy({ text, children }: { text: string; children: string }): JSX.Element {
  const [copied, setCopied] = useState(false);
  return (
    <button
      type="button"
      class="secondary outline"
      onClick={() =>
        void navigator.clipboard.writeText(text).then(
          () => setCopied(true),
          () => setCopied(false),
        )
      }
    >
      {copied ? "Copied" : children}
    </button>
  );
}

/** Loads more when it comes into view; also a button, for keyboards. */
export function More({ more, loading }: { more: (() => void) | null; loading: boolean }): JSX.Element | null {
  const end = useRef<HTMLDivElement>(null);
  useEffect(() => {
    if (!more || !end.current) return;
    const seen = new IntersectionObserver((entries) => {
      if (entries.some((entry) => entry.isIntersecting)) more();
    });
    seen.observe(end.current);
    return () => seen.disconnect();
  }, [more]);
  if (loading) return <p aria-busy="true">Loading</p>;
  if (!more) return null;
  return (
    <div ref={end}>
      <button type="button" class="secondary outline" onClick={more}>
        Load more
      </button>
    </div>
  );
}

export function Facts({ of }: { of: [string, ComponentChildren][] }): JSX.Element {
  return (
    <dl class="facts">
      {of
        .filter(([, value]) => value !== null && value !== undefined && value !== "")
        .map(([name, value]) => (
          <div key={name}>
            <dt>{name}</dt>
            <dd>{value}</dd>
          </div>
        ))}
    </dl>
  );
}
