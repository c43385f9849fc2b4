"""From sifted bits to secret bits: reconciliation, verification, secret length, privacy amplification."""

__all__: list[str] = []
