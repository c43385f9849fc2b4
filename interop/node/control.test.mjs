// Control messages: what is taken, and what is refused.

import assert from "node:assert/strict";
import { test } from "node:test";

import { decode, encode, printable } from "./control.mjs";

const OFFER = { type: "offer", kms: "etsi-014", sae_id: "SAE-A", key_ids: ["one", "two"] };
const ACCEPT = { type: "accept", sae_id: "SAE-B", lifetime: 3600, key_ids: ["one"] };

function frame(text) {
  const json = Buffer.from(text);
  const length = Buffer.alloc(2);
  length.writeUInt16BE(json.length);
  return Buffer.concat([length, json]);
}

const refused = (code) => (error) => error.name === "QkdError" && error.kind === "protocol" && error.code === code;

test("the example of the page", () => {
  const wire = "001f7b2274797065223a22646973636f766572222c2276657273696f6e223a317d";
  assert.equal(encode({ type: "discover" }).toString("hex"), wire);
  assert.deepEqual(decode(Buffer.from(wire, "hex")), { type: "discover", version: 1 });
});

for (const message of [
  { type: "identity", sae_id: "Zürich", kms: ["etsi-014"], kems: [], max_keys: 65535 },
  OFFER,
  { ...OFFER, pipelined: true },
  { ...OFFER, kem: { name: "ML-KEM-768", ek: "AAEC" } },
  { ...OFFER, unknown: { nested: [1.5, { a: 1 }, { a: 1 }] } },
  ACCEPT,
  { ...ACCEPT, lifetime: 2 ** 31, kem: { ct: "/w==" } },
  { type: "reject", code: "of_tomorrow", detail: "", alpn: null },
  { type: "reject", code: "busy", detail: "later", alpn: "h2" },
]) {
  test(`taken: ${JSON.stringify(message)}`, () => {
    const wire = encode(message);
    for (let end = 0; end < wire.length; end++) assert.equal(decode(wire.subarray(0, end)), null);
    assert.deepEqual(Object.keys(decode(wire)).sort(), [...Object.keys(message), "version"].sort());
  });
}

const without = (message, member) => JSON.stringify({ version: 1, ...message, [member]: undefined });
const changed = (message, change) => JSON.stringify({ version: 1, ...message, ...change });

for (const text of [
  "",
  "{",
  "[]",
  "null",
  '"discover"',
  '\ufeff{"type":"discover","version":1}',
  '{"type":"discover","version":1}{}',
  '{"type":"discover","version":1,"x":NaN}',
  '{"type":"discover","version":"1"}',
  '{"type":"discover","version":1.0}',
  '{"type":"discover","version":true}',
  '{"type":"discover"}',
  '{"version":1}',
  '{"type":"toString","version":1}',
  '{"type":["discover"],"version":1}',
  '{"type":"discover","type":"discover","version":1}',
  '{"type":"discover","version":1,"x":{"a":1,"\\u0061":2}}',
  ...["kms", "sae_id", "key_ids"].map((member) => without(OFFER, member)),
  ...["sae_id", "lifetime", "key_ids"].map((member) => without(ACCEPT, member)),
  changed(OFFER, { key_ids: [] }),
  changed(OFFER, { key_ids: ["one", "one"] }),
  changed(OFFER, { key_ids: ["one", 2] }),
  changed(OFFER, { key_ids: ["with space"] }),
  changed(OFFER, { key_ids: ["x".repeat(201)] }),
  changed(OFFER, { key_ids: "one" }),
  changed(OFFER, { sae_id: "" }),
  changed(OFFER, { sae_id: "é".repeat(128) }),
  changed(OFFER, { sae_id: "a\u0000" }),
  changed(OFFER, { sae_id: "\ud800" }),
  changed(OFFER, { pipelined: 1 }),
  changed(OFFER, { pipelined: null }),
  changed(OFFER, { kem: { name: "ML-KEM-768" } }),
  changed(OFFER, { kem: { name: "ML-KEM-768", ek: "" } }),
  changed(OFFER, { kem: { name: "ML-KEM-768", ek: "AAE" } }),
  changed(OFFER, { kem: { name: "ML-KEM-768", ek: "AAF=" } }),
  changed(OFFER, { kem: { name: "ML-KEM-768", ek: "AA_=" } }),
  changed(OFFER, { kem: { name: "ML-KEM-768", ek: "AAEC" }, pipelined: true }),
  changed(ACCEPT, { lifetime: 0 }),
  changed(ACCEPT, { lifetime: 2 ** 31 + 1 }),
  changed(ACCEPT, { lifetime: 1.5 }),
  changed(ACCEPT, { kem: {} }),
  changed({ type: "reject", code: "busy", detail: "" }, {}),
  changed({ type: "reject", code: "busy", alpn: null }, {}),
]) {
  test(`malformed: ${text}`, () => assert.throws(() => decode(frame(text)), refused("malformed")));
}

test("malformed: bytes that are not UTF-8", () => {
  const wire = frame('{"type":"discover","version":1,"x":"?"}');
  wire[wire.indexOf("?")] = 0xff;
  assert.throws(() => decode(wire), refused("malformed"));
});

test("malformed: something after the message", () => {
  const wire = Buffer.concat([encode({ type: "discover" }), Buffer.of(0)]);
  assert.throws(() => decode(wire), refused("malformed"));
});

test("another version, whatever its messages are", () => {
  assert.throws(() => decode(frame('{"type":"tomorrow","version":2}')), refused("unsupported_version"));
});

test("what is too long is not sent", () => {
  assert.throws(() => encode({ type: "reject", code: "busy", detail: "x".repeat(65536), alpn: null }), RangeError);
});

test("a peer's text disturbs no terminal", () => {
  assert.equal(printable("a\u001b[31m\n\u00e9"), "a?[31m??");
  assert.equal(printable("x".repeat(600)).length, 500);
});
