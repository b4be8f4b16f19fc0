import type { JSX } from "preact";
import { useState } from "preact/hooks";
import { call, type Recipe } from "../api";
import { ago, json } from "../format";
import { go, href, useListed, useLoaded } from "../hooks";
import { Action, More, Refusal, Title } from "../ui";

export function Recipes(): JSX.Element {
  const list = useListed<Recipe>("/recipes", () => false);
  return (
    <>
      <Title>Recipes</Title>
      <p>
        <a href={href(["recipes", "new"])}>New recipe</a>
      </p>
      <Refusal problem={list.problem} />
      {!list.loading && list.items.length === 0 && !list.problem && <p class="empty">No recipe yet.</p>}
      <ul class="rows">
        {list.items.map((recipe) => (
          <li key={recipe.name}>
            <a href={href(["recipes", recipe.name])}>
              <strong>{recipe.name}</strong> {recipe.model ?? recipe.version ?? recipe.deployment} · {triggerOf(recipe)} ·{" "}
              {ago(recipe.updated_at)}
              {recipe.state === "active" ? "" : ` · ${recipe.state}`}
            </a>
          </li>
        ))}
      </ul>
      <More more={list.more} loading={list.loading} />
    </>
  );
}

function triggerOf(recipe: Recipe): string {
  if (recipe.s3) return "a file in S3";
  if (recipe.schedule) return "a schedule";
  if (recipe.pattern) return "an event";
  return "by name";
}

const SHOWN_ONLY = new Set(["id", "name", "state", "deployed", "created_at", "updated_at", "urls"]);
const EXAMPLE = { model: "owner/name", input: { prompt: "{{ object.key }}" }, s3: { prefix: "photos/" } };

export function RecipePage({ name }: { name: string }): JSX.Element {
  const fresh = name === "new";
  const { value, problem } = useLoaded<Recipe>(fresh ? null : `/recipes/${encodeURIComponent(name)}`);
  return (
    <>
      <Title>{fresh ? "New recipe" : name}</Title>
      <Refusal problem={problem} />
      {fresh && <Editor first={EXAMPLE} name="" />}
      {value && (
        <Editor
          name={name}
          first={Object.fromEntries(Object.entries(value).filter(([key]) => !SHOWN_ONLY.has(key)))}
          deployed={value.deployed}
        />
      )}
    </>
  );
}

function Editor({ first, name, deployed = false }: { first: unknown; name: string; deployed?: boolean }): JSX.Element {
  const [called, setCalled] = useState(name);
  const [text, setText] = useState(() => json(first));
  if (deployed) {
    return (
      <>
        <p>It was deployed with the stack: change it there.</p>
        <pre tabIndex={0}>{text}</pre>
      </>
    );
  }
  return (
    <form onSubmit={(event) => event.preventDefault()}>
      {!name && (
        <label>
          Name
          <input value={called} pattern="[a-z0-9][a-z0-9\-]{0,62}" onInput={(event) => setCalled(event.currentTarget.value)} />
        </label>
      )}
      <label>
        Definition
        <textarea rows={16} class="code" spellcheck={false} value={text} onInput={(event) => setText(event.currentTarget.value)} />
      </label>
      <Action
        kind="primary"
        run={async () => {
          const body = JSON.parse(text) as Record<string, unknown>;
          if (name) await call(`/recipes/${encodeURIComponent(name)}`, { method: "PUT", body });
          else await call("/recipes", { method: "POST", body: { name: called, ...body } });
          go(["recipes"]);
        }}
      >
        Save
      </Action>
      {name && (
        <Action
          kind="danger"
          confirm={`Delete ${name} and its triggers?`}
          run={async () => {
            await call(`/recipes/${encodeURIComponent(name)}`, { method: "DELETE" });
            go(["recipes"]);
          }}
        >
          Delete
        </Action>
      )}
    </form>
  );
}
