// What both sides remember from a bootstrap.

import { timingSafeEqual } from "node:crypto";

import { associationId, associationSecret, formatIdentity, hybridPsk, identityTag, tagKey } from "./derivation.mjs";

export const LIFETIME = 3600; // seconds
export const MOST_CONNECTIONS = 1000;

/** Its secret is wiped: nothing may be derived from the zeros that are left. */
export class AssociationEnded extends Error {}

export class Association {
  #secret;
  #wiped = false;
  #tagKey;
  #announced = new Map();
  #spent = new Set();
  #ends;

  /**
   * @param {object} parts
   * @param {Buffer} parts.exported H of the bootstrap; wiped.
   * @param {Buffer} parts.kemSecret K; empty without an explicit KEM; wiped.
   * @param {string | null} parts.kem Name of the explicit KEM.
   * @param {string} parts.clientSae
   * @param {string} parts.serverSae
   * @param {string | null} parts.serverName SNI of the bootstrap.
   * @param {import("node:tls").PeerCertificate} parts.certificate The peer's; empty where it has none.
   */
  constructor({ exported, kemSecret = Buffer.alloc(0), kem = null, clientSae, serverSae, serverName, certificate }) {
    this.#secret = associationSecret(exported, kemSecret);
    exported.fill(0);
    kemSecret.fill(0);
    this.#tagKey = tagKey(this.#secret);
    this.id = associationId(this.#secret);
    this.kem = kem;
    this.clientSae = clientSae;
    this.serverSae = serverSae;
    this.serverName = serverName;
    this.certificate = certificate;
    this.endsAfter(LIFETIME);
  }

  /** The end: after so many seconds, but never after that of the peer's certificate. */
  endsAfter(seconds) {
    const certificateEnds = this.certificate?.valid_to ? Date.parse(this.certificate.valid_to) : Infinity;
    this.#ends = Math.min(Date.now() + seconds * 1000, certificateEnds);
  }

  /** Seconds that are left. */
  get lifetime() {
    return Math.ceil((this.#ends - Date.now()) / 1000);
  }

  get usable() {
    return Date.now() < this.#ends && this.#spent.size < MOST_CONNECTIONS;
  }

  // --- keys that were announced with an offer

  /** Keep keys for later. */
  announce(keys) {
    for (const { keyId, key } of keys) this.#announced.set(keyId, key);
  }

  /** Client: the next announced key; null where none is left. */
  nextAnnounced() {
    const [first] = this.#announced.keys();
    return first === undefined ? null : { keyId: first, key: this.takeAnnounced(first) };
  }

  /** The announced key with this ID, once; null where there is none. */
  takeAnnounced(keyId) {
    const key = this.#announced.get(keyId) ?? null;
    this.#announced.delete(keyId);
    return key;
  }

  // --- key IDs

  isSpent(keyId) {
    return this.#spent.has(keyId);
  }

  spend(keyId) {
    this.#spent.add(keyId);
  }

  // --- identities and PSKs

  /** The identity that a client sends. */
  identity(kdf, keyId) {
    this.#checkSecret();
    return formatIdentity({ kdf, id: this.id, tag: identityTag(this.#tagKey, kdf, this.id, keyId), keyId });
  }

  /** Whether the sender of this identity has the association secret. */
  isTagRight({ kdf, id, tag, keyId }) {
    this.#checkSecret();
    return timingSafeEqual(tag, identityTag(this.#tagKey, kdf, id, keyId));
  }

  /** The PSK of one connection. The QKD key is wiped. */
  psk(identity, kdf, qkdKey) {
    try {
      this.#checkSecret();
      return hybridPsk(this.#secret, qkdKey, identity, kdf, this.clientSae, this.serverSae);
    } finally {
      qkdKey.fill(0);
    }
  }

  #checkSecret() {
    if (this.#wiped) throw new AssociationEnded("the association has ended");
  }

  /** Nothing can be derived from it any more. */
  wipe() {
    this.#wiped = true;
    this.#secret.fill(0);
    this.#tagKey.fill(0);
    for (const key of this.#announced.values()) key.fill(0);
    this.#announced.clear();
    this.#ends = 0;
  }
}
