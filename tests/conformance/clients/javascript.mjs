// The official JavaScript client.

// /// client
// title = "JavaScript"
// packages = ["replicate@1.4.0"]
// official = true
// ///

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { once } from "node:events";
import { createServer } from "node:http";
import Replicate, { parseProgressFromLogs } from "replicate";
import {
  ACCESS_TOKEN,
  API_URL,
  NARRATION,
  NOT_OFFERED,
  WEAK_TOKEN,
  assertPicture,
  creates,
  ended,
  fetched,
  growing,
  run,
  streamReader,
  unique,
} from "../support/flows.mjs";

const TEXT = "the sea is calm and the sea is deep and the night is calm and the night is long";
const DEPLOYMENT = { model: "local/painter", hardware: "gpu-t4", min_instances: 0, max_instances: 2 };
// docs:point
const replicate = new Replicate({ auth: ACCESS_TOKEN, baseUrl: API_URL });
// docs:end

const versionOf = async (name) => (await replicate.models.get("local", name)).latest_version.id;
const sha256 = (bytes) => createHash("sha256").update(bytes).digest("hex");

// docs:key
const keyed = (key) => (url, init) => {
  const headers = new Headers(init.headers);
  headers.set("Idempotency-Key", key);
  return fetch(url, { ...init, headers });
};
// docs:end

async function refusal(promise) {
  const error = await promise.then(
    () => assert.fail("it was not refused"),
    (error) => error
  );
  assert.equal(error.name, "ApiError", `${error.name}: ${error.message}`);
  const body = error.message.slice(error.message.indexOf("{"), error.message.lastIndexOf("}") + 1);
  return { status: error.response.status, problem: JSON.parse(body) };
}

const picture = async () => assertPicture(await replicate.run("local/painter", { input: { prompt: "a fox" } }));

