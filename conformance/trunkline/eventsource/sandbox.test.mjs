// A sandbox, somebody who watches it and somebody who watches all of them, each with the EventSource of npm, over a server that
// is killed twice. TRUNKLINE_BIN is the server.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, rmSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import test from "node:test";
import { EventSource } from "eventsource";

const data = mkdtempSync(join(tmpdir(), "trunkline-"));

async function freePort() {
  const probe = createServer().listen(0, "127.0.0.1");
  await once(probe, "listening");
  const { port } = probe.address();
  probe.close();
  await once(probe, "close");
  return port;
}

async function start(port) {
  const free = "127.0.0.1:0";
  const flags = ["serve", "--dev", "--grpc", free, "--ops", free, "--http", `127.0.0.1:${port}`, "--data-dir", data];
  const server = spawn(process.env.TRUNKLINE_BIN, flags, { stdio: ["ignore", "pipe", "ignore"] });
  const [line] = await once(server.stdout, "data");
  assert.match(String(line), /^ready /);
  return server;
}

async function kill(server) {
  server.kill("SIGKILL");
  await once(server, "exit");
}

async function until(what, condition) {
  const end = Date.now() + 20_000;
  while (!(await condition())) {
    assert.ok(Date.now() < end, `waited for ${what}`);
    await new Promise((done) => setTimeout(done, 10));
  }
}

test("three streams, resumed after the server was killed", async () => {
  const port = await freePort();
  const base = `http://127.0.0.1:${port}`;
  const post = (path, body) => fetch(base + path, { method: "POST", body: JSON.stringify(body) });
  const get = async (path) => (await fetch(base + path)).json();
  let server = await start(port);
  assert.equal((await post("/sessions/s?project=p", {})).status, 201);

  const screen = new Map();
  const watch = new EventSource(`${base}/sessions/s/stream`);
  for (const name of ["artifact_snapshot", "artifact_created"]) {
    watch.addEventListener(name, ({ data, lastEventId }) => {
      const { artifact } = JSON.parse(data);
      assert.equal(lastEventId.split(".")[0], String(artifact.seq));
      screen.set(artifact.seq, artifact);
    });
  }
  watch.addEventListener("artifact_updated", ({ data }) => {
    const { seq, field, append, set, updatedAt } = JSON.parse(data);
    const artifact = screen.get(seq);
    artifact[field] = append === undefined ? set : artifact[field] + append;
    artifact.updatedAt = updatedAt;
  });
  const sessions = new Map();
  const roll = new EventSource(`${base}/sessions/stream?project=p`);
  for (const name of ["session_snapshot", "session_created"]) {
    roll.addEventListener(name, ({ data }) => sessions.set(JSON.parse(data).session.id, JSON.parse(data).session));
  }
  // What was removed while the stream was cut is in no snapshot.
  const seen = new Set();
  roll.addEventListener("session_snapshot", ({ data }) => seen.add(JSON.parse(data).session.id));
  roll.addEventListener("session_snapshot_end", () => {
    for (const id of sessions.keys()) if (!seen.has(id)) sessions.delete(id);
    seen.clear();
  });
  roll.addEventListener("session_updated", ({ data }) => {
    const { id, fields } = JSON.parse(data);
    Object.assign(sessions.get(id), fields);
  });
  roll.addEventListener("session_removed", ({ data }) => sessions.delete(JSON.parse(data).id));
  const heard = [];
  const commands = new EventSource(`${base}/sessions/s/commands`);
  commands.addEventListener("command", ({ data }) => heard.push(JSON.parse(data).text));

  const sent = [];
  for (let round = 0; round < 3; round += 1) {
    await until("the sandbox", () => sessions.get("s")?.status === "live");
    for (let n = 0; n < 10; n += 1) {
      const text = `${round}-${n}`;
      const command = await post("/sessions/s/commands", { type: "prompt", text });
      assert.equal(command.status, 202);
      sent.push(text);
      const events = [{ type: "user_prompt", text }, { type: "text_delta", delta: "a" }, { type: "text_delta", delta: "b" }];
      assert.equal((await post("/sessions/s/events", events)).status, 202);
    }
    await until("the commands", () => heard.length === sent.length);
    if (round < 2) {
      await kill(server);
      server = await start(port);
    }
  }
  assert.deepEqual(heard, sent, "each once, in order");
  const all = await get("/sessions/s/artifacts");
  assert.equal(all.length, 60);
  await until("the artifacts", () => screen.size === all.length);
  assert.deepEqual([...screen.values()].sort((a, b) => a.seq - b.seq), all);
  commands.close();
  await until("its end", () => sessions.get("s")?.status === "disconnected");
  assert.equal((await fetch(`${base}/sessions/s`, { method: "DELETE" })).status, 204);
  await until("its removal", () => !sessions.has("s"));
  watch.close();
  roll.close();
  await kill(server);
  rmSync(data, { recursive: true });
});
