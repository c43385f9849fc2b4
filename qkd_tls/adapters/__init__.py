"""Ways to give a `QKDContext` to libraries that do not take an `ssl.SSLContext` by themselves."""

__all__: list[str] = []
