// The server: slave SAE.

import { Association, AssociationEnded, LIFETIME } from "./association.mjs";
import { hybridConnection, ordinaryConnection } from "./connection.mjs";
import { ENDS, KMS, MOST_KEYS } from "./control.mjs";
import { parseIdentity } from "./derivation.mjs";
import { QkdError, protocolError } from "./errors.mjs";
import { GROUPS_WITH_ML_KEM, Handshake, KDF, PROTOCOL } from "./handshake.mjs";
import { parseClientHello } from "./hellos.mjs";
import { KEMS, encapsulateTo } from "./kem.mjs";
import { Kme, KmeError } from "./kme.mjs";
import { Transport } from "./records.mjs";

const NO_APPLICATION_PROTOCOL = 120; // alert, RFC 7301
const MOST_ASSOCIATIONS = 10_000;
const BINDER = "ERR_SSL_BINDER_DOES_NOT_VERIFY";

export class HybridServer {
  #settings;
  #kme;
  #associations = new Map(); // by association ID in hexadecimal; the least recently used comes first

  /**
   * @param {object} settings
   * @param {object} settings.kme See `Kme`.
   * @param {string} settings.saeId
   * @param {string[]} [settings.peerSaeIds] With which keys may be shared; all that the KME allows, if left out.
   * @param {string} settings.cert PEM.
   * @param {string} settings.key PEM.
   * @param {string} [settings.ca] PEM: issuer of the clients' certificates.
   * @param {boolean} [settings.mutual] Whether a client must have one.
   * @param {string[]} [settings.alpn] The application's protocols, the preferred one first.
   * @param {"require" | "prefer"} [settings.policy]
   * @param {string[]} [settings.groups]
   * @param {number} [settings.lifetime] Of an association, in seconds.
   * @param {number} [settings.maxKeys] In one offer.
   */
  constructor(settings) {
    this.#settings = {
      policy: "require",
      alpn: [],
      groups: ["X25519MLKEM768"],
      lifetime: LIFETIME,
      maxKeys: MOST_KEYS,
      mutual: false,
      ...settings,
    };
    this.#kme = new Kme(settings.kme);
  }

  /**
   * @param {import("node:net").Socket} tcp
   * @returns {Promise<{socket: import("node:tls").TLSSocket, info: object}>}
   * @throws {QkdError} Or an error of the TLS stack or the transport.
   */
  async accept(tcp) {
    const transport = new Transport(tcp);
    try {
      return await this.#answer(transport, this.#kme.counted(), null);
    } catch (error) {
      transport.close();
      throw error;
    }
  }

  /** Requests to the KME so far. */
  get kmeRequests() {
    return this.#kme.requests;
  }

  /** As a restart does. */
  forget() {
    for (const association of this.#associations.values()) association.wipe();
    this.#associations.clear();
  }

  close() {
    this.forget();
    this.#kme.close();
  }

  /**
   * Answer a ClientHello, and after a bootstrap the next one.
   * @param {import("./records.mjs").Transport} transport
   * @param {object} kme Counts the requests of this connection.
   * @param {Association | null} made By the bootstrap before, on the same transport.
   */
  async #answer(transport, kme, made) {
    const { records, body } = await transport.readClientHello();
    const hello = parseClientHello(body);
    const alpn = this.#applicationProtocol(hello);
    const offersProtocol = hello.alpn.includes(PROTOCOL);

    const known = this.#find(hello);
    if (this.#settings.policy === "require" && known === null && !offersProtocol) {
      transport.refuse(NO_APPLICATION_PROTOCOL);
      throw new QkdError("unavailable", `the client does not speak ${PROTOCOL}, and QKD is required`);
    }
    const taken = known && (await this.#take(kme, known));
    if (taken) return this.#hybrid(transport, kme, records, alpn, taken, made);

    const handshake = Handshake.server(transport, this.#settings, offersProtocol ? PROTOCOL : alpn, null);
    await handshake.finish(records);
    if (!offersProtocol) return ordinaryConnection(handshake, alpn, `the client does not speak ${PROTOCOL}`, 0);
    return this.#bootstrap(transport, kme, handshake, hello, alpn);
  }

  /** The first of our protocols that the client offers, as if it had not offered `qkd-tls/1`. */
  #applicationProtocol(hello) {
    return this.#settings.alpn.find((protocol) => hello.alpn.includes(protocol)) ?? null;
  }

  // --- bootstrap

  async #bootstrap(transport, kme, handshake, hello, alpn) {
    let offer = null;
    let agreed;
    try {
      offer = await this.#offer(handshake);
      agreed = await this.#agree(kme, offer, handshake, hello);
    } catch (error) {
      if (!(error instanceof QkdError && error.code)) throw error;
      await this.#reject(transport, handshake, error, offer, alpn);
      return ordinaryConnection(handshake, alpn, error.code, kme.requests);
    }

    const { association, keys, ct } = agreed;
    // All of them: the key of this connection is taken as any announced one is.
    association.announce(keys);
    this.#remember(association);
    await handshake.send({
      type: "accept",
      sae_id: this.#settings.saeId,
      lifetime: association.lifetime,
      key_ids: keys.map(({ keyId }) => keyId),
      ...(ct && { kem: { ct: ct.toString("base64") } }),
    });
    handshake.drop();
    return this.#answer(transport, kme, association);
  }

  /** The client's offer, after it has asked who we are, if it does. */
  async #offer(handshake) {
    let message = await handshake.receive();
    if (message.type === "discover") {
      const { saeId, maxKeys } = this.#settings;
      await handshake.send({ type: "identity", sae_id: saeId, kms: [KMS], kems: KEMS, max_keys: maxKeys });
      message = await handshake.receive();
    }
    if (message.type !== "offer") throw protocolError(`${message.type} where an offer has to be`);
    return message;
  }

  /** "What the server does with an offer". */
  async #agree(kme, offer, handshake, hello) {
    const { kms, sae_id: clientSae, key_ids: keyIds, kem } = offer;
    const { saeId, maxKeys, peerSaeIds, lifetime } = this.#settings;
    const refuse = (code, message) => new QkdError("unavailable", message, { code });
    if (keyIds.length > maxKeys) throw protocolError(`an offer of ${keyIds.length} keys; ${maxKeys} are the most`);
    if (kem === undefined && !GROUPS_WITH_ML_KEM.has(handshake.channel.group)) {
      throw protocolError("neither the group nor the offer has ML-KEM", "kem_required");
    }
    if (kms !== KMS) throw refuse("unsupported_kms", "the client's KMS is of another kind, or it has no key");
    if (kem !== undefined && !KEMS.includes(kem.name)) throw refuse("unsupported_kem", "we do not have this KEM");
    if (peerSaeIds && !peerSaeIds.includes(clientSae)) throw refuse("unknown_sae", "we share no keys with this SAE");

    const keys = await kme.getKeysById(clientSae, keyIds);
    let encapsulated;
    try {
      encapsulated = kem && encapsulateTo(kem.name, Buffer.from(kem.ek, "base64"));
    } catch (error) {
      for (const { key } of keys) key.fill(0);
      throw error;
    }
    const association = new Association({
      exported: handshake.exported(),
      kemSecret: encapsulated?.secret,
      kem: kem?.name ?? null,
      clientSae,
      serverSae: saeId,
      serverName: hello.serverName,
      certificate: handshake.socket.getPeerCertificate(),
    });
    association.endsAfter(lifetime);
    return { association, keys, ct: encapsulated?.ct };
  }

  /** Returns where the connection may go on without a QKD key; else throws what was wrong. */
  async #reject(transport, handshake, error, offer, alpn) {
    const goesOn = !ENDS.has(error.code);
    const detail = error instanceof KmeError ? "the server's KME" : error.message;
    await handshake.send({ type: "reject", code: error.code, detail, alpn: goesOn ? alpn : null });
    // The ClientHello that came with a pipelined offer belongs to a handshake that will not be.
    if (offer?.pipelined) await transport.readClientHello();
    if (goesOn && this.#settings.policy === "prefer") return;
    await handshake.close();
    throw error;
  }

  #remember(association) {
    this.#associations.set(association.id.toString("hex"), association);
    if (this.#associations.size <= MOST_ASSOCIATIONS) return;
    const [oldest] = this.#associations.values();
    this.#drop(oldest);
  }

  #drop(association) {
    this.#associations.delete(association.id.toString("hex"));
    association.wipe();
  }

  // --- hybrid handshake

  /** Checks 1 to 5 of "Hybrid handshake"; null where one fails. The key ID is spent, if none does. */
  #find(hello) {
    if (hello.pskIdentities.length !== 1) return null;
    const identity = parseIdentity(hello.pskIdentities[0]);
    if (identity === null || identity.kdf !== KDF) return null;
    const association = this.#associations.get(identity.id.toString("hex"));
    if (association === undefined) return null;
    if (!association.usable) {
      this.#drop(association);
      return null;
    }
    const { keyId } = identity;
    if (association.serverName !== hello.serverName) return null;
    if (!association.isTagRight(identity) || association.isSpent(keyId)) return null;
    association.spend(keyId);
    this.#associations.delete(identity.id.toString("hex"));
    this.#remember(association); // the most recently used is the last
    return { association, identity: identity.text, keyId };
  }

  /** The PSK for an identity that has passed all checks; null where there is no key for it. */
  async #take(kme, { association, identity, keyId }) {
    let key = association.takeAnnounced(keyId);
    const announced = key !== null;
    try {
      if (!announced) [{ key }] = await kme.getKeysById(association.clientSae, [keyId]);
      return { association, keyId, announced, identity, psk: association.psk(identity, KDF, key) };
    } catch (error) {
      if (error instanceof KmeError || error instanceof AssociationEnded) return null;
      throw error;
    }
  }

  async #hybrid(transport, kme, records, alpn, { association, identity, psk, keyId, announced }, made) {
    const handshake = Handshake.server(transport, this.#settings, alpn, { identity, psk });
    try {
      await handshake.finish(records);
    } catch (error) {
      if (error.code !== BINDER) throw error;
      throw new QkdError("mismatch", `the two KMEs gave different keys for the key ID ${keyId}`, { keyId });
    }
    if (!handshake.pskTaken) throw protocolError("the TLS stack has not taken the PSK");
    const atOnce = association === made;
    return hybridConnection(handshake, association, {
      path: atOnce ? "bootstrap" : "associated",
      keyId,
      announced: announced && !atOnce,
      kmeRequests: kme.requests,
    });
  }
}
