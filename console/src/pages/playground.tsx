import type { JSX } from "preact";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { apiUrl, call, Problem, type Model, type Page, type Prediction } from "../api";
import { Form } from "../form";
import { costOf } from "../format";
import { go, href, useLoaded, type Route } from "../hooks";
import { Output } from "../media";
import { fieldsOf, inputOf } from "../schema";
import { snippets } from "../snippets";
import { Action, Copy, isOpen, Refusal, StatusMark, Title } from "../ui";

const MODEL = /^[A-Za-z0-9][A-Za-z0-9._-]*\/[A-Za-z0-9][A-Za-z0-9._-]*$/;

export function Playground({ route }: { route: Route }): JSX.Element {
  const from = route.query.get("from");
  const before = useLoaded<Prediction>(from ? `/predictions/${encodeURIComponent(from)}` : null);
  const name = route.query.get("model") ?? before.value?.model ?? "";
  return (
    <>
      <Title>Run a model</Title>
      <Picker chosen={name} />
      <Refusal problem={before.problem} />
      {MODEL.test(name) && (!from || before.value) && (
        <Runner key={`${name} ${from}`} name={name} first={before.value?.input ?? {}} />
      )}
    </>
  );
}

function Picker({ chosen }: { chosen: string }): JSX.Element {
  const [name, setName] = useState(chosen);
  const [query, setQuery] = useState<string | null>(null);
  useEffect(() => setName(chosen), [chosen]);
  const recent = useLoaded<Page<Prediction>>("/predictions");
  const found = useLoaded<{ models?: { model?: Model }[]; results?: Model[] }>(
    query ? `/search?query=${encodeURIComponent(query)}` : null,
  );
  const deployments = useLoaded<Page<{ owner: string; name: string }>>("/deployments");
  const models = [...new Set((recent.value?.results ?? []).map((each) => each.model).filter((each) => MODEL.test(each)))];
  const hits = (found.value?.models ?? []).map((each) => each.model).filter((each) => each !== undefined);
  return (
    <form
      class="picker"
      onSubmit={(event) => {
        event.preventDefault();
        if (MODEL.test(name.trim())) go(["run"], { model: name.trim() });
        else setQuery(name.trim() || null);
      }}
    >
      <label>
        Model
        <input
          list="recent-models"
          value={name}
          placeholder="owner/name, or words to search for"
          onInput={(event) => setName(event.currentTarget.value)}
        />
      </label>
      <datalist id="recent-models">
        {models.map((each) => (
          <option key={each} value={each} />
        ))}
      </datalist>
      <button type="submit">Open</button>
      {models.length > 0 && !chosen && <Choices title="Recent" names={models.slice(0, 8)} />}
      {(deployments.value?.results.length ?? 0) > 0 && !chosen && (
        <Choices title="Deployments" names={(deployments.value?.results ?? []).map((each) => `${each.owner}/${each.name}`)} />
      )}
      <Refusal problem={found.problem} />
      {query && found.value && hits.length === 0 && <p>No model found for “{query}”.</p>}
      {hits.length > 0 && <Choices title="Found" names={hits.map((each) => `${each.owner}/${each.name}`)} />}
    </form>
  );
}

function Choices({ title, names }: { title: string; names: string[] }): JSX.Element {
  return (
    <nav aria-label={title} class="choices">
      <span>{title}: </span>
      {names.map((name) => (
        <a key={name} href={href(["run"], { model: name })}>
          {name}
        </a>
      ))}
    </nav>
  );
}

