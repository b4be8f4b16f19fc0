/** A call of the playground as code, for those who take it from there. The token is never part of it. */

import { json } from "./format";

export function snippets(api: string, model: string, input: Record<string, unknown>): Record<string, string> {
  const body = json({ input });
  return {
    curl: [
      `curl ${shell(`${api}/models/${model}/predictions`)} \\`,
      `  -H "Authorization: Bearer $API_TOKEN" -H 'Content-Type: application/json' \\`,
      `  -d ${shell(body)}`,
    ].join("\n"),
    Python: [
      "import json",
      "import os",
      "",
      "import replicate",
      "",
      `client = replicate.Client(base_url=${JSON.stringify(api.replace(/\/v1$/, ""))}, api_token=os.environ["API_TOKEN"])`,
      `output = client.run(${JSON.stringify(model)}, input=json.loads(${JSON.stringify(JSON.stringify(input))}))`,
      "print(output)",
    ].join("\n"),
    JavaScript: [
      'import Replicate from "replicate";',
      "",
      `const replicate = new Replicate({ auth: process.env.API_TOKEN, baseUrl: ${JSON.stringify(api)} });`,
      `const output = await replicate.run(${JSON.stringify(model)}, ${body});`,
      "console.log(output);",
    ].join("\n"),
    "Queue message": json({ model, input }),
    Recipe: json({ model, input, s3: { prefix: "photos/" } }),
  };
}

function shell(text: string): string {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}
