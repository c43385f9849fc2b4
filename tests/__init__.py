"""Tests, in folders that mirror the packages. What they share is in `support`; the fixtures are in `conftest.py`."""
