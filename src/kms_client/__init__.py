"""Fetch QKD keys from a key management system (KMS)."""
