// Command line programs; see README.md. They print one line of JSON for each result.

import { createHash, randomBytes } from "node:crypto";
import { readFileSync } from "node:fs";
import { createServer } from "node:net";
import { createInterface } from "node:readline";
import { finished } from "node:stream/promises";

import { HybridClient } from "./client.mjs";
import { HybridServer } from "./server.mjs";

const say = (result) => console.log(JSON.stringify(result));

/** Settings with the names of PEM files in the places of what is in them. */
function loaded(settings) {
  const read = ({ cert, key, ca, ...others }) => ({
    ...others,
    ...(cert && { cert: readFileSync(cert, "utf8") }),
    ...(key && { key: readFileSync(key, "utf8") }),
    ...(ca && { ca: readFileSync(ca, "utf8") }),
  });
  return { ...read(settings), kme: read(settings.kme) };
}

function asFailure(error) {
  const { name, message, kind = null, code = null, keyId = null } = error;
  return { error: { name, message, kind, code, keyId } };
}

// --- what the programs do with a connection

/** Send so many random bytes, and see them come back. */
async function exchange(socket, size) {
  const sent = randomBytes(size);
  const hash = createHash("sha256");
  socket.write(sent);
  let received = 0;
  try {
    for await (const chunk of socket) {
      hash.update(chunk);
      received += chunk.length;
      if (received >= size) socket.end();
    }
  } catch {
    // A server that does not go on without a key closes before all is back: the number of bytes tells.
  }
  const same = received === size && hash.digest().equals(createHash("sha256").update(sent).digest());
  return { bytes: received, same };
}

async function echo(socket) {
  socket.pipe(socket);
  await finished(socket).catch(() => {}); // A client may just go.
}

async function connectOnce(client, { host = "localhost", address = "127.0.0.1", port, bytes = 16 }) {
  try {
    const { socket, info } = await client.connect({ host, address, port });
    return { info, echo: await exchange(socket, bytes) };
  } catch (error) {
    return asFailure(error);
  }
}

/** Echoes on each connection, and gives `report` the outcome of each handshake. */
async function serve(server, port, report) {
  const listening = createServer({ noDelay: true }, async (tcp) => {
    try {
      const { socket, info } = await server.accept(tcp);
      report({ info });
      await echo(socket);
    } catch (error) {
      report(asFailure(error));
    }
  });
  await new Promise((resolve) => listening.listen(port, "127.0.0.1", resolve));
  return listening;
}

// --- many connections in one process: commands as lines of JSON, each answered by one line

class Session {
  #clients = new Map();
  #servers = new Map();

  client({ name, settings }) {
    this.#clients.set(name, new HybridClient(loaded(settings)));
    return {};
  }

  connect({ name, ...where }) {
    return connectOnce(this.#clients.get(name), where);
  }

  async server({ name, settings }) {
    const server = new HybridServer(loaded(settings));
    const outcomes = [];
    const waiting = [];
    const report = (outcome) => (waiting.length > 0 ? waiting.shift()(outcome) : outcomes.push(outcome));
    const next = () => (outcomes.length > 0 ? outcomes.shift() : new Promise((resolve) => waiting.push(resolve)));
    const listening = await serve(server, 0, report);
    this.#servers.set(name, { server, listening, next });
    return { port: listening.address().port };
  }

  /** What the server says of its next connection. */
  outcome({ name }) {
    return this.#servers.get(name).next();
  }

  forget({ name }) {
    this.#servers.get(name).server.forget();
    return {};
  }

  requests({ name }) {
    return { kme: this.#servers.get(name).server.kmeRequests };
  }

  version() {
    return { node: process.versions.node, openssl: process.versions.openssl };
  }
}

async function session() {
  const commands = new Session();
  for await (const line of createInterface({ input: process.stdin })) {
    const { do: name, ...what } = JSON.parse(line);
    say(await commands[name](what));
  }
  process.exit(0); // Servers listen for ever.
}

// --- command line

const [command, file, ...rest] = process.argv.slice(2);
const settings = () => loaded(JSON.parse(readFileSync(file, "utf8")));

switch (command) {
  case "version":
    say(new Session().version());
    break;
  case "connect": {
    const [host, port] = rest;
    const client = new HybridClient(settings());
    const result = await connectOnce(client, { host, address: host, port: Number(port) });
    client.close();
    say(result);
    process.exitCode = result.echo?.same ? 0 : 1;
    break;
  }
  case "serve": {
    const listening = await serve(new HybridServer(settings()), Number(rest[0] ?? 0), say);
    say({ port: listening.address().port });
    break;
  }
  case "session":
    await session();
    break;
  default:
    console.error("usage: main.mjs version | connect SETTINGS HOST PORT | serve SETTINGS [PORT] | session");
    process.exitCode = 2;
}
