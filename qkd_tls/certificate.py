"""A peer's certificate in the standard library's form, for `getpeercert()`: pure functions.

The standard library can make this dictionary only from its own connections. Names of attribute types come from
the same table that it uses, OpenSSL's long names.
"""

from __future__ import annotations

import functools
import ssl
import struct
from collections.abc import Iterable
from datetime import datetime
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final, TypeAlias, TypeVar

from cryptography import x509
from cryptography.x509.oid import AuthorityInformationAccessOID

__all__ = ["certificate_dict", "not_after"]

_NameTuple: TypeAlias = tuple[tuple[tuple[str, str | bytes], ...], ...]
_Extension = TypeVar("_Extension", bound=x509.ExtensionType)

# Not strftime("%b"), which depends on the locale.
_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def certificate_dict(der: bytes) -> dict[str, Any]:
    """Return the dictionary of `ssl.SSLSocket.getpeercert()` for a certificate that was verified.

    Args:
        der: the certificate in DER.

    Raises:
        ValueError: it is not a certificate, or `cryptography` finds an extension or a name malformed.
    """
    certificate = x509.load_der_x509_certificate(der)
    result: dict[str, Any] = {
        "subject": _name(certificate.subject),
        "issuer": _name(certificate.issuer),
        "version": certificate.version.value + 1,
        "serialNumber": _serial_number(certificate.serial_number),
        "notBefore": _time(certificate.not_valid_before_utc),
        "notAfter": _time(certificate.not_valid_after_utc),
    }
    extensions = certificate.extensions
    if alternative := _extension(extensions, x509.SubjectAlternativeName):
        result["subjectAltName"] = tuple(_general_name(name) for name in alternative)
    access = _extension(extensions, x509.AuthorityInformationAccess) or ()
    for key, method in (
        ("OCSP", AuthorityInformationAccessOID.OCSP),
        ("caIssuers", AuthorityInformationAccessOID.CA_ISSUERS),
    ):
        if uris := _uris(entry.access_location for entry in access if entry.access_method == method):
            result[key] = uris
    points = _extension(extensions, x509.CRLDistributionPoints) or ()
    if uris := _uris(name for point in points for name in point.full_name or ()):
        result["crlDistributionPoints"] = uris
    return result


def not_after(der: bytes) -> float:
    """Return the expiry time of a certificate, in Unix seconds.

    Raises:
        ValueError: it is not a certificate.
    """
    return x509.load_der_x509_certificate(der).not_valid_after_utc.timestamp()


def _extension(extensions: x509.Extensions, kind: type[_Extension]) -> _Extension | None:
    try:
        return extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _name(name: x509.Name) -> _NameTuple:
    return tuple(tuple((_long_name(a.oid), _value(a.value)) for a in rdn) for rdn in name.rdns)


def _value(value: str | bytes) -> str | bytes:
    # Bytes are those of a BIT STRING, a unique identifier; the first counts the bits unused in the last.
    return value if isinstance(value, str) else value[1:]


@functools.cache
def _long_name(oid: x509.ObjectIdentifier) -> str:
    """Return OpenSSL's long name of an object, or its number in dots."""
    try:
        return ssl._ASN1Object(oid.dotted_string).longname
    except ValueError:
        return oid.dotted_string


def _serial_number(number: int) -> str:
    """Format in upper-case hexadecimal, whole bytes."""
    digits = f"{abs(number):X}"
    return ("-" if number < 0 else "") + "0" * (len(digits) % 2) + digits


def _time(time: datetime) -> str:
    """Format like OpenSSL, for example `Jan  5 09:34:43 2018 GMT`."""
    return f"{_MONTHS[time.month - 1]} {time.day:2} {time:%H:%M:%S} {time.year} GMT"


def _general_name(name: x509.GeneralName) -> tuple[str, str | _NameTuple]:
    match name:
        case x509.DNSName():
            return "DNS", name.value
        case x509.RFC822Name():
            return "email", name.value
        case x509.UniformResourceIdentifier():
            return "URI", name.value
        case x509.IPAddress(value=IPv4Address() as address):
            return "IP Address", str(address)
        case x509.IPAddress(value=IPv6Address() as address):
            # Without the "::" for zeros.
            groups = struct.unpack(">8H", address.packed)
            return "IP Address", ":".join(f"{group:X}" for group in groups)
        case x509.DirectoryName():
            return "DirName", _name(name.value)
        case x509.RegisteredID():
            return "Registered ID", _long_name(name.value)
        case _:
            return "othername", "<unsupported>"


def _uris(names: Iterable[x509.GeneralName]) -> tuple[str, ...]:
    return tuple(name.value for name in names if isinstance(name, x509.UniformResourceIdentifier))
