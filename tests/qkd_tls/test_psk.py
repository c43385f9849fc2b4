"""The PSK of one handshake, and the keys it is made of."""

from __future__ import annotations

import pytest

from kms_client import NoKeysLeft
from qkd_tls.endpoint import fetch_keys
from qkd_tls.engine import FetchKeys, FetchKeysByID
from qkd_tls.hybrid import KDF
from qkd_tls.psk import PSK
from tests.support.memory import SAE_A, SAE_B, link

pytestmark = pytest.mark.pure


class TestPSK:
    def test_wipe(self) -> None:
        secret = bytearray(b"s" * 48)
        psk = PSK(b"identity", secret, KDF.SHA384, "key-1")
        psk.wipe()
        assert secret == bytes(48)
        psk.wipe()

    def test_repr_tells_no_secret(self) -> None:
        psk = PSK(b"identity", bytearray(b"s" * 48), KDF.SHA384, "key-1")
        assert "sss" not in repr(psk)
        assert "key-1" in repr(psk)


class TestFetch:
    def test_both_requests(self) -> None:
        a, b = link()
        keys = fetch_keys(FetchKeys(SAE_B, 2), a)
        assert isinstance(keys, list)
        same = fetch_keys(FetchKeysByID(SAE_A, tuple(key.key_id for key in keys)), b)
        assert isinstance(same, list)
        for ours, theirs in zip(keys, same, strict=True):
            with ours.use() as one, theirs.use() as other:
                assert one == other

    def test_an_error_of_the_kms_is_an_answer(self) -> None:
        a, _ = link()
        error = NoKeysLeft("no keys")
        a.fail(error)
        assert fetch_keys(FetchKeys(SAE_B, 1), a) is error

    def test_any_other_error_is_not(self) -> None:
        a, _ = link()
        with pytest.raises(ValueError, match="number of keys"):
            fetch_keys(FetchKeys(SAE_B, 0), a)
