"""The handshake of qkd-tls/1 as a sans-I/O state machine, for both roles.

An engine never reads a socket and never calls a KMS. It is fed bytes, gives bytes, and says what it needs next::

    while True:
        transport.send(engine.data_to_send())
        match engine.next_action():
            case NeedData():
                engine.receive_data(transport.receive())        # b"" at the end of the stream
            case FetchKeys() | FetchKeysByID() as fetch:
                engine.keys(keys from the KMS, or the KMSError it raised)
        case ChooseContext(name):                           # only if the configuration says so
                engine.choose(the configuration for that name)
            case Established():
                break

`next_action` raises the error that ended the handshake: `ssl.SSLError` and its subclasses, including the
QKDErrors. Any remaining output of `data_to_send` (an alert) is then worth sending.

The state changes in one place only, `Engine._go`, and `TRANSITIONS` in `states.py` is all that it may do.
"""

from qkd_tls.engine.base import ALPN_PROTOCOL, Engine, EngineConfig
from qkd_tls.engine.client import ClientEngine
from qkd_tls.engine.server import ServerEngine
from qkd_tls.engine.states import (
    TRANSITIONS,
    Action,
    ChooseContext,
    Established,
    Event,
    FetchKeys,
    FetchKeysByID,
    NeedData,
    State,
    Step,
)

__all__ = [
    "ALPN_PROTOCOL",
    "TRANSITIONS",
    "Action",
    "ChooseContext",
    "ClientEngine",
    "Engine",
    "EngineConfig",
    "Established",
    "Event",
    "FetchKeys",
    "FetchKeysByID",
    "NeedData",
    "ServerEngine",
    "State",
    "Step",
]
