// The key schedule against the vectors of the project, which another implementation has made.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import * as derivation from "./derivation.mjs";

const file = new URL("../vectors/hybrid_psk_v1.json", import.meta.url);
const vectors = JSON.parse(readFileSync(file, "utf8"));
const bytes = (hex) => Buffer.from(hex, "hex");

for (const [number, vector] of vectors.cases.entries()) {
  test(`vector ${number}: ${vector.kdf}, ${vector.client_sae}`, () => {
    const secret = derivation.associationSecret(bytes(vector.exporter_secret), bytes(vector.kem_secret));
    const id = derivation.associationId(secret);
    const { kdf, key_id: keyId, psk_identity: identity } = vector;
    const tag = derivation.identityTag(derivation.tagKey(secret), kdf, id, keyId);
    const psk = derivation.hybridPsk(
      secret,
      bytes(vector.qkd_key),
      identity,
      kdf,
      vector.client_sae,
      vector.server_sae,
    );
    assert.equal(secret.toString("hex"), vector.association_secret);
    assert.equal(id.toString("hex"), vector.association_id);
    assert.equal(derivation.formatIdentity({ kdf, id, tag, keyId }), identity);
    assert.equal(psk.toString("hex"), vector.psk);
    const parsed = derivation.parseIdentity(Buffer.from(identity));
    assert.deepEqual(parsed, { kdf, id, tag, keyId, text: identity });
  });
}

test("an identity has one spelling", () => {
  const good = "qkd1.sha256.E9_zJpGJBj8WIjZr4e1cXA.h5_YEbgUSqGG.26e9895d";
  assert.notEqual(derivation.parseIdentity(Buffer.from(good)), null);
  for (const bad of [
    good.replace("sha256", "sha512"),
    good.replace("qkd1", "qkd2"),
    good.replace("cXA.", "cXB."), // bits that are not zero after the last byte
    good.replace("cXA.", "cXA=."),
    good.replace("_", "/"),
    good.replace("26e", "26 e"),
    good.replace("26e", "26\u00e9"),
    `${good}\n`,
    `${good}${"x".repeat(200)}`,
    good.slice(0, -8),
    "",
  ]) {
    assert.equal(derivation.parseIdentity(Buffer.from(bad, "latin1")), null, bad);
  }
});

test("a QKD key of less than 256 bits is refused", () => {
  assert.throws(() => derivation.hybridPsk(Buffer.alloc(48), Buffer.alloc(31), "x", "sha256", "A", "B"), RangeError);
});
