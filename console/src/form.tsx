/** A form made from a model's input schema. */

import type { JSX } from "preact";
import { useId, useState } from "preact/hooks";
import { Problem, upload } from "./api";
import { json } from "./format";
import type { FieldSpec } from "./schema";

export function Form({
  fields,
  values,
  errors,
  change,
}: {
  fields: FieldSpec[];
  values: Record<string, unknown>;
  errors: Record<string, string>;
  change: (name: string, value: unknown) => void;
}): JSX.Element {
  return (
    <>
      {fields.map((field) => (
        <Field
          key={field.name}
          field={field}
          value={values[field.name]}
          error={errors[field.name] ?? null}
          change={(value) => change(field.name, value)}
        />
      ))}
    </>
  );
}

interface FieldProps {
  field: FieldSpec;
  value: unknown;
  error: string | null;
  change: (value: unknown) => void;
}

function Field({ field, value, error, change }: FieldProps): JSX.Element {
  const id = useId();
  const about = `${id}-about`;
  const described = {
    id,
    name: field.name,
    "aria-describedby": about,
    ...(error ? { "aria-invalid": true as const } : {}),
  };
  const text = value === undefined || value === null ? "" : typeof value === "object" ? json(value) : String(value);
  const input = (): JSX.Element => {
    switch (field.kind) {
      case "boolean":
        return (
          <input
            type="checkbox"
            role="switch"
            checked={value === true}
            onChange={(event) => change(event.currentTarget.checked)}
            {...described}
          />
        );
      case "choice":
        return (
          <select
            value={text}
            onChange={(event) => change(field.choices.find((each) => String(each) === event.currentTarget.value) ?? "")}
            {...described}
          >
            {!field.required && <option value="">(default)</option>}
            {field.choices.map((each) => (
              <option key={each} value={String(each)}>
                {each}
              </option>
            ))}
          </select>
        );
      case "integer":
      case "number":
        return (
          <input
            type="number"
            value={text}
            step={field.kind === "integer" ? 1 : "any"}
            min={field.minimum ?? undefined}
            max={field.maximum ?? undefined}
            onInput={(event) => change(event.currentTarget.value)}
            {...described}
          />
        );
      case "long":
      case "json":
        return <textarea rows={3} value={text} onInput={(event) => change(event.currentTarget.value)} {...described} />;
      case "file":
      case "files":
        return <FileInput many={field.kind === "files"} value={value} change={change} described={described} />;
      default:
        return <input type="text" value={text} onInput={(event) => change(event.currentTarget.value)} {...described} />;
    }
  };
  const range = [field.minimum !== null && `from ${field.minimum}`, field.maximum !== null && `up to ${field.maximum}`];
  return (
    <div class="field">
      <label for={id}>
        {field.title}
        {field.required && <span class="required"> (required)</span>}
      </label>
      {input()}
      <small id={about}>
        {error && <strong class="error">{error} </strong>}
        {field.description} {range.filter(Boolean).join(" ")}
      </small>
    </div>
  );
}

function FileInput({
  many,
  value,
  change,
  described,
}: {
  many: boolean;
  value: unknown;
  change: (value: unknown) => void;
  described: { id: string; name: string };
}): JSX.Element {
  const [share, setShare] = useState<number | null>(null);
  const [problem, setProblem] = useState<string | null>(null);
  const [over, setOver] = useState(false);
  const links = Array.isArray(value) ? value.map(String) : value ? [String(value)] : [];
  const take = async (list: FileList | null | undefined): Promise<void> => {
    const files = [...(list ?? [])].slice(0, many ? 20 : 1);
    if (files.length === 0) return;
    setProblem(null);
    const found: string[] = [];
    try {
      for (const file of files) found.push(await upload(file, setShare));
      change(many ? [...links, ...found] : found[0]);
    } catch (error) {
      setProblem(error instanceof Problem ? error.message : String(error));
    } finally {
      setShare(null);
    }
  };
  return (
    <div
      class={over ? "drop over" : "drop"}
      onDragOver={(event) => {
        event.preventDefault();
        setOver(true);
      }}
      onDragLeave={() => setOver(false)}
      onDrop={(event) => {
        event.preventDefault();
        setOver(false);
        void take(event.dataTransfer?.files);
      }}
    >
      <input
        type="text"
        inputMode="url"
        placeholder="https://… or drop a file here"
        value={links.join(" ")}
        onInput={(event) => {
          const given = event.currentTarget.value.trim();
          change(many ? given.split(/\s+/).filter(Boolean) : given);
        }}
        {...described}
      />
      <label class="pick">
        Choose {many ? "files" : "a file"}
        <input type="file" multiple={many} onChange={(event) => void take(event.currentTarget.files)} />
      </label>
      {share !== null && <progress value={share} max={1} aria-label="Upload" />}
      {problem && <p role="alert">{problem}</p>}
    </div>
  );
}
