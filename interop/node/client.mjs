// The client: master SAE.

import { connect as connectTcp } from "node:net";
import { once } from "node:events";

import { Association } from "./association.mjs";
import { hybridConnection, ordinaryConnection } from "./connection.mjs";
import { ENDS, KMS, MOST_KEYS, printable } from "./control.mjs";
import { QkdError, protocolError } from "./errors.mjs";
import { GROUPS_WITH_ML_KEM, Handshake, KDF, PROTOCOL } from "./handshake.mjs";
import { decapsulateWith, newKeyPair } from "./kem.mjs";
import { Kme, KmeError } from "./kme.mjs";
import { Transport } from "./records.mjs";

const DECRYPT_ERROR = "ERR_SSL_TLSV1_ALERT_DECRYPT_ERROR";

export class HybridClient {
  #settings;
  #kme;
  #associations = new Map(); // by host name

  /**
   * @param {object} settings
   * @param {object} settings.kme See `Kme`.
   * @param {string} settings.saeId
   * @param {string} [settings.peerSaeId] The server's; it is asked where it is not known.
   * @param {string} settings.ca PEM: whom to trust as issuer of the server's certificate.
   * @param {string} [settings.cert] PEM, for mutual TLS; with `key`.
   * @param {string} [settings.key]
   * @param {string[]} [settings.alpn] The application's protocols.
   * @param {"require" | "prefer"} [settings.policy]
   * @param {string[]} [settings.groups]
   * @param {string} [settings.kem] Explicit KEM.
   * @param {number} [settings.announcedKeys] Keys to fetch at a bootstrap for later connections.
   * @param {boolean} [settings.pipelined]
   */
  constructor(settings) {
    const defaults = { policy: "require", alpn: [], groups: ["X25519MLKEM768"], announcedKeys: 0, pipelined: true };
    this.#settings = { ...defaults, ...settings };
    this.#settings.offeredAlpn = [PROTOCOL, ...this.#settings.alpn];
    this.#kme = new Kme(settings.kme);
  }

  /**
   * @returns {Promise<{socket: import("node:tls").TLSSocket, info: object}>}
   * @throws {QkdError} Or an error of the TLS stack, the KME or the transport.
   */
  async connect({ host, port, address = host }) {
    const tcp = connectTcp({ port, host: address, noDelay: true });
    await once(tcp, "connect");
    const transport = new Transport(tcp);
    try {
      return await this.#connect(transport, host);
    } catch (error) {
      transport.close();
      throw error;
    }
  }

