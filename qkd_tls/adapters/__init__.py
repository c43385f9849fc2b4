"""Ways to give libraries a `QKDContext` where they do not take an `ssl.SSLContext` by themselves."""

__all__: list[str] = []
