// The key schedule: section "Key schedule" of docs/protocol.md. No input, no output, no state.

import { createHash, createHmac } from "node:crypto";

/** Hash of the PSK: TLS code point of the KDF and length of the PSK in bytes. */
const KDFS = {
  sha256: { target: 0x0001, length: 32 },
  sha384: { target: 0x0002, length: 48 },
};
const TLS_1_3 = 0x0304;
const HASH = "sha384";
const HASH_LENGTH = 48;

export const EXPORTER_LABEL = "EXPERIMENTAL qkd-tls/1 association";
export const EXPORTER_LENGTH = 48;
export const SHORTEST_QKD_KEY = 32;

function hmac(key, data) {
  return createHmac(HASH, key).update(data).digest();
}

/** HKDF-Extract (RFC 5869), which is HMAC with the salt as key. */
function extract(salt, inputKeyingMaterial) {
  return hmac(salt, inputKeyingMaterial);
}

/** HKDF-Expand for at most one block of the hash, which is all that is needed here. */
function expand(key, info, length) {
  if (length > HASH_LENGTH) throw new RangeError("more than one block");
  return hmac(key, Buffer.concat([Buffer.from(info), Buffer.of(1)])).subarray(0, length);
}

function v8(bytes) {
  if (bytes.length > 0xff) throw new RangeError("longer than 255 bytes");
  return Buffer.concat([Buffer.of(bytes.length), bytes]);
}

function v16(bytes) {
  return Buffer.concat([u16(bytes.length), bytes]);
}

function u16(number) {
  const bytes = Buffer.alloc(2);
  bytes.writeUInt16BE(number);
  return bytes;
}

/**
 * A: what both sides remember from a bootstrap.
 * @param {Buffer} exported H, from the TLS exporter.
 * @param {Buffer} kemSecret K, of the explicit KEM; empty without one.
 */
export function associationSecret(exported, kemSecret) {
  return extract("qkd-tls/1 association secret", Buffer.concat([v16(exported), v16(kemSecret)]));
}

/** a: 16 bytes, public. */
export function associationId(secret) {
  return expand(secret, "qkd-tls/1 association id", 16);
}

/** T: the key of the tags in PSK identities. */
export function tagKey(secret) {
  return expand(secret, "qkd-tls/1 identity tag", HASH_LENGTH);
}

/** The first 9 bytes of an HMAC that only somebody with the association secret can compute. */
export function identityTag(tagKeyBytes, kdf, id, keyId) {
  return hmac(tagKeyBytes, `qkd1.${kdf}.${id.toString("base64url")}.${keyId}`).subarray(0, 9);
}

/** The PSK identity, as it goes over the wire. */
export function formatIdentity({ kdf, id, tag, keyId }) {
  return `qkd1.${kdf}.${id.toString("base64url")}.${tag.toString("base64url")}.${keyId}`;
}

/**
 * The parts of a PSK identity; null where it is not spelled in the one way there is.
 * @param {Buffer} bytes
 */
export function parseIdentity(bytes) {
  const text = bytes.toString("latin1");
  const match = /^qkd1\.(sha256|sha384)\.([\w-]{21}[AQgw])\.([\w-]{12})\.([!-~]{1,207})$/.exec(text);
  if (match === null || bytes.length > 255) return null;
  const [, kdf, id, tag, keyId] = match;
  return { kdf, id: Buffer.from(id, "base64url"), tag: Buffer.from(tag, "base64url"), keyId, text };
}

/**
 * The PSK of one connection.
 * @param {Buffer} secret A.
 * @param {Buffer} qkdKey Q.
 * @param {string} identity The whole identity.
 * @param {"sha256" | "sha384"} kdf
 * @param {string} clientSae
 * @param {string} serverSae
 */
export function hybridPsk(secret, qkdKey, identity, kdf, clientSae, serverSae) {
  if (qkdKey.length < SHORTEST_QKD_KEY) throw new RangeError("a QKD key has at least 256 bits");
  const { target, length } = KDFS[kdf];
  const mixed = extract(Buffer.alloc(HASH_LENGTH), Buffer.concat([v16(qkdKey), v16(secret)]));
  const context = Buffer.concat([v8(Buffer.from(clientSae)), v8(Buffer.from(serverSae))]);
  const imported = Buffer.concat([v16(Buffer.from(identity)), v16(context), u16(TLS_1_3), u16(target)]);
  const digest = createHash(HASH).update(imported).digest();
  const info = Buffer.concat([u16(length), v8(Buffer.from("tls13 derived psk")), v8(digest)]);
  const psk = expand(mixed, info, length);
  mixed.fill(0);
  return psk;
}
