// What has to be read from a ClientHello and a ServerHello (RFC 8446 section 4.1) beside the TLS stack.
//
// The server must know the PSK identity before its TLS stack does, since the stack's callback cannot wait for a KME.
// And both sides want the negotiated group, for which Node.js has no name to give.

import { protocolError } from "./errors.mjs";

export const HANDSHAKE = 22;
export const CLIENT_HELLO = 1;
const SERVER_HELLO = 2;
const LARGEST_CLIENT_HELLO = 0xffff;
const MOST_RECORDS = 256;

const EXTENSION = { serverName: 0, alpn: 16, preSharedKey: 41, keyShare: 51 };
const GROUPS = { 0x001d: "X25519", 0x11ec: "X25519MLKEM768" };
/** The random value that makes a ServerHello a HelloRetryRequest. */
const RETRY = "cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c";

/** Takes fields off a byte string, and never reads past its end. */
class Reader {
  constructor(bytes) {
    this.bytes = bytes;
  }

  get empty() {
    return this.bytes.length === 0;
  }

  take(length) {
    if (length > this.bytes.length) throw protocolError("a hello message ends too early");
    const taken = this.bytes.subarray(0, length);
    this.bytes = this.bytes.subarray(length);
    return taken;
  }

  number(size) {
    return this.take(size).readUIntBE(0, size);
  }

  /** A byte string with its length in front, in so many bytes. */
  vector(size) {
    return new Reader(this.take(this.number(size)));
  }

  /** Nothing may follow. */
  end() {
    if (!this.empty) throw protocolError("a field of a hello message is longer than what is in it");
  }
}

function extensions(reader) {
  const found = new Map();
  const all = reader.vector(2);
  while (!all.empty) {
    const type = all.number(2);
    if (found.has(type)) throw protocolError(`extension ${type} appears twice`);
    found.set(type, all.vector(2));
  }
  return found;
}

/**
 * Collects handshake messages from records that are not encrypted yet.
 * @param {number} type The message to wait for.
 */
export class HelloCollector {
  constructor(type) {
    this.type = type;
    this.records = [];
    this.payload = Buffer.alloc(0);
  }

  /** The body of the message, or null while more records have to follow. It must end where a record ends. */
  add(record) {
    if (record[0] !== HANDSHAKE) throw protocolError("there is something else where a ClientHello has to be");
    this.records.push(record);
    this.payload = Buffer.concat([this.payload, record.subarray(5)]);
    if (this.payload.length === 0) throw protocolError("an empty handshake record");
    if (this.payload[0] !== this.type) throw protocolError(`not a handshake message of type ${this.type}`);
    if (this.payload.length < 4) return null;
    const length = this.payload.readUIntBE(1, 3);
    if (length + 4 > LARGEST_CLIENT_HELLO || this.records.length > MOST_RECORDS) {
      throw protocolError("a hello message is too long");
    }
    if (this.payload.length > length + 4) throw protocolError("something follows a hello message in its record");
    return this.payload.length === length + 4 ? this.payload.subarray(4) : null;
  }
}

/**
 * @param {Buffer} body Of a ClientHello, without the four bytes in front.
 * @returns {{serverName: string | null, alpn: string[], pskIdentities: Buffer[]}}
 */
export function parseClientHello(body) {
  const reader = new Reader(body);
  reader.take(2 + 32); // legacy_version, random
  reader.vector(1); // legacy_session_id
  reader.vector(2); // cipher_suites
  reader.vector(1); // legacy_compression_methods
  const found = reader.empty ? new Map() : extensions(reader);
  reader.end();
  return {
    serverName: serverName(found.get(EXTENSION.serverName)),
    alpn: alpn(found.get(EXTENSION.alpn)),
    pskIdentities: pskIdentities(found.get(EXTENSION.preSharedKey)),
  };
}

function serverName(extension) {
  if (extension === undefined) return null;
  const names = extension.vector(2);
  extension.end();
  let host = null;
  while (!names.empty) {
    const type = names.number(1);
    const name = names.vector(2).bytes.toString("latin1");
    if (type === 0) host = name.toLowerCase();
  }
  return host;
}

function alpn(extension) {
  if (extension === undefined) return [];
  const names = extension.vector(2);
  extension.end();
  const protocols = [];
  while (!names.empty) protocols.push(names.vector(1).bytes.toString("latin1"));
  return protocols;
}

function pskIdentities(extension) {
  if (extension === undefined) return [];
  const offered = extension.vector(2);
  const identities = [];
  while (!offered.empty) {
    identities.push(offered.vector(2).bytes);
    offered.take(4); // obfuscated_ticket_age
  }
  return identities;
}

/** Watches one direction of a handshake for the ServerHello, and keeps the group it names. */
export class GroupWatch {
  #pending = Buffer.alloc(0);
  #collector = new HelloCollector(SERVER_HELLO);
  group = null;

  /** @param {Buffer} bytes In whatever pieces. */
  see(bytes) {
    if (this.group !== null) return;
    this.#pending = Buffer.concat([this.#pending, bytes]);
    while (this.group === null && this.#pending.length >= 5) {
      const size = 5 + this.#pending.readUInt16BE(3);
      if (this.#pending.length < size) return;
      this.#record(this.#pending.subarray(0, size));
      this.#pending = this.#pending.subarray(size);
    }
  }

  #record(record) {
    if (record[0] !== HANDSHAKE) return; // ChangeCipherSpec after a HelloRetryRequest, or an alert
    const body = this.#collector.add(record);
    if (body === null) return;
    this.#collector = new HelloCollector(SERVER_HELLO);
    const reader = new Reader(body);
    reader.take(2);
    if (reader.take(32).toString("hex") === RETRY) return;
    reader.vector(1);
    reader.take(3);
    const share = extensions(reader).get(EXTENSION.keyShare);
    const code = share === undefined ? 0 : share.number(2);
    this.group = GROUPS[code] ?? `group ${code}`;
  }
}
