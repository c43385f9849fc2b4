// What ends a connection, and who is at fault.

export class QkdError extends Error {
  /**
   * @param {"protocol" | "closed" | "unavailable" | "mismatch"} kind The peer broke the rules; it has gone in the
   *   middle; no QKD key could be had; the two KMEs gave different keys.
   * @param {string} message What happened and what to do.
   * @param {{code?: string, keyId?: string}} [details] The reject code; the key ID.
   */
  constructor(kind, message, { code = null, keyId = null } = {}) {
    super(message);
    this.name = "QkdError";
    this.kind = kind;
    this.code = code;
    this.keyId = keyId;
  }
}

/** The peer has gone, and left no word why. */
export function closedError(when) {
  return new QkdError("closed", `the peer has closed the connection ${when}; see its log`);
}

/** `error`, or what it means where the transport has broken: reading and writing tell the same in different words. */
export function transportError(error) {
  return ["EPIPE", "ECONNRESET"].includes(error.code) ? closedError("without close_notify") : error;
}

/** The peer broke a rule of the protocol. `code` is what a server answers in a `reject`. */
export function protocolError(message, code = "malformed") {
  return new QkdError("protocol", message, { code });
}
