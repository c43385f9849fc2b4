"""The authentication of the classical channel: one-time keys from a reserve, and the bootstrap before there are any."""

__all__: list[str] = []