const flows = {
  async run_file() {
    await picture();
  },
  async run_text() {
    const words = await replicate.run("local/storyteller", { input: { prompt: "a fox", max_tokens: 12 } });
    assert.equal(words.join("").split(" ").length, 12);
  },
  async run_list() {
    const files = await replicate.run("local/series", { input: { count: 3 } });
    assert.equal(files.length, 3);
    const hashes = await Promise.all(files.map(async (file) => sha256(await assertPicture(file))));
    assert.equal(new Set(hashes).size, 3);
  },
  async run_nested() {
    const album = await replicate.run("local/album", { input: { title: "Foxes", pages: 2 } });
    assert.equal(album.title, "Foxes");
    assert.equal(String(album.homepage), "https://example.com/album.png");
    assert.deepEqual(album.details.colours, ["sand", "umber"]);
    await Promise.all([album.cover, ...album.pages].map(assertPicture));
    assert.equal((await fetched(String(album.details.thumbnails.small))).readUInt16BE(0), 0xffd8);
  },
  async run_by_version() {
    const version = await versionOf("sleeper");
    const output = await replicate.run(`local/sleeper:${version}`, { input: { seconds: 0, text: "by version" } });
    assert.equal(output, "by version");
  },
  async run_polling() {
    const wait = { mode: "poll", interval: 300 };
    assert.equal(await replicate.run("local/sleeper", { input: { seconds: 1 }, wait }), "slept well");
  },
  async run_longer_than_wait() {
    const wait = { mode: "block", timeout: 1 };
    assert.equal(await replicate.run("local/sleeper", { input: { seconds: 4 }, wait }), "slept well");
  },
  async run_failed() {
    await assert.rejects(replicate.run("local/crasher", { input: { message: "no paint" } }), (error) => {
      assert.match(error.message, /^Prediction failed: .*no paint/);
      return true;
    });
  },
  async run_file_object() {
    const image = new Blob([await picture()], { type: "image/png" });
    await assertPicture(await replicate.run("local/etcher", { input: { image, style: "mosaic" } }));
  },
  async progress() {
    const seen = [];
    const options = { input: { count: 3, delay_seconds: 1 }, wait: { mode: "poll", interval: 200 } };
    await replicate.run("local/series", options, (prediction) => seen.push(prediction));
    assert.equal(seen[0].status, "starting");
    assert.equal(seen.at(-1).status, "succeeded");
    assert(seen.some(({ status }) => status === "processing"), "it was never seen processing");
    assert.match(seen.at(-1).logs, /Picture 3 of 3/);
  },
  async stream() {
    const events = [];
    const input = { prompt: "a fox", max_tokens: 12 };
    for await (const event of replicate.stream("local/storyteller", { input })) events.push(event);
    assert.equal(events.at(-1).event, "done");
    assert.equal(events.map(String).join("").trim().split(/\s+/).length, 12);
    return "from Replicate's own address, not through the stack";
  },
  async stream_link() {
    const created = await replicate.predictions.create({ model: "local/storyteller", input: { prompt: "a fox" } });
    const answer = await fetch(created.urls.stream, { headers: { accept: "text/event-stream" } });
    assert.equal((await answer.text()).match(/^event: output$/gm).length, 24);
  },
  async stream_token() {
    const told = await streamReader(async () => {
      for await (const _ of replicate.stream("local/storyteller", { input: { prompt: "a fox" } }));
    });
    assert.equal(told, "missing");
    return "sends it no token";
  },
  async no_output_yet() {
    const created = await replicate.predictions.create({ model: "local/sleeper", input: { seconds: 20 } });
    const found = await replicate.predictions.get(created.id);
    for (const open of [created, found]) {
      assert(["starting", "processing"].includes(open.status), open.status);
      assert.deepEqual([open.output ?? null, open.error], [null, null]);
    }
    await replicate.predictions.cancel(created.id);
  },
  async idempotency_key() {
    const prompt = unique();
    const asked = (key) => {
      // docs:key
      const replicate = new Replicate({ auth: ACCESS_TOKEN, baseUrl: API_URL, fetch: keyed(key) });
      return replicate.predictions.create({ model: "local/painter", input: { prompt } });
      // docs:end
    };
    const [first, second] = [await asked(prompt), await asked(prompt)];
    assert.equal(first.id, second.id);
    assert.equal((await creates(prompt)).length, 1);
    assert.notEqual((await asked(`other-${prompt}`)).id, first.id);
  },
  async live_logs() {
    growing((await watched()).map(({ logs }) => logs));
  },
  async live_progress() {
    const seen = (await watched()).map((prediction) => parseProgressFromLogs(prediction)?.current).filter(Boolean);
    assert.deepEqual(seen, seen.toSorted((a, b) => a - b));
    assert(new Set(seen).size >= 3 && seen[0] < 10, `seen: ${seen}`);
  },
  async live_output() {
    growing((await watched()).map(({ output }) => output));
  },

  async create_by_version_id() {
    const version = await versionOf("sleeper");
    const created = await replicate.predictions.create({ version, input: { seconds: 0, text: "by id" } });
    assert.equal(created.version, version);
    assert.equal((await replicate.wait(created)).output, "by id");
  },
  async create_by_model() {
    const created = await replicate.predictions.create({ model: "local/sleeper", input: { seconds: 1 } });
    assert.equal(created.model, "local/sleeper");
    assert.equal(created.urls.get, `${API_URL}/predictions/${created.id}`);
    assert.equal((await replicate.wait(created)).output, "slept well");
  },
  async create_by_owner_and_name() {
    const created = await replicate.predictions.create({ version: "local/sleeper", input: { seconds: 0 } });
    assert.equal((await replicate.wait(created)).output, "slept well");
  },
  async create_without_waiting() {
    const began = Date.now();
    const created = await replicate.predictions.create({ model: "local/sleeper", input: { seconds: 30 } });
    assert.equal(created.status, "starting");
    assert(Date.now() - began < 15_000, "it was waited for");
    await replicate.predictions.cancel(created.id);
  },
  async create_and_wait() {
    const created = await replicate.predictions.create({ model: "local/sleeper", input: { seconds: 1 }, wait: 20 });
    assert.deepEqual([created.status, created.output], ["succeeded", "slept well"]);
  },
  async predictions_get() {
    const created = await replicate.predictions.create({ model: "local/painter", input: { prompt: "a fox" } });
    await replicate.wait(created);
    const found = await replicate.predictions.get(created.id);
    assert.deepEqual([found.id, found.status, found.input], [created.id, "succeeded", { prompt: "a fox" }]);
    assert(found.metrics.predict_time >= 0 && found.created_at && found.started_at && found.completed_at);
    await assertPicture(found.output);
  },
  async predictions_cancel() {
    const created = await replicate.predictions.create({ model: "local/sleeper", input: { seconds: 60 } });
    await replicate.predictions.cancel(created.id);
    assert.equal((await ended(replicate.predictions.get, created.id)).status, "canceled");
  },
  async run_aborted() {
    const stop = new AbortController();
    const options = { input: { seconds: 60 }, wait: { mode: "poll", interval: 200 }, signal: stop.signal };
    let id;
    const running = replicate.run("local/sleeper", options, (prediction) => {
      id = prediction.id;
      setTimeout(() => stop.abort(), 300);
    });
    await running.catch((error) => assert.equal(error.name, "AbortError"));
    // The client cancels before run() is over; the end may be told a moment later.
    assert.equal((await ended(replicate.predictions.get, id)).status, "canceled");
  },
  async predictions_list() {
    const created = await replicate.predictions.create({ model: "local/sleeper", input: { seconds: 0 } });
    const page = await replicate.predictions.list();
    assert(page.results.some(({ id }) => id === created.id));
    assert.deepEqual([page.previous, "next" in page], [null, true]);
  },
  async predictions_paginate() {
    // A page is cut where an answer would be larger than Lambda's: three of these are never on one.
    const text = "fox ".repeat(600_000);
    const made = [];
    for (let number = 0; number < 3; number += 1) {
      const created = await replicate.predictions.create({ model: "local/sleeper", input: { seconds: 0, text } });
      made.push((await replicate.wait(created)).id);
    }
    const pages = [];
    for await (const page of replicate.paginate(replicate.predictions.list)) pages.push(page.map(({ id }) => id));
    assert(pages.length > 1, "there was one page only");
    const listed = pages.flat();
    assert.equal(new Set(listed).size, listed.length);
    assert.deepEqual(listed.filter((id) => made.includes(id)), made.reverse());
  },

  async models_get() {
    const model = await replicate.models.get("local", "painter");
    assert.deepEqual([model.owner, model.name, model.visibility], ["local", "painter", "public"]);
    assert.equal(model.default_example.urls.get, `${API_URL}/predictions/${model.default_example.id}`);
  },
  async models_list() {
    const names = [];
    for await (const page of replicate.paginate(replicate.models.list)) names.push(...page.map(({ name }) => name));
    assert(names.includes("painter") && names.includes("sleeper"), `it lists ${names}`);
  },
  async models_search() {
    const { status } = await refusal(replicate.models.search("lighthouse"));
    assert.equal(status, 404);
    const answer = await replicate.request("/search?query=word%20by%20word", { method: "GET" });
    assert.deepEqual((await answer.json()).models.map(({ model }) => model.name), ["storyteller"]);
    return "404: sends the method QUERY, which API Gateway does not know; use `GET /search`";
  },
  async models_create() {
    const made = await replicate.models.create("local", "sketch-js", { visibility: "private", hardware: "cpu" });
    assert.deepEqual([made.owner, made.name, made.visibility], ["local", "sketch-js", "private"]);
    await replicate.request("/models/local/sketch-js", { method: "DELETE" });
  },
  async models_delete() {
    assert.equal(replicate.models.delete, undefined);
    return NOT_OFFERED;
  },
  async models_versions_list() {
    const { results } = await replicate.models.versions.list("local", "painter");
    assert.deepEqual(results.map(({ id }) => id), [await versionOf("painter")]);
  },
  async models_versions_get() {
    const version = await versionOf("painter");
    const found = await replicate.models.versions.get("local", "painter", version);
    assert.equal(found.id, version);
    assert("prompt" in found.openapi_schema.components.schemas.Input.properties);
  },
  async models_examples() {
    assert.equal(replicate.models.examples, undefined);
    return NOT_OFFERED;
  },
  async models_readme() {
    assert.equal(replicate.models.readme, undefined);
    return NOT_OFFERED;
  },
  async collections_list() {
    const { results } = await replicate.collections.list();
    assert(results.some(({ slug }) => slug === "text-to-image"));
  },
  async collections_get() {
    const { models } = await replicate.collections.get("text-to-image");
    assert(models.some(({ name }) => name === "painter"));
  },
  async hardware_list() {
    assert((await replicate.hardware.list()).some(({ sku }) => sku === "cpu"));
  },
  async account_get() {
    const account = await replicate.accounts.current();
    assert.deepEqual([account.type, account.username], ["user", "local"]);
  },

  async deployments_create() {
    const made = await deploy("create");
    assert.deepEqual([made.current_release.number, made.current_release.configuration.hardware], [1, "gpu-t4"]);
    await replicate.deployments.delete("local", made.name);
  },
  async deployments_get() {
    const made = await deploy("get");
    assert.deepEqual(await replicate.deployments.get("local", made.name), made);
    await replicate.deployments.delete("local", made.name);
  },
  async deployments_list() {
    const { results } = await replicate.deployments.list();
    assert(results.some(({ name }) => name === "painter-deployment"));
  },
  async deployments_update() {
    const made = await deploy("update");
    const changed = await replicate.deployments.update("local", made.name, { max_instances: 5 });
    assert.deepEqual([changed.current_release.number, changed.current_release.configuration.max_instances], [2, 5]);
    await replicate.deployments.delete("local", made.name);
  },
  async deployments_delete() {
    const made = await deploy("delete");
    assert.equal(await replicate.deployments.delete("local", made.name), true);
    assert.equal((await refusal(replicate.deployments.get("local", made.name))).status, 404);
  },
  async deployments_predictions_create() {
    const options = { input: { prompt: "a fox" } };
    const created = await replicate.deployments.predictions.create("local", "painter-deployment", options);
    await assertPicture((await replicate.wait(created)).output);
  },

  async trainings_create() {
    const training = await train();
    const found = await ended(replicate.trainings.get, training.id);
    assert.equal(found.status, "succeeded", found.error);
    assert.match(found.output.version, /^local\/tuner:/);
    assert((await fetched(found.output.weights)).length > 0);
  },
  async trainings_get() {
    const training = await train();
    const found = await replicate.trainings.get(training.id);
    assert.deepEqual([found.id, found.urls.get], [training.id, `${API_URL}/trainings/${training.id}`]);
  },
  async trainings_list() {
    const training = await train();
    const { results } = await replicate.trainings.list();
    assert(results.some(({ id }) => id === training.id));
  },
  async trainings_cancel() {
    const training = await train({ seconds: 60 });
    await replicate.trainings.cancel(training.id);
    assert.equal((await ended(replicate.trainings.get, training.id)).status, "canceled");
  },

  async files_create() {
    const file = await upload("fox one");
    assert.deepEqual([file.name, file.size, file.metadata], ["fox.txt", 7, { take: 2 }]);
    assert.equal(file.checksums.sha256, sha256("fox one"));
    assert.equal(String(await fetched(file.urls.get)), "fox one");
  },
  async files_get() {
    const file = await upload("fox two");
    assert.deepEqual(await replicate.files.get(file.id), file);
  },
  async files_list() {
    const file = await upload("fox three");
    assert((await replicate.files.list()).results.some(({ id }) => id === file.id));
  },
  async files_delete() {
    const file = await upload("fox four");
    assert.equal(await replicate.files.delete(file.id), true);
    assert.equal((await fetch(file.urls.get)).status, 404);
  },
  async file_as_input() {
    const file = await replicate.files.create(new File([await picture()], "fox.png", { type: "image/png" }));
    const input = { image: file.urls.get, style: "duotone" };
    await assertPicture(await replicate.run("local/etcher", { input }));
  },

  async webhooks() {
    const { key } = await replicate.webhooks.default.secret.get();
    const received = [];
    const receiver = createServer(async (request, response) => {
      let body = "";
      for await (const part of request) body += part;
      received.push({ headers: request.headers, body });
      response.end();
    });
    receiver.listen(0, "127.0.0.1");
    await once(receiver, "listening");
    try {
      const created = await replicate.predictions.create({
        model: "local/painter",
        input: { prompt: "a fox" },
        webhook: `http://127.0.0.1:${receiver.address().port}/hook`,
        webhook_events_filter: ["start", "completed"],
      });
      const told = () => received.map(({ body }) => JSON.parse(body).status);
      for (let tries = 0; !told().includes("succeeded"); tries += 1) {
        assert(tries < 200, `told within 40 s: ${told()}`);
        await new Promise((resolve) => setTimeout(resolve, 200));
      }
      for (const { headers, body } of received) {
        assert.equal(JSON.parse(body).id, created.id);
        assert.equal(await Replicate.validateWebhook({ headers, body }, key), true);
        assert.equal(await Replicate.validateWebhook({ headers, body: `${body} ` }, key), false);
      }
      await assertPicture(JSON.parse(received.at(-1).body).output);
    } finally {
      receiver.close();
      receiver.closeAllConnections();
    }
  },

  async error_unauthorized() {
    const stranger = new Replicate({ auth: "nobody", baseUrl: API_URL });
    const { status, problem } = await refusal(stranger.predictions.list());
    assert.deepEqual([status, problem.status], [401, 401]);
  },
  async error_forbidden() {
    const reader = new Replicate({ auth: WEAK_TOKEN, baseUrl: API_URL });
    const refused = reader.predictions.create({ model: "local/sleeper", input: {} });
    const { status, problem } = await refusal(refused);
    assert.deepEqual([status, problem.status], [403, 403]);
    assert.match(problem.detail, /predict/);
  },
  async error_not_found() {
    const { status, problem } = await refusal(replicate.models.get("local", "unknown"));
    assert.deepEqual([status, problem.status], [404, 404]);
    assert.equal((await refusal(replicate.predictions.get("unknown"))).status, 404);
  },
  async error_invalid_input() {
    const refused = replicate.run("local/painter", { input: { seed: -1 } });
    const { status, problem } = await refusal(refused);
    assert.equal(status, 422);
    assert.deepEqual(problem.invalid_fields.map(({ field }) => field), ["input.prompt", "input.seed"]);
  },
};

const deploy = async (name) =>
  replicate.deployments.create({ ...DEPLOYMENT, name: `js-${name}`, version: await versionOf("painter") });

// What run()'s callback sees of a model while it runs.
async function watched() {
  const seen = [];
  const options = { input: NARRATION, wait: { mode: "poll", interval: 300 } };
  const words = await replicate.run("local/narrator", options, (prediction) => seen.push({ ...prediction }));
  assert.equal(words.join("").split(" ").length, 10);
  return seen.filter(({ status }) => status === "processing");
}

const upload = (text) => replicate.files.create(new File([text], "fox.txt", { type: "text/plain" }), { take: 2 });

async function train(more = {}) {
  const train_data = `data:text/plain;base64,${Buffer.from(TEXT).toString("base64")}`;
  const options = { destination: "local/tuner", input: { train_data, ...more } };
  return replicate.trainings.create("local", "tuner", await versionOf("tuner"), options);
}

await run(flows);
