// Validates state machines with asl-validator and evaluates expressions with jsonata, JSONata's own implementation.
// On standard input: {"definitions": {name: definition}, "expressions": [{"text", "states", "millis"}]};
// on standard output: {"errors": {name: [text]}, "values": [{"value"} or {"error"}]}.
import { readFileSync } from "node:fs";
import validate from "asl-validator";
import jsonata from "jsonata";

const given = JSON.parse(readFileSync(0, "utf8"));
const errors = {};
for (const [name, definition] of Object.entries(given.definitions)) {
  errors[name] = validate(definition).errors.map((error) => `${error["Error code"]}: ${error.Message}`);
}
const values = [];
for (const { text, states, millis } of given.expressions) {
  try {
    const expression = jsonata(text);
    // Step Functions has $parse besides JSONata's own functions; the time is that of the case.
    expression.registerFunction("parse", (json) => JSON.parse(json));
    if (millis !== undefined) expression.registerFunction("millis", () => millis);
    values.push({ value: await expression.evaluate(undefined, { states }) });
  } catch (error) {
    values.push({ error: String(error.message ?? error) });
  }
}
process.stdout.write(JSON.stringify({ errors, values }));
