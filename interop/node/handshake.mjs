// One TLS 1.3 handshake of Node.js on a channel, and the control messages inside it.

import { connect, createServer } from "node:tls";
import { constants } from "node:crypto";
import { isIP } from "node:net";

import { decode, encode } from "./control.mjs";
import { EXPORTER_LABEL, EXPORTER_LENGTH } from "./derivation.mjs";
import { closedError, transportError } from "./errors.mjs";
import { Channel } from "./records.mjs";

export const PROTOCOL = "qkd-tls/1";
export const KDF = "sha256"; // Node.js hands PSKs to OpenSSL by a callback that fixes this hash.
export const GROUPS_WITH_ML_KEM = new Set(["X25519MLKEM768"]);

// Those with the hash of the PSK first: a server that follows the client's order comes out at one of them.
const SUITES_OF_PSK = "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256";
const ALL_SUITES = `${SUITES_OF_PSK}:TLS_AES_256_GCM_SHA384`;

function common({ ca, cert, key, groups }) {
  return { ca, cert, key, ecdhCurve: groups.join(":"), minVersion: "TLSv1.3", maxVersion: "TLSv1.3" };
}

/** One TLS connection; `socket` is the application's once the handshake is over. */
export class Handshake {
  #transport;
  #failure = null;
  #settled = false;
  #received = Buffer.alloc(0);
  #tls = null;
  #psk;
  channel;
  socket = null;

  constructor(transport, isServer, psk) {
    this.#transport = transport;
    this.#psk = psk;
    this.channel = new Channel(transport, isServer);
  }

  /**
   * Send a ClientHello.
   * @param {import("./records.mjs").Transport} transport
   * @param {object} settings Of the client.
   * @param {string} host For SNI and for the check of the certificate.
   * @param {{identity: string, psk: Buffer} | null} psk
   */
  static client(transport, settings, host, psk) {
    const handshake = new Handshake(transport, false, psk);
    const socket = connect({
      ...common(settings),
      socket: handshake.channel,
      host,
      servername: isIP(host) ? "" : host,
      ciphers: ALL_SUITES,
      ...(settings.offeredAlpn.length > 0 && { ALPNProtocols: settings.offeredAlpn }),
      ...(psk && { pskCallback: () => psk }),
    });
    handshake.#watch(socket);
    socket.once("secureConnect", () => handshake.#done(socket));
    return handshake;
  }

  /**
   * Answer a ClientHello.
   * @param {object} settings Of the server.
   * @param {string | null} alpn What to select.
   * @param {{identity: string, psk: Buffer} | null} psk What the ClientHello names, and is to be taken.
   */
  static server(transport, settings, alpn, psk) {
    const handshake = new Handshake(transport, true, psk);
    // A server object for one connection, since ALPN and PSK are those of one connection. It never listens.
    const server = createServer({
      ...common(settings),
      ciphers: psk ? SUITES_OF_PSK : ALL_SUITES,
      // Tickets with nothing in them, and no store of sessions: none can be resumed. (The keys of other tickets would
      // be those of this server object, and nobody's any more after the connection.)
      secureOptions: constants.SSL_OP_NO_TICKET,
      requestCert: settings.mutual && !psk,
      rejectUnauthorized: true,
      ...(alpn && { ALPNProtocols: [alpn] }),
      ...(psk && { pskCallback: (_socket, identity) => (identity === psk.identity ? psk.psk : null) }),
    });
    server.once("secureConnection", (socket) => {
      handshake.#watch(socket);
      handshake.#done(socket);
    });
    server.once("tlsClientError", (error, socket) => {
      const distrust = socket.authorizationError; // Node.js then just closes, and reports no more than that.
      handshake.#failed(distrust ? new Error(`the client's certificate is refused: ${distrust}`) : error);
    });
    server.emit("connection", handshake.channel);
    return handshake;
  }

  #watch(socket) {
    this.#tls = socket;
    socket.on("error", (error) => this.#failed(error));
  }

  #done(socket) {
    this.socket = socket;
    this.#settled = true;
  }

  #failed(error) {
    this.#failure ??= transportError(error);
    this.#settled = true;
  }

  /**
   * Read records until the handshake is over. The PSK is wiped then.
   * @param {Buffer[]} [records] Those that have been read already.
   */
  async finish(records = []) {
    try {
      for (const record of records) await this.channel.feed(record);
      while (!this.#settled) await this.#step();
    } finally {
      this.#psk?.psk.fill(0);
    }
    if (this.#failure !== null) throw this.#failure;
    return this.socket;
  }

  async #step() {
    const record = await this.#transport.readRecord();
    if (record === null) {
      this.channel.feedEnd();
      throw this.#failure ?? closedError("in the handshake");
    }
    await this.channel.feed(record);
  }

  /** Whether the PSK was taken. No session is ever resumed here, so nothing else can have been. */
  get pskTaken() {
    return this.socket.isSessionReused();
  }

  /** H */
  exported() {
    return this.socket.exportKeyingMaterial(EXPORTER_LENGTH, EXPORTER_LABEL, Buffer.alloc(0));
  }

  /** Returns when the message is on the transport. */
  async send(message) {
    await new Promise((resolve, reject) => {
      this.socket.write(encode(message), (error) => (error ? reject(transportError(error)) : resolve()));
    });
  }

  /** The next control message. Not one record more than it has is read. */
  async receive() {
    for (;;) {
      const chunk = this.socket.read();
      if (chunk !== null) {
        this.#received = Buffer.concat([this.#received, chunk]);
        const message = decode(this.#received);
        if (message !== null) {
          this.#received = Buffer.alloc(0);
          return message;
        }
      }
      if (this.#failure !== null) throw this.#failure;
      if (this.socket.readableEnded || this.socket.destroyed) {
        throw closedError("instead of a control message");
      }
      await this.#step();
    }
  }

  /** Close the connection; returns when close_notify is on its way. */
  async close() {
    await new Promise((resolve) => this.socket.end(resolve));
  }

  /** Drop this TLS connection without a word to the peer. The transport stays. */
  drop() {
    this.#psk?.psk.fill(0);
    this.channel.detach();
    this.#tls?.destroy();
    this.channel.destroy();
  }
}
