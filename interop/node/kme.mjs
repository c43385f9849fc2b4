// A client of ETSI GS QKD 014 V1.1.1: "Get key" and "Get key with key IDs", over HTTPS with both certificates.

import { Agent, request } from "node:https";

import { SHORTEST_QKD_KEY } from "./derivation.mjs";
import { QkdError } from "./errors.mjs";

const TIMEOUT = 5000; // milliseconds for a whole request
const LARGEST_ANSWER = 1 << 20; // bytes

/** The KME did not give the keys. `code` is the reject code of qkd-tls/1 that fits. */
export class KmeError extends QkdError {
  constructor(code, message) {
    super("unavailable", message, { code });
  }
}

export class Kme {
  #agent;
  #url;
  requests = 0;

  /** @param {{url: string, cert: string, key: string, ca: string}} settings Of the SAE; PEM, except for the URL. */
  constructor({ url, cert, key, ca }) {
    this.#url = url;
    this.#agent = new Agent({ keepAlive: true, cert, key, ca, minVersion: "TLSv1.3" });
  }

  /**
   * Master SAE: new keys, shared with one peer.
   * @returns {Promise<{keyId: string, key: Buffer}[]>}
   */
  async getKeys(peerSae, number) {
    const keys = await this.#call("GET", `${encodeURIComponent(peerSae)}/enc_keys?number=${number}&size=256`);
    if (keys.length !== number) throw unusable(`${keys.length} keys instead of ${number}`);
    return keys;
  }

  /** Slave SAE: the keys with these IDs, in this order. */
  async getKeysById(peerSae, keyIds) {
    const body = JSON.stringify({ key_IDs: keyIds.map((keyId) => ({ key_ID: keyId })) });
    const keys = await this.#call("POST", `${encodeURIComponent(peerSae)}/dec_keys`, body);
    const byId = new Map(keys.map((one) => [one.keyId, one]));
    if (keys.length !== keyIds.length || !keyIds.every((keyId) => byId.has(keyId))) {
      throw unusable("other key IDs than those asked for");
    }
    return keyIds.map((keyId) => byId.get(keyId));
  }

  /** The same KME, with a count of its own: what one connection has asked. */
  counted() {
    return new Counted(this);
  }

  close() {
    this.#agent.destroy();
  }

  async #call(method, path, body) {
    this.requests += 1;
    let status, text;
    try {
      ({ status, text } = await this.#exchange(method, new URL(`/api/v1/keys/${path}`, this.#url), body));
    } catch (error) {
      throw new KmeError("kms_unavailable", `KME ${this.#url}: ${error.code ?? error.message}`);
    }
    if (status !== 200) {
      throw new KmeError(codeFor(method, status), `KME ${this.#url} answers with HTTP status ${status}`);
    }
    return container(text);
  }

  #exchange(method, url, body) {
    const headers = body === undefined ? {} : { "Content-Type": "application/json" };
    return new Promise((resolve, reject) => {
      const signal = AbortSignal.timeout(TIMEOUT);
      const outgoing = request(url, { method, headers, agent: this.#agent, signal }, (answer) => {
        const chunks = [];
        let length = 0;
        answer.on("data", (chunk) => {
          chunks.push(chunk);
          length += chunk.length;
          if (length > LARGEST_ANSWER) answer.destroy(new Error("the answer is too long"));
        });
        answer.on("error", reject);
        answer.on("end", () => resolve({ status: answer.statusCode, text: Buffer.concat(chunks).toString() }));
      });
      outgoing.on("error", reject);
      outgoing.end(body);
    });
  }
}

class Counted {
  #kme;
  requests = 0;

  constructor(kme) {
    this.#kme = kme;
  }

  getKeys(...wanted) {
    this.requests += 1;
    return this.#kme.getKeys(...wanted);
  }

  getKeysById(...wanted) {
    this.requests += 1;
    return this.#kme.getKeysById(...wanted);
  }
}

function codeFor(method, status) {
  if (status === 401 || status === 403) return "unknown_sae";
  if (method === "POST" && (status === 400 || status === 404)) return "unknown_key";
  return "kms_unavailable";
}

function unusable(what) {
  return new KmeError("kms_unavailable", `the KME answers with ${what}`);
}

/** The keys of a key container. Errors name no part of it, since it holds keys. */
function container(text) {
  let entries;
  try {
    entries = JSON.parse(text).keys.map(({ key_ID: keyId, key }) => ({ keyId, key: Buffer.from(key, "base64") }));
  } catch {
    throw unusable("something that is not a key container");
  }
  for (const { keyId, key } of entries) {
    if (typeof keyId !== "string" || !/^[!-~]{1,200}$/.test(keyId)) throw unusable("a key ID that cannot be used");
    if (key.length < SHORTEST_QKD_KEY) throw unusable("a key of less than 256 bits");
  }
  return entries;
}
