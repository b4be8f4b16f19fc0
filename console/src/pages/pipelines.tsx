import type { JSX } from "preact";
import { call, type Pipeline, type PipelineStep } from "../api";
import { ago, costOf } from "../format";
import { href, useListed, useLoaded } from "../hooks";
import { Output } from "../media";
import { Action, More, Refusal, StatusMark, Title } from "../ui";

const running = (pipeline: Pipeline): boolean => pipeline.status === "running";

export function Pipelines(): JSX.Element {
  const list = useListed<Pipeline>("/pipelines", running);
  return (
    <>
      <Title>Pipelines</Title>
      <Refusal problem={list.problem} />
      {!list.loading && list.items.length === 0 && !list.problem && <p class="empty">No pipeline yet.</p>}
      <ul class="rows">
        {list.items.map((pipeline) => (
          <li key={pipeline.id}>
            <a href={href(["pipelines", pipeline.id])}>
              <StatusMark status={pipeline.status} /> <code>{pipeline.id}</code> {ago(pipeline.created_at)}
            </a>
            {pipeline.error && <small>{pipeline.error}</small>}
          </li>
        ))}
      </ul>
      <More more={list.more} loading={list.loading} />
    </>
  );
}

export function PipelinePage({ id }: { id: string }): JSX.Element {
  const path = `/pipelines/${encodeURIComponent(id)}`;
  const { value, problem, reload } = useLoaded<Pipeline>(path, running);
  return (
    <>
      <Title>Pipeline</Title>
      <Refusal problem={problem} />
      {value && (
        <>
          <p aria-live="polite">
            <StatusMark status={value.status} /> <code>{value.id}</code> {costOf(value.cost)}
          </p>
          {value.error && <p class="refusal">{value.error}</p>}
          {running(value) && (
            <Action
              run={async () => {
                await call(`${path}/cancel`, { method: "POST" });
                reload();
              }}
            >
              Cancel
            </Action>
          )}
          <Graph steps={value.steps ?? []} />
          {(value.steps ?? []).map((step) => (
            <section key={step.name} aria-label={step.name} class="step">
              <h2>{step.name}</h2>
              <p>
                <StatusMark status={step.status} /> {costOf(step.cost)} {step.seconds === null ? "" : `${step.seconds} s`}{" "}
                {step.predictions.slice(0, 20).map((each, n) => (
                  <a key={each} href={href(["predictions", each])}>
                    prediction {n + 1}{" "}
                  </a>
                ))}
              </p>
              {step.error && <p class="refusal">{step.error}</p>}
              <Output output={step.output} files={[]} alt={`Output of ${step.name}`} />
            </section>
          ))}
        </>
      )}
    </>
  );
}

const WIDTH = 150;
const HEIGHT = 44;
const GAP_X = 60;
const GAP_Y = 20;

/** The steps from left to right, by how many steps they wait for; the same facts are in the list below it. */
function Graph({ steps }: { steps: PipelineStep[] }): JSX.Element | null {
  if (steps.length < 2) return null;
  const depth = new Map<string, number>();
  const byName = new Map(steps.map((step) => [step.name, step]));
  const depthOf = (name: string, above: number): number => {
    const known = depth.get(name);
    if (known !== undefined) return known;
    const needs = byName.get(name)?.needs ?? [];
    // A definition has no circle; a response that had one must not hang the page.
    const found = above > steps.length ? 0 : Math.max(-1, ...needs.map((each) => depthOf(each, above + 1))) + 1;
    depth.set(name, found);
    return found;
  };
  const rows = new Map<number, number>();
  const places = new Map<string, { x: number; y: number }>();
  for (const step of steps) {
    const column = depthOf(step.name, 0);
    const row = rows.get(column) ?? 0;
    rows.set(column, row + 1);
    places.set(step.name, { x: column * (WIDTH + GAP_X), y: row * (HEIGHT + GAP_Y) });
  }
  const width = (Math.max(...depth.values()) + 1) * (WIDTH + GAP_X) - GAP_X;
  const height = Math.max(...rows.values()) * (HEIGHT + GAP_Y) - GAP_Y;
  return (
    <div class="scroll" tabIndex={0} role="region" aria-label="Graph of the steps">
      <svg viewBox={`-2 -2 ${width + 4} ${height + 4}`} width={width + 4} height={height + 4} role="img" aria-label="Steps and what they wait for" class="graph">
        {steps.flatMap((step) =>
          step.needs.map((need) => {
            const from = places.get(need);
            const to = places.get(step.name);
            if (!from || !to) return null;
            const [x1, y1, x2, y2] = [from.x + WIDTH, from.y + HEIGHT / 2, to.x, to.y + HEIGHT / 2];
            return <path key={`${need} ${step.name}`} d={`M${x1} ${y1} C${x1 + 30} ${y1} ${x2 - 30} ${y2} ${x2} ${y2}`} />;
          }),
        )}
        {steps.map((step) => {
          const place = places.get(step.name);
          if (!place) return null;
          return (
            <g key={step.name} transform={`translate(${place.x} ${place.y})`} class={step.status}>
              <rect width={WIDTH} height={HEIGHT} rx={8} />
              <text x={WIDTH / 2} y={HEIGHT / 2 + 5} text-anchor="middle">
                {step.name.length > 18 ? `${step.name.slice(0, 17)}…` : step.name}
              </text>
            </g>
          );
        })}
      </svg>
    </div>
  );
}
