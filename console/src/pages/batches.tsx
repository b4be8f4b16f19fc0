import type { JSX } from "preact";
import { call, type Batch } from "../api";
import { ago, moment } from "../format";
import { href, useListed, useLoaded } from "../hooks";
import { Action, Facts, isOpen, More, Refusal, StatusMark, Title } from "../ui";

const ENDED = new Set(["succeeded", "failed", "canceled", "completed"]);
const running = (batch: Batch): boolean => !ENDED.has(batch.status) || isOpen(batch.status);

export function Batches(): JSX.Element {
  const list = useListed<Batch>("/batches", running);
  return (
    <>
      <Title>Batches</Title>
      <Refusal problem={list.problem} />
      {!list.loading && list.items.length === 0 && !list.problem && <p class="empty">No batch yet.</p>}
      <ul class="rows">
        {list.items.map((batch) => (
          <li key={batch.id}>
            <a href={href(["batches", batch.id])}>
              <StatusMark status={batch.status} /> <code>{batch.id}</code> {ago(batch.created_at)}
            </a>
            <Progress batch={batch} />
          </li>
        ))}
      </ul>
      <More more={list.more} loading={list.loading} />
    </>
  );
}

export function BatchPage({ id }: { id: string }): JSX.Element {
  const path = `/batches/${encodeURIComponent(id)}`;
  const { value, problem, reload } = useLoaded<Batch>(path, running);
  const act = (what: string) => async (): Promise<void> => {
    await call(`${path}/${what}`, { method: "POST" });
    reload();
  };
  return (
    <>
      <Title>Batch</Title>
      <Refusal problem={problem} />
      {value && (
        <>
          <p aria-live="polite">
            <StatusMark status={value.status} /> <code>{value.id}</code>
          </p>
          <Progress batch={value} />
          {value.error && <p class="refusal">{value.error}</p>}
          <div class="actions">
            {running(value) && (
              <Action confirm="Start no further line, and cancel those that run?" run={act("cancel")}>
                Cancel
              </Action>
            )}
            {!running(value) && <Action run={act("retry")}>Retry failed lines</Action>}
            {value.results && (
              <a role="button" class="secondary outline" href={value.results.url} rel="noreferrer noopener" download>
                Download results
              </a>
            )}
          </div>
          <Facts
            of={[
              ["Lines", value.total],
              ["Attempt", value.attempt],
              ["Recipe", value.recipe],
              ["Created", moment(value.created_at)],
              ["Completed", value.completed_at && moment(value.completed_at)],
            ]}
          />
        </>
      )}
    </>
  );
}

function Progress({ batch }: { batch: Batch }): JSX.Element | null {
  const counts = Object.entries(batch.counts ?? {}).filter(([, n]) => n > 0);
  if (!batch.total) return null;
  const done = counts.filter(([name]) => !/pending|running|waiting/.test(name)).reduce((sum, [, n]) => sum + n, 0);
  return (
    <div class="progress">
      <progress value={done} max={batch.total} aria-label={`Lines of ${batch.id} that have ended`} />
      <small>{counts.map(([name, n]) => `${n} ${name}`).join(", ")}</small>
    </div>
  );
}