function Runner({ name, first }: { name: string; first: Record<string, unknown> }): JSX.Element {
  const [owner = "", model = ""] = name.split("/");
  const found = useLoaded<Model>(`/models/${encodeURIComponent(owner)}/${encodeURIComponent(model)}`);
  const fields = useMemo(() => fieldsOf(found.value?.latest_version?.openapi_schema), [found.value]);
  const [values, setValues] = useState<Record<string, unknown>>(first);
  const [raw, setRaw] = useState("{}");
  const [errors, setErrors] = useState<Record<string, string>>({});
  const [runs, setRuns] = useState<string[]>([]);
  const [shown, setShown] = useState<string>("curl");
  // The same until a response has come: pressing again after a lost one starts nothing new.
  const key = useRef(crypto.randomUUID() as string);
  const initial = Object.fromEntries(fields.filter((f) => f.initial !== undefined).map((f) => [f.name, f.initial]));
  const held = { ...initial, ...values };
  const made = (): { input: Record<string, unknown>; errors: Record<string, string> } => {
    if (fields.length > 0) return inputOf(fields, held);
    try {
      return { input: JSON.parse(raw), errors: {} };
    } catch {
      return { input: {}, errors: { input: "Has to be JSON." } };
    }
  };
  const { input } = made();
  const version = found.value?.latest_version?.id;
  const calls = snippets(apiUrl, name, input);
  const run = async (): Promise<void> => {
    const { input: asked, errors: wrong } = made();
    setErrors(wrong);
    if (Object.keys(wrong).length > 0) throw new Problem(422, "Some fields need another value.", wrong);
    try {
      const started = await call<Prediction>(`/models/${owner}/${model}/predictions`, {
        method: "POST",
        body: { input: asked },
        headers: { "Idempotency-Key": key.current },
      });
      key.current = crypto.randomUUID();
      setRuns((known) => [started.id, ...known].slice(0, 12));
    } catch (error) {
      if (error instanceof Problem) {
        if (error.status >= 400 && error.status < 500) key.current = crypto.randomUUID();
        setErrors(Object.fromEntries(Object.entries(error.fields).map(([field, detail]) => [field.replace(/^input\./, ""), detail])));
      }
      throw error;
    }
  };
  if (found.problem) return <Refusal problem={found.problem} />;
  if (found.value === null) return <p aria-busy="true">Loading {name}</p>;
  return (
    <div class="playground">
      <form onSubmit={(event) => event.preventDefault()} aria-label={`Input of ${name}`}>
        <h2>{name}</h2>
        {found.value.description && <p>{found.value.description.slice(0, 500)}</p>}
        {version && <p class="meta">Version {version.slice(0, 12)}</p>}
        {fields.length > 0 ? (
          <Form
            fields={fields}
            values={held}
            errors={errors}
            change={(field, value) => {
              setValues({ ...values, [field]: value });
              setErrors({});
            }}
          />
        ) : (
          <label>
            Input, as JSON
            <textarea rows={8} value={raw} onInput={(event) => setRaw(event.currentTarget.value)} />
          </label>
        )}
        <Action kind="primary" run={run}>
          Run
        </Action>
        <details>
          <summary>The same call as code</summary>
          <div role="group" aria-label="Language">
            {Object.keys(calls).map((each) => (
              <button
                key={each}
                type="button"
                class={each === shown ? "secondary" : "secondary outline"}
                aria-pressed={each === shown}
                onClick={() => setShown(each)}
              >
                {each}
              </button>
            ))}
          </div>
          <pre tabIndex={0}>{calls[shown]}</pre>
          <Copy text={calls[shown] ?? ""}>Copy</Copy>
        </details>
      </form>
      <section aria-label="Runs" class="runs" aria-live="polite">
        {runs.length === 0 && <p class="empty">Runs appear here, side by side.</p>}
        {runs.map((id) => (
          <Run key={id} id={id} />
        ))}
      </section>
    </div>
  );
}

function Run({ id }: { id: string }): JSX.Element {
  const { value, problem } = useLoaded<Prediction>(`/predictions/${id}`, (each) => isOpen(each.status), 1);
  return (
    <article>
      <p>
        {value ? <StatusMark status={value.status} /> : <span aria-busy="true">started</span>} {costOf(value?.cost)}{" "}
        <a href={href(["predictions", id])}>open</a>
      </p>
      <Refusal problem={problem} />
      {value?.error && <p class="refusal">{value.error}</p>}
      {value && <Output output={value.output} files={value.output_files} alt={`Output of ${value.model}`} />}
      {value && isOpen(value.status) && value.logs && <pre class="logs">{value.logs.slice(-600)}</pre>}
    </article>
  );
}
