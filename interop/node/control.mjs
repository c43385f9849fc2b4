// Control messages: section "Control messages" of docs/protocol.md. Encoding, and strict decoding.

import { protocolError } from "./errors.mjs";

export const KMS = "etsi-014";
export const MOST_KEYS = 64;
const LARGEST = 0xffff;

/** Reject codes after which a connection ends under every policy. After all others `prefer` lets it go on. */
export const ENDS = new Set(["kem_required", "unsupported_version", "malformed"]);

// --- frames

/** @param {object} message Its members beside `version`. */
export function encode(message) {
  const { type, ...members } = message;
  const json = Buffer.from(JSON.stringify({ type, version: 1, ...members }));
  if (json.length > LARGEST) throw new RangeError("a control message has at most 65,535 bytes");
  const length = Buffer.alloc(2);
  length.writeUInt16BE(json.length);
  return Buffer.concat([length, json]);
}

/**
 * The message in these bytes, or null while more are needed.
 * @param {Buffer} bytes All that has come since the last message.
 */
export function decode(bytes) {
  if (bytes.length < 2) return null;
  const end = 2 + bytes.readUInt16BE(0);
  if (bytes.length < end) return null;
  // The last byte of a message is the last byte of a record, so nothing can be here yet that comes after it.
  if (bytes.length > end) throw protocolError("something follows a control message in its record");
  return checked(parse(bytes.subarray(2)));
}

// --- JSON

function parse(bytes) {
  let text, message;
  try {
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    message = JSON.parse(text, onlyIntegers);
  } catch {
    throw protocolError("a control message is not JSON in UTF-8");
  }
  if (typeof message !== "object" || message === null || Array.isArray(message)) {
    throw protocolError("a control message is not a JSON object");
  }
  refuseDuplicates(text);
  return message;
}

/** JavaScript has one type for all numbers: 1.0 and 1e0 must not pass for the integer 1. */
function onlyIntegers(_name, value, { source }) {
  return typeof value === "number" && !/^-?\d+$/.test(source) ? Number.NaN : value;
}

/** JSON.parse takes the last of two members with one name. `text` is known to be JSON. */
function refuseDuplicates(text) {
  const objects = [];
  for (const [token, string] of text.matchAll(/("(?:[^"\\]|\\.)*")\s*:|"(?:[^"\\]|\\.)*"|[{}]/g)) {
    if (token === "{") objects.push(new Set());
    else if (token === "}") objects.pop();
    else if (string !== undefined) {
      const name = JSON.parse(string);
      if (objects.at(-1).has(name)) throw protocolError("a member of a control message appears twice");
      objects.at(-1).add(name);
    }
  }
}

// --- members

const isName = (value) => typeof value === "string" && /^[!-~]{1,200}$/.test(value);

const isSaeId = (value) =>
  typeof value === "string" &&
  value.isWellFormed() &&
  Buffer.byteLength(value) >= 1 &&
  Buffer.byteLength(value) <= 255 &&
  !/\p{Cc}/u.test(value);

const isInteger = (least, most) => (value) => Number.isInteger(value) && value >= least && value <= most;

const isNames = (least) => (value) => Array.isArray(value) && value.length >= least && value.every(isName);

const isDifferentNames = (value) =>
  isNames(1)(value) && value.length <= LARGEST && new Set(value).size === value.length;

const isBase64 = (value) =>
  typeof value === "string" && value !== "" && Buffer.from(value, "base64").toString("base64") === value;

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

const isOffered = (value) => isObject(value) && isName(value.name) && isBase64(value.ek);

const isEncapsulated = (value) => isObject(value) && isBase64(value.ct);

const optional = (check) => (value) => value === undefined || check(value);

const MEMBERS = {
  discover: {},
  identity: { sae_id: isSaeId, kms: isNames(1), kems: isNames(0), max_keys: isInteger(1, LARGEST) },
  offer: {
    kms: isName,
    sae_id: isSaeId,
    key_ids: isDifferentNames,
    kem: optional(isOffered),
    pipelined: optional((value) => typeof value === "boolean"),
  },
  accept: {
    sae_id: isSaeId,
    lifetime: isInteger(1, 2 ** 31),
    key_ids: isDifferentNames,
    kem: optional(isEncapsulated),
  },
  reject: {
    code: isName,
    detail: (value) => typeof value === "string",
    alpn: (value) => value === null || isName(value),
  },
};

function checked(message) {
  if (!Number.isInteger(message.version)) throw protocolError("a control message has no version");
  if (message.version !== 1) throw protocolError(`version ${message.version} of a message`, "unsupported_version");
  if (typeof message.type !== "string" || !Object.hasOwn(MEMBERS, message.type)) {
    throw protocolError("a control message has no type, or one that is unknown");
  }
  for (const [name, check] of Object.entries(MEMBERS[message.type])) {
    if (!check(Object.hasOwn(message, name) ? message[name] : undefined)) {
      throw protocolError(`${message.type}: ${name} is missing, or is not what it has to be`);
    }
  }
  if (message.type === "offer" && message.pipelined && message.kem !== undefined) {
    throw protocolError("offer: an explicit KEM cannot be pipelined");
  }
  return message;
}

/** What a peer wrote for people, without what could disturb a terminal. */
export function printable(text) {
  return text.replace(/[^ -~]/g, "?").slice(0, 500);
}
