"""TLS 1.3 connections keyed by X25519, ML-KEM-768 and a QKD key, authenticated with X.509 certificates."""
