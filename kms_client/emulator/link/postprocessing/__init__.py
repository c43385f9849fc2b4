"""From sifted bits to secret bits: reconciliation, verification, privacy amplification, and how much is secret."""

__all__: list[str] = []
