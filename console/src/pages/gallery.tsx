import type { JSX } from "preact";
import { useState } from "preact/hooks";
import type { Prediction } from "../api";
import { ago, costOf } from "../format";
import { go, href, useListed, type Route } from "../hooks";
import { linksOf, MediaFile, textOf } from "../media";
import { isOpen, More, Refusal, StatusMark, Title } from "../ui";

const STATUSES = ["starting", "processing", "succeeded", "failed", "canceled"];
const FILTERS = ["status", "model", "label", "created_after", "created_before"] as const;

/** The newest predictions as pictures; its filters are in the address, so that a view can be sent to others. */
export function Gallery({ route }: { route: Route }): JSX.Element {
  const asked = Object.fromEntries(FILTERS.map((name) => [name, route.query.get(name) ?? ""]));
  const kind = route.path[0] === "trainings" ? "trainings" : "predictions";
  const given = new URLSearchParams(Object.entries(asked).filter(([, value]) => value));
  const list = useListed<Prediction>(`/${kind}${given.size > 0 ? `?${given}` : ""}`, (each) => isOpen(each.status));
  return (
    <>
      <Title>{kind === "trainings" ? "Trainings" : "Gallery"}</Title>
      <Filters asked={asked} kind={kind} />
      <Refusal problem={list.problem} />
      {!list.loading && list.items.length === 0 && !list.problem && (
        <p class="empty">
          Nothing here. <a href={href(["run"])}>Run a model</a>.
        </p>
      )}
      <ul class="gallery">
        {list.items.map((each) => (
          <li key={each.id}>
            <Tile prediction={each} />
          </li>
        ))}
      </ul>
      <More more={list.more} loading={list.loading} />
    </>
  );
}

function Filters({ asked, kind }: { asked: Record<string, string>; kind: string }): JSX.Element {
  const [draft, setDraft] = useState(asked);
  const field = (name: string, label: string, props: JSX.IntrinsicElements["input"] = {}): JSX.Element => (
    <label>
      {label}
      <input
        name={name}
        value={draft[name] ?? ""}
        onInput={(event) => setDraft({ ...draft, [name]: event.currentTarget.value })}
        {...props}
      />
    </label>
  );
  return (
    <form
      class="filters"
      aria-label="Filters"
      onSubmit={(event) => {
        event.preventDefault();
        go([kind], draft);
      }}
    >
      <label>
        Status
        <select
          value={draft["status"]}
          onChange={(event) => {
            const status = event.currentTarget.value;
            setDraft({ ...draft, status });
            go([kind], { ...draft, status });
          }}
        >
          <option value="">all</option>
          {STATUSES.map((status) => (
            <option key={status}>{status}</option>
          ))}
        </select>
      </label>
      {field("model", "Model", { placeholder: "owner/name" })}
      {kind === "predictions" && field("created_after", "From", { type: "date" })}
      {kind === "predictions" && field("created_before", "Before", { type: "date" })}
      <button type="submit" class="secondary">
        Filter
      </button>
    </form>
  );
}

function Tile({ prediction }: { prediction: Prediction }): JSX.Element {
  const link = linksOf(prediction.output)[0];
  const text = textOf(prediction.output) ?? prediction.error ?? lastLine(prediction.logs);
  return (
    <article class="tile">
      <a href={href([kindOf(prediction), prediction.id])}>
        <div class="preview">
          {link ? (
            <MediaFile url={link} files={prediction.output_files} alt="" />
          ) : (
            <p class="text" aria-busy={isOpen(prediction.status)}>
              {text?.slice(0, 300)}
            </p>
          )}
        </div>
        <span class="name">{prediction.model || prediction.deployment}</span>
        <span class="meta">
          <StatusMark status={prediction.status} /> {ago(prediction.created_at)} {costOf(prediction.cost)}
        </span>
      </a>
    </article>
  );
}

export function kindOf(prediction: Prediction): string {
  return prediction.urls.get.includes("/trainings/") ? "trainings" : "predictions";
}

function lastLine(logs: string): string | undefined {
  return logs.trimEnd().split("\n").pop();
}
