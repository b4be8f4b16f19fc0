/** A model's input schema, as far as a form needs it. */

export type FieldKind = "text" | "long" | "number" | "integer" | "boolean" | "choice" | "file" | "files" | "json";

export interface FieldSpec {
  name: string;
  title: string;
  description: string;
  kind: FieldKind;
  required: boolean;
  initial: unknown;
  choices: (string | number)[];
  minimum: number | null;
  maximum: number | null;
}

type Json = Record<string, unknown>;

const asObject = (value: unknown): Json =>
  value !== null && typeof value === "object" && !Array.isArray(value) ? (value as Json) : {};
const asNumber = (value: unknown): number | null => (typeof value === "number" && Number.isFinite(value) ? value : null);
const asText = (value: unknown): string => (typeof value === "string" ? value : "");

const FIELDS_LIMIT = 200;
const CHOICES_LIMIT = 500;

/** Reads `components.schemas.Input` of a version's OpenAPI document. It is a stranger's: nothing about it is certain. */
export function fieldsOf(document: unknown): FieldSpec[] {
  const schemas = asObject(asObject(asObject(document)["components"])["schemas"]);
  const input = asObject(schemas["Input"]);
  const required = new Set(Array.isArray(input["required"]) ? input["required"] : []);
  return Object.entries(asObject(input["properties"]))
    .slice(0, FIELDS_LIMIT)
    .map(([name, value]) => ({ order: asNumber(asObject(value)["x-order"]) ?? 1e9, field: fieldOf(name, value, schemas, required.has(name)) }))
    .sort((a, b) => a.order - b.order)
    .map(({ field }) => field);
}

function fieldOf(name: string, value: unknown, schemas: Json, required: boolean): FieldSpec {
  const property = resolved(asObject(value), schemas);
  const choices = Array.isArray(property["enum"])
    ? property["enum"].filter((each) => typeof each === "string" || typeof each === "number").slice(0, CHOICES_LIMIT)
    : [];
  return {
    name,
    title: asText(property["title"]) || name,
    description: asText(property["description"]).slice(0, 1000),
    kind: choices.length > 0 ? "choice" : kindOf(name, property),
    required,
    initial: property["default"],
    choices,
    minimum: asNumber(property["minimum"]),
    maximum: asNumber(property["maximum"]),
  };
}

/** cog writes an enum as `allOf: [{$ref}]`. */
function resolved(property: Json, schemas: Json): Json {
  const parts = Array.isArray(property["allOf"]) ? property["allOf"] : [];
  const referred = [property, ...parts].map((part) => asText(asObject(part)["$ref"]).replace("#/components/schemas/", ""));
  const found = referred.filter((each) => each && Object.hasOwn(schemas, each)).map((each) => asObject(schemas[each]));
  return Object.assign({}, ...found, property) as Json;
}

function kindOf(name: string, property: Json): FieldKind {
  switch (property["type"]) {
    case "boolean":
      return "boolean";
    case "integer":
      return "integer";
    case "number":
      return "number";
    case "array":
      return asObject(property["items"])["format"] === "uri" ? "files" : "json";
    case "string":
      if (property["format"] === "uri") return "file";
      return /prompt|text|message|instruction|system/i.test(name) ? "long" : "text";
    default:
      return "json";
  }
}

/** Turns what a form holds into an input; a field that is empty is left out, so that the model's default holds. */
export function inputOf(fields: FieldSpec[], values: Record<string, unknown>): { input: Json; errors: Record<string, string> } {
  const input: Json = {};
  const errors: Record<string, string> = {};
  for (const { name, kind, required, minimum, maximum } of fields) {
    const value = values[name];
    if (value === undefined || value === "" || value === null || (Array.isArray(value) && value.length === 0)) {
      if (required) errors[name] = "Is required.";
      continue;
    }
    if (kind === "number" || kind === "integer") {
      const number = Number(value);
      if (!Number.isFinite(number) || (kind === "integer" && !Number.isInteger(number))) {
        errors[name] = kind === "integer" ? "Has to be a whole number." : "Has to be a number.";
      } else if (minimum !== null && number < minimum) errors[name] = `Has to be at least ${minimum} (got ${number}).`;
      else if (maximum !== null && number > maximum) errors[name] = `Has to be at most ${maximum} (got ${number}).`;
      else input[name] = number;
    } else if (kind === "json" && typeof value === "string") {
      try {
        input[name] = JSON.parse(value);
      } catch {
        errors[name] = "Has to be JSON.";
      }
    } else input[name] = value;
  }
  return { input, errors };
}
