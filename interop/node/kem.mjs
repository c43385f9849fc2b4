// The explicit KEM: ML-KEM of node:crypto (FIPS 203), with keys as plain bytes.

import { createPublicKey, decapsulate, encapsulate, generateKeyPairSync } from "node:crypto";

import { protocolError } from "./errors.mjs";

export const KEMS = ["ML-KEM-768", "ML-KEM-1024"];

/** @returns {{name: string, privateKey: import("node:crypto").KeyObject, ek: Buffer}} */
export function newKeyPair(name) {
  const { publicKey, privateKey } = generateKeyPairSync(name.toLowerCase());
  return { name, privateKey, ek: publicKey.export({ format: "raw-public" }) };
}

/** Server: a secret, and what the client needs to have it too. */
export function encapsulateTo(name, ek) {
  let publicKey;
  try {
    publicKey = createPublicKey({ key: ek, format: "raw-public", asymmetricKeyType: name.toLowerCase() });
  } catch {
    throw protocolError(`kem.ek is not an encapsulation key of ${name}`);
  }
  const { sharedKey, ciphertext } = encapsulate(publicKey);
  return { secret: Buffer.from(sharedKey), ct: Buffer.from(ciphertext) };
}

/** Client: the secret in what the server sent. ML-KEM gives another secret, not an error, for a wrong one. */
export function decapsulateWith({ name, privateKey }, ct) {
  try {
    return Buffer.from(decapsulate(privateKey, ct));
  } catch {
    throw protocolError(`kem.ct is not a ciphertext of ${name}`);
  }
}
