"""An emulated QKD link with a KME at each end, for tests and experiments.

Needs the extra `emulator`. Not for production: keys cross the link without quantum protection.
"""

try:
    import aiohttp as _aiohttp  # noqa: F401
except ImportError as error:
    raise ImportError(
        "the KME emulator needs aiohttp: install qkd-tls with the extra emulator, as in"
        " `pip install 'qkd-tls[emulator]'`"
    ) from error

from kms_client.emulator.delivery import Faults, Limits
from kms_client.emulator.kme import KME
from kms_client.emulator.pair import KMEPair, RunningPair, run_pair
from kms_client.emulator.pki import DemoPKI, add_sae, ensure_demo_pki, write_demo_pki
from kms_client.emulator.source import KeySource, OSRandomSource
from kms_client.emulator.store import Delivery

__all__ = [
    "KME",
    "Delivery",
    "DemoPKI",
    "Faults",
    "KMEPair",
    "KeySource",
    "Limits",
    "OSRandomSource",
    "RunningPair",
    "add_sae",
    "ensure_demo_pki",
    "run_pair",
    "write_demo_pki",
]
