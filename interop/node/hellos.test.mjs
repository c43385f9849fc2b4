// ClientHellos, and where they end on the transport.

import assert from "node:assert/strict";
import { test } from "node:test";

import { CLIENT_HELLO, HelloCollector, parseClientHello } from "./hellos.mjs";

const u16 = (number) => Buffer.of(number >> 8, number & 0xff);
const v8 = (bytes) => Buffer.concat([Buffer.of(bytes.length), bytes]);
const v16 = (bytes) => Buffer.concat([u16(bytes.length), bytes]);
const extension = (type, bytes) => Buffer.concat([u16(type), v16(bytes)]);
const text = (string) => Buffer.from(string);

const SNI = extension(0, v16(Buffer.concat([Buffer.of(0), v16(text("Server.Example"))])));
const ALPN = extension(16, v16(Buffer.concat([v8(text("qkd-tls/1")), v8(text("h2"))])));
const IDENTITIES = v16(Buffer.concat([v16(text("qkd1.x")), Buffer.alloc(4)]));
const PSK = extension(41, Buffer.concat([IDENTITIES, v16(v8(Buffer.alloc(32)))]));

function hello(...extensions) {
  const start = [Buffer.of(3, 3), Buffer.alloc(32), v8(Buffer.alloc(32)), v16(u16(0x1301)), v8(Buffer.of(0))];
  return Buffer.concat([...start, v16(Buffer.concat(extensions))]);
}

function message(body, type = CLIENT_HELLO) {
  return Buffer.concat([Buffer.of(type, 0), v16(body)]);
}

function records(bytes, size, type = 22) {
  const cut = [];
  for (let start = 0; start < bytes.length; start += size) {
    cut.push(Buffer.concat([Buffer.of(type, 3, 1), v16(bytes.subarray(start, start + size))]));
  }
  return cut;
}

const malformed = { name: "QkdError", code: "malformed" };

test("what a server wants to know", () => {
  assert.deepEqual(parseClientHello(hello(SNI, ALPN, PSK)), {
    serverName: "server.example",
    alpn: ["qkd-tls/1", "h2"],
    pskIdentities: [text("qkd1.x")],
  });
  assert.deepEqual(parseClientHello(hello()), { serverName: null, alpn: [], pskIdentities: [] });
});

test("a ClientHello cut off anywhere", () => {
  const whole = hello(SNI, ALPN, PSK);
  const allowed = whole.length - v16(Buffer.concat([SNI, ALPN, PSK])).length; // no extensions at all
  for (let end = 0; end < whole.length; end++) {
    if (end !== allowed) assert.throws(() => parseClientHello(whole.subarray(0, end)), malformed, `${end} bytes`);
  }
});

test("an extension that appears twice, and bytes after the last", () => {
  assert.throws(() => parseClientHello(hello(SNI, SNI)), malformed);
  assert.throws(() => parseClientHello(Buffer.concat([hello(SNI), Buffer.of(0)])), malformed);
});

for (const size of [1000, 100, 3]) {
  test(`a ClientHello in records of ${size} bytes`, () => {
    const body = hello(SNI, ALPN, PSK);
    const collector = new HelloCollector(CLIENT_HELLO);
    const results = records(message(body), size).map((record) => collector.add(record));
    assert.deepEqual(results.pop(), body);
    assert.ok(results.every((result) => result === null));
  });
}

test("what is not a ClientHello, or does not end with its record", () => {
  const body = hello(SNI);
  for (const bytes of [message(body, 2), Buffer.concat([message(body), Buffer.of(0)]), Buffer.of(1, 1, 0, 0)]) {
    assert.throws(() => new HelloCollector(CLIENT_HELLO).add(records(bytes, 1000)[0]), malformed);
  }
  assert.throws(() => new HelloCollector(CLIENT_HELLO).add(records(message(body), 1000, 23)[0]), malformed);
  assert.throws(() => new HelloCollector(CLIENT_HELLO).add(Buffer.of(22, 3, 1, 0, 0)), malformed);
});

test("a ClientHello in too many records", () => {
  const collector = new HelloCollector(CLIENT_HELLO);
  const trickle = records(message(hello(extension(21, Buffer.alloc(400)))), 1);
  assert.throws(() => trickle.map((record) => collector.add(record)), malformed);
});
