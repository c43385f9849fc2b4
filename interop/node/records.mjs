// Two TLS connections on one transport: a byte stream that is cut at the records, and the ends that TLS gets of it.

import { Duplex } from "node:stream";
import { setImmediate as nextTurn } from "node:timers/promises";

import { closedError, protocolError, transportError } from "./errors.mjs";
import { CLIENT_HELLO, GroupWatch, HelloCollector } from "./hellos.mjs";

const HEADER = 5;
const LARGEST_PAYLOAD = (1 << 14) + 256;
const ALERT = 21;
const FATAL = 2;

/** A TCP connection that is read record by record. What was not asked for stays here. */
export class Transport {
  #socket;
  #chunks;
  #buffered = Buffer.alloc(0);

  /** @param {import("node:net").Socket} socket Connected; nobody else may read from it. */
  constructor(socket) {
    this.#socket = socket;
    this.#chunks = socket[Symbol.asyncIterator]();
    socket.on("error", () => {}); // Reading and writing report it.
  }

  /** The next whole record, with its header; null at the end of the stream. */
  async readRecord() {
    if (!(await this.#have(HEADER))) return null;
    const size = this.#buffered.readUInt16BE(3);
    if (this.#buffered[0] < 20 || this.#buffered[0] > 24 || this.#buffered[1] !== 3 || size > LARGEST_PAYLOAD) {
      throw protocolError("the peer sends something that is not TLS");
    }
    if (!(await this.#have(HEADER + size))) throw closedError("in a record");
    return this.#take(HEADER + size);
  }

  /** Whatever is there, or comes next; null at the end of the stream. */
  async readChunk() {
    return (await this.#have(1)) ? this.#take(this.#buffered.length) : null;
  }

  /**
   * The records of one ClientHello, and its body.
   * @returns {Promise<{records: Buffer[], body: Buffer}>}
   */
  async readClientHello() {
    const collector = new HelloCollector(CLIENT_HELLO);
    for (;;) {
      const record = await this.readRecord();
      if (record === null) throw closedError("before its ClientHello");
      const body = collector.add(record);
      if (body !== null) return { records: collector.records, body };
    }
  }

  write(bytes, done) {
    this.#socket.write(bytes, done);
  }

  /** Answer a ClientHello with a fatal alert, and no handshake. */
  refuse(alert) {
    this.#socket.end(Buffer.of(ALERT, 3, 3, 0, 2, FATAL, alert));
  }

  end(done) {
    this.#socket.end(done);
  }

  /** Close, once what was written has gone out. */
  close() {
    this.#socket.destroySoon();
  }

  async #have(size) {
    while (this.#buffered.length < size) {
      const { done, value } = await this.#chunks.next().catch((error) => {
        throw transportError(error);
      });
      if (done) return false;
      this.#buffered = this.#buffered.length === 0 ? value : Buffer.concat([this.#buffered, value]);
    }
    return true;
  }

  #take(size) {
    const taken = this.#buffered.subarray(0, size);
    this.#buffered = this.#buffered.subarray(size);
    return taken;
  }
}

/**
 * What one TLS connection takes for its socket.
 *
 * At first it gets one record at a time, by `feed`. After `flow` it reads by itself. After `detach` it is cut off:
 * neither direction of the transport has anything of this TLS connection any more.
 */
export class Channel extends Duplex {
  #transport;
  #flowing = false;
  #detached = false;
  #wanted = false;
  #watch = new GroupWatch();
  #isServer;

  /**
   * @param {Transport} transport
   * @param {boolean} isServer On whose side: the server's ServerHello goes out here, the client's comes in.
   */
  constructor(transport, isServer) {
    super();
    this.#transport = transport;
    this.#isServer = isServer;
    this.on("error", () => {}); // TLS reports it.
  }

  /** The key exchange group of the ServerHello that went through here; null before. */
  get group() {
    return this.#watch.group;
  }

  /** Give one record to TLS, and wait until TLS is done with it. */
  async feed(record) {
    if (!this.#isServer) this.#watch.see(record);
    this.push(record);
    // TLS decrypts as soon as it reads; what it puts off has happened after one turn of the event loop.
    do await nextTurn();
    while (this.readableLength > 0 && !this.destroyed);
  }

  /** Give the end of the stream to TLS. */
  feedEnd() {
    this.push(null);
  }

  flow() {
    this.#flowing = true;
    if (this.#wanted) this._read();
  }

  detach() {
    this.#detached = true;
  }

  _read() {
    this.#wanted = !this.#flowing;
    if (!this.#flowing || this.#detached) return;
    this.#transport.readChunk().then(
      (chunk) => this.push(chunk),
      (error) => this.destroy(error),
    );
  }

  _write(bytes, _encoding, done) {
    if (this.#detached) return done();
    if (this.#isServer) this.#watch.see(bytes);
    this.#transport.write(bytes, done);
  }

  _final(done) {
    if (this.#detached) return done();
    this.#transport.end(done);
  }

  _destroy(error, done) {
    if (!this.#detached) this.#transport.close();
    done(error);
  }
}
