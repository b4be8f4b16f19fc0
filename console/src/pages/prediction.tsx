import type { JSX } from "preact";
import { call, type Prediction } from "../api";
import { ago, costOf, json, moment, seconds } from "../format";
import { go, href, useLoaded } from "../hooks";
import { Files, Output } from "../media";
import { Action, Copy, Facts, isOpen, Refusal, StatusMark, Title } from "../ui";

/** One prediction or training, live while it runs. */
export function PredictionPage({ kind, id }: { kind: "predictions" | "trainings"; id: string }): JSX.Element {
  const path = `/${kind}/${encodeURIComponent(id)}`;
  const { value, problem, reload } = useLoaded<Prediction>(path, (each) => isOpen(each.status), 1);
  return (
    <>
      <Title>{kind === "trainings" ? "Training" : "Prediction"}</Title>
      <p>
        <code>{id}</code>
      </p>
      <Refusal problem={problem} />
      {value === null ? !problem && <p aria-busy="true">Loading</p> : <Shown prediction={value} kind={kind} reload={reload} />}
    </>
  );
}

function Shown({ prediction, kind, reload }: { prediction: Prediction; kind: string; reload: () => void }): JSX.Element {
  const open = isOpen(prediction.status);
  const model = prediction.model || prediction.deployment || "the model";
  return (
    <>
      <p aria-live="polite">
        <StatusMark status={prediction.status} /> <strong>{model}</strong>
      </p>
      <div class="actions">
        {kind === "predictions" && (
          <button type="button" onClick={() => go(["run"], { from: prediction.id })}>
            Run again
          </button>
        )}
        {open && (
          <Action
            run={async () => {
              await call(`/${kind}/${prediction.id}/cancel`, { method: "POST" });
              reload();
            }}
          >
            Cancel
          </Action>
        )}
        {!open && !prediction.data_removed && kind === "predictions" && (
          <Action
            kind="danger"
            confirm="Delete input, output, logs and files for good?"
            run={async () => {
              await call(`/${kind}/${prediction.id}`, { method: "DELETE" });
              reload();
            }}
          >
            Delete
          </Action>
        )}
        <Copy text={json(prediction)}>Copy JSON</Copy>
      </div>
      <Refusal problem={null} />
      {prediction.error && (
        <div class="refusal">
          <p>{prediction.error}</p>
        </div>
      )}
      {prediction.data_removed && <p>Its input, output, logs and files were deleted.</p>}
      <Output output={prediction.output} files={prediction.output_files} alt={`Output of ${model}`} />
      <Files files={prediction.output_files} />
      <Timeline prediction={prediction} />
      <Facts
        of={[
          ["Cost", costOf(prediction.cost)],
          ["Why", prediction.cost?.reason ?? null],
          ["Price", prediction.cost?.price ?? null],
          ["Version", prediction.version],
          ["Started by", prediction.origin],
          ["Webhook", prediction.webhook ?? null],
          ["Labels", prediction.labels ? json(prediction.labels) : null],
          ["Metrics", prediction.metrics && Object.keys(prediction.metrics).length > 0 ? <code>{json(prediction.metrics)}</code> : null],
        ]}
      />
      <h2>Input</h2>
      <pre tabIndex={0}>{json(prediction.input)}</pre>
      {prediction.logs && (
        <>
          <h2>Logs</h2>
          <pre tabIndex={0} class="logs">
            {prediction.logs}
          </pre>
        </>
      )}
      <p>
        <a href={href([kind])}>All {kind}</a>
      </p>
    </>
  );
}

function Timeline({ prediction }: { prediction: Prediction }): JSX.Element {
  const { created_at, started_at, completed_at, deadline } = prediction;
  const steps: [string, string | null | undefined][] = [
    ["Requested", created_at],
    ["Running", started_at],
    [isOpen(prediction.status) ? "Deadline" : "Completed", isOpen(prediction.status) ? deadline : completed_at],
  ];
  return (
    <ol class="timeline" aria-label="Timeline">
      {steps
        .filter((step): step is [string, string] => Boolean(step[1]))
        .map(([name, time], n) => (
          <li key={name}>
            <span>{name}</span> <time dateTime={time} title={moment(time)}>{n === 0 ? ago(time) : seconds(created_at, time)}</time>
          </li>
        ))}
    </ol>
  );
}
