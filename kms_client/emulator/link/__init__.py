"""A QKD link, emulated: optics, post-processing and the authenticated classical channel between two parties.

It knows nothing of KMEs or TLS; `kms_client.emulator` puts its keys into the stores of two KMEs.
"""

__all__: list[str] = []
