"""TLS 1.3 and qkd-tls/1 once more, from the specifications: a client that tells its secrets, and an eavesdropper.

Nothing here comes from `qkd_tls`: only the standard library and the primitives of `cryptography`. It is written to be
read, for demonstrations and tests. It is no TLS library: nothing is done in constant time, nothing wiped.
"""
