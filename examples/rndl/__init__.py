"""TLS 1.3 and qkd-tls/1 from the specifications: a client that reveals its secrets, and an eavesdropper.

Nothing here comes from `qkd_tls`: only the standard library and the primitives of `cryptography`. It is
written to be read, for demonstrations and tests. It is not a TLS library: nothing is constant-time, and
nothing is wiped.
"""
