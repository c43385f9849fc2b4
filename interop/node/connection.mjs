// What both sides know of a connection that is ready for the application.

import { GROUPS_WITH_ML_KEM, PROTOCOL } from "./handshake.mjs";

/**
 * A connection with a QKD key in it.
 * @param {import("./handshake.mjs").Handshake} handshake Whose PSK was taken.
 * @param {import("./association.mjs").Association} association
 * @param {{path: "bootstrap" | "associated", keyId: string, announced: boolean, kmeRequests: number}} how
 */
export function hybridConnection(handshake, association, how) {
  const { clientSae, serverSae, kem, id, certificate } = association;
  return ready(handshake, {
    protection: "hybrid",
    ...how,
    clientSae,
    serverSae,
    kem,
    association: id.toString("hex"),
    peer: certificate?.subject?.CN ?? null,
    fallback: null,
  });
}

/**
 * A connection without a QKD key, under policy `prefer`.
 * @param {string | null} alpn The application's protocol, which the bootstrap may not have selected itself.
 * @param {string} fallback Why.
 */
export function ordinaryConnection(handshake, alpn, fallback, kmeRequests) {
  return ready(handshake, {
    protection: GROUPS_WITH_ML_KEM.has(handshake.channel.group) ? "pq-only" : "classical",
    path: null,
    keyId: null,
    announced: false,
    kmeRequests,
    clientSae: null,
    serverSae: null,
    kem: null,
    association: null,
    peer: handshake.socket.getPeerCertificate()?.subject?.CN ?? null,
    fallback,
    alpn,
  });
}

function ready(handshake, info) {
  const { socket, channel } = handshake;
  channel.flow();
  const selected = socket.alpnProtocol || null;
  return {
    socket,
    info: {
      group: channel.group,
      cipher: socket.getCipher().standardName,
      alpn: selected === PROTOCOL ? null : selected,
      ...info,
    },
  };
}