  close() {
    this.#kme.close();
    for (const [host, association] of [...this.#associations]) this.#forget(host, association);
  }

  #forget(host, association) {
    association.wipe();
    // Another connection may have put a new one in its place.
    if (this.#associations.get(host) === association) this.#associations.delete(host);
  }

  async #connect(transport, host) {
    const kme = this.#kme.counted();
    const association = this.#associations.get(host);
    if (association?.usable === false) this.#forget(host, association);
    if (!association?.usable) {
      const handshake = Handshake.client(transport, this.#settings, host, null);
      await handshake.finish();
      return this.#bootstrap(transport, host, handshake, kme);
    }

    const announced = association.nextAnnounced();
    const [key] = announced ? [announced] : ((await this.#newKeys(kme, association.serverSae, 1)) ?? []);
    if (key === undefined) return this.#withoutKme(transport, host, kme);
    const handshake = this.#startHybrid(transport, host, association, key);
    await this.#finishHybrid(handshake, key.keyId);
    if (handshake.pskTaken) {
      return hybridConnection(handshake, association, {
        path: "associated",
        keyId: key.keyId,
        announced: announced !== null,
        kmeRequests: kme.requests,
      });
    }
    // Healing: the server does not know the association, or does not have the key. This handshake is a bootstrap.
    this.#forget(host, association);
    return this.#bootstrap(transport, host, handshake, kme);
  }

  // --- bootstrap

  async #bootstrap(transport, host, handshake, kme) {
    const { socket } = handshake;
    if (socket.alpnProtocol !== PROTOCOL) {
      const reason = `${host} does not speak ${PROTOCOL}`;
      if (this.#settings.policy === "require") throw new QkdError("unavailable", `${reason}, and QKD is required`);
      return ordinaryConnection(handshake, socket.alpnProtocol || null, reason, kme.requests);
    }

    const peer = await this.#peer(handshake);
    const keys = await this.#newKeys(kme, peer.saeId, Math.min(1 + this.#settings.announcedKeys, peer.maxKeys));
    if (keys === null) return this.#withoutKey(handshake, kme);
    try {
      return await this.#offer(transport, host, handshake, peer, keys, kme);
    } catch (error) {
      for (const { key } of keys) key.fill(0);
      throw error;
    }
  }

  async #offer(transport, host, handshake, peer, keys, kme) {
    const needsKem = !GROUPS_WITH_ML_KEM.has(handshake.channel.group);
    const kem = this.#settings.kem ?? (needsKem ? "ML-KEM-768" : null);
    if (peer.kems !== undefined && kem !== null && !peer.kems.includes(kem)) {
      throw new QkdError("unavailable", `the server does not have ${kem}`, { code: "unsupported_kem" });
    }
    const keyPair = kem === null ? null : newKeyPair(kem);
    const pipelined = this.#settings.pipelined && peer.kems === undefined && keyPair === null;

    await handshake.send({
      type: "offer",
      kms: KMS,
      sae_id: this.#settings.saeId,
      key_ids: keys.map(({ keyId }) => keyId),
      ...(keyPair && { kem: { name: kem, ek: keyPair.ek.toString("base64") } }),
      ...(pipelined && { pipelined }),
    });
    const associate = (kemSecret) =>
      new Association({
        exported: handshake.exported(),
        kemSecret,
        kem,
        clientSae: this.#settings.saeId,
        serverSae: peer.saeId,
        serverName: host,
        certificate: handshake.socket.getPeerCertificate(),
      });
    const [first, ...others] = keys;
    let association = null;
    let second = null;
    try {
      if (pipelined) {
        // All that the second ClientHello needs is known, so it follows the offer at once.
        association = associate();
        second = this.#startHybrid(transport, host, association, first);
      }
      const answer = await handshake.receive();
      if (answer.type === "reject") {
        second?.drop();
        association?.wipe();
        for (const { key } of keys) key.fill(0);
        return this.#rejected(handshake, answer, kme);
      }
      this.#checkAccept(answer, peer, keys, keyPair);
      association ??= associate(keyPair ? decapsulateWith(keyPair, Buffer.from(answer.kem.ct, "base64")) : undefined);
      association.endsAfter(answer.lifetime);
      association.announce(others.filter(({ keyId }) => answer.key_ids.includes(keyId)));
      handshake.drop();

      second ??= this.#startHybrid(transport, host, association, first);
      await this.#finishHybrid(second, first.keyId);
      if (!second.pskTaken) {
        throw new QkdError("unavailable", `${host} has forgotten the association at once: are there two servers?`);
      }
    } catch (error) {
      second?.drop();
      association?.wipe();
      throw error;
    }
    this.#associations.set(host, association);
    return hybridConnection(second, association, {
      path: "bootstrap",
      keyId: first.keyId,
      announced: false,
      kmeRequests: kme.requests,
    });
  }

  /** SAE ID and abilities of the server; of those, only what it was asked for. */
  async #peer(handshake) {
    if (this.#settings.peerSaeId) return { saeId: this.#settings.peerSaeId, maxKeys: MOST_KEYS };
    await handshake.send({ type: "discover" });
    const answer = await handshake.receive();
    if (answer.type === "reject") throw rejection(answer);
    if (answer.type !== "identity") throw protocolError(`${answer.type} answers discover`);
    if (!answer.kms.includes(KMS)) {
      throw new QkdError("unavailable", `the server's KMS is not of the kind ${KMS}`, { code: "unsupported_kms" });
    }
    return { saeId: answer.sae_id, kems: answer.kems, maxKeys: answer.max_keys };
  }

  /** Keys for this connection and later ones; null where there are none and policy lets the connection go on. */
  async #newKeys(kme, peerSae, number) {
    try {
      return await kme.getKeys(peerSae, number);
    } catch (error) {
      if (error instanceof KmeError && this.#settings.policy === "prefer") return null;
      throw error;
    }
  }

  /** No key for a connection of an association: a handshake that does not speak of QKD. */
  async #withoutKme(transport, host, kme) {
    const settings = { ...this.#settings, offeredAlpn: this.#settings.alpn };
    const handshake = Handshake.client(transport, settings, host, null);
    const socket = await handshake.finish();
    return ordinaryConnection(handshake, socket.alpnProtocol || null, "kms_unavailable", kme.requests);
  }

  /** No key in a bootstrap: an offer of none, so that the server may go on, too. */
  async #withoutKey(handshake, kme) {
    await handshake.send({ type: "offer", kms: "none", sae_id: this.#settings.saeId, key_ids: ["none"] });
    const answer = await handshake.receive();
    if (answer.type !== "reject") throw protocolError(`${answer.type} answers an offer without a key`);
    return this.#rejected(handshake, answer, kme);
  }

  #rejected(handshake, answer, kme) {
    if (this.#settings.policy === "require" || ENDS.has(answer.code)) throw rejection(answer);
    if (answer.alpn !== null && !this.#settings.alpn.includes(answer.alpn)) {
      throw protocolError("reject: alpn is not one of the protocols offered");
    }
    return ordinaryConnection(handshake, answer.alpn, answer.code, kme.requests);
  }

  #checkAccept(answer, peer, keys, keyPair) {
    if (answer.type !== "accept") throw protocolError(`${answer.type} answers an offer`);
    if (answer.sae_id !== peer.saeId) {
      throw protocolError(`the server is ${JSON.stringify(answer.sae_id)} and not ${JSON.stringify(peer.saeId)}`);
    }
    const offered = keys.map(({ keyId }) => keyId);
    const inOrder = offered.filter((keyId) => answer.key_ids.includes(keyId));
    if (answer.key_ids[0] !== offered[0] || inOrder.join(" ") !== answer.key_ids.join(" ")) {
      throw protocolError("accept names other key IDs than the offer");
    }
    if ((answer.kem !== undefined) !== (keyPair !== null)) throw protocolError("accept: kem does not fit the offer");
  }

  // --- hybrid handshake

  #startHybrid(transport, host, association, { keyId, key }) {
    const identity = association.identity(KDF, keyId);
    association.spend(keyId);
    const psk = association.psk(identity, KDF, key);
    return Handshake.client(transport, this.#settings, host, { identity, psk });
  }

  async #finishHybrid(handshake, keyId) {
    try {
      await handshake.finish();
    } catch (error) {
      if (error.code !== DECRYPT_ERROR) throw error;
      throw new QkdError("mismatch", `the two KMEs gave different keys for the key ID ${keyId}`, { keyId });
    }
  }
}

function rejection({ code, detail }) {
  const kind = ENDS.has(code) ? "protocol" : "unavailable";
  return new QkdError(kind, `the server rejects the offer: ${code}: ${printable(detail)}`, { code });
}
