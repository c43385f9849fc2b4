"""What a connection says about itself, and what errors say."""

from __future__ import annotations

import json
import ssl

import pytest

from qkd_tls import errors
from qkd_tls.control import RejectCode
from qkd_tls.engine.hints import CLIENT_HINTS, REJECT_HINTS, SERVER_HINTS, with_hint
from qkd_tls.errors import QKDError, QKDKeyMismatch, QKDProtocolError, QKDUnavailable, ssl_error
from qkd_tls.info import HandshakePath, Protection, QKDInfo
from qkd_tls.policy import Policy

pytestmark = pytest.mark.pure


class TestInfo:
    def test_as_dict_is_plain_data(self) -> None:
        info = QKDInfo(
            protection=Protection.HYBRID,
            group="X25519MLKEM768",
            cipher="TLS_AES_256_GCM_SHA384",
            path=HandshakePath.ASSOCIATED,
            key_id="key-1",
        )
        plain = info.as_dict()
        assert json.loads(json.dumps(plain)) == plain
        assert (plain["protection"], plain["path"], plain["key_id"]) == ("hybrid", "associated", "key-1")
        assert type(plain["protection"]) is type(plain["path"]) is str
        assert (plain["alpn"], plain["announced"], plain["kms_round_trips"]) == (None, False, 0)
        assert set(plain) == set(QKDInfo.__slots__)

    def test_a_connection_without_a_key(self) -> None:
        info = QKDInfo(protection=Protection.PQ_ONLY, group="X25519MLKEM768", cipher="c", fallback="why")
        assert info.as_dict()["path"] is None
        assert info.as_dict()["fallback"] == "why"

    def test_names(self) -> None:
        assert [str(each) for each in Protection] == ["hybrid", "pq-only", "classical"]
        assert [str(each) for each in Policy] == ["require", "prefer", "off"]


class TestErrors:
    @pytest.mark.parametrize("kind", [QKDError, QKDUnavailable, QKDKeyMismatch, QKDProtocolError])
    def test_a_program_that_copes_with_tls_errors_copes_with_these(self, kind: type[QKDError]) -> None:
        error = kind("it broke", hint="mend it", peer="SAE-B", kms="kme-a", key_ids=("k",), code="busy")
        assert isinstance(error, ssl.SSLError)
        assert isinstance(error, OSError)
        assert "it broke. What to do: mend it" in str(error)
        assert (error.hint, error.peer, error.kms, error.key_ids, error.code) == (
            "mend it",
            "SAE-B",
            "kme-a",
            ("k",),
            "busy",
        )
        assert (error.library, error.reason) == ("QKD", kind.__name__)
        assert error.errno == ssl.SSL_ERROR_SSL

    def test_what_is_not_known_is_empty(self) -> None:
        error = QKDUnavailable("it broke", hint="mend it")
        assert (error.peer, error.kms, error.key_ids, error.code) == (None, "", (), None)

    @pytest.mark.parametrize(
        ("kind", "number"),
        [
            (ssl.SSLWantReadError, ssl.SSL_ERROR_WANT_READ),
            (ssl.SSLWantWriteError, ssl.SSL_ERROR_WANT_WRITE),
            (ssl.SSLZeroReturnError, ssl.SSL_ERROR_ZERO_RETURN),
            (ssl.SSLEOFError, ssl.SSL_ERROR_EOF),
            (ssl.SSLError, ssl.SSL_ERROR_SSL),
            (ssl.SSLCertVerificationError, ssl.SSL_ERROR_SSL),
        ],
    )
    def test_ssl_error(self, kind: type[ssl.SSLError], number: int) -> None:
        error = ssl_error(kind, "text")
        assert type(error) is kind
        assert error.errno == number
        assert [error.library, error.reason] == [None, None]
        named = ssl_error(kind, "text", "SOME_REASON")
        assert (named.library, named.reason) == ("SSL", "SOME_REASON")

    def test_all_is_complete(self) -> None:
        public = {
            name
            for name, value in vars(errors).items()
            if getattr(value, "__module__", "") == errors.__name__ and not name.startswith("_")
        }
        assert public == set(errors.__all__)


class TestHints:
    def test_every_reject_code_has_one(self) -> None:
        assert set(REJECT_HINTS) == set(RejectCode)

    def test_the_error_stays_what_it_is(self) -> None:
        error = ssl_error(ssl.SSLError, "[SSL] tlsv1 alert unknown ca", "TLSV1_ALERT_UNKNOWN_CA")
        explained = with_hint(error, CLIENT_HINTS["TLSV1_ALERT_UNKNOWN_CA"])
        assert type(explained) is ssl.SSLError
        assert (explained.errno, explained.library, explained.reason) == (
            ssl.SSL_ERROR_SSL,
            "SSL",
            "TLSV1_ALERT_UNKNOWN_CA",
        )
        assert explained.args[1].startswith("[SSL] tlsv1 alert unknown ca: the server does not trust")

    def test_no_hint(self) -> None:
        error = ssl_error(ssl.SSLError, "text")
        assert with_hint(error, "") is error

    def test_server_hints_name_both_lists_of_groups(self) -> None:
        text = SERVER_HINTS["NO_SUITABLE_KEY_SHARE"].format(ours="A", theirs="B")
        assert "the client offers B, this server has A" in text
