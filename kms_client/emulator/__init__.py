"""An emulated QKD link with a KME at each end, for tests and experiments.

Needs the extra `emulator`. Not for production: keys cross the link without quantum protection.
"""

from importlib import util as _util

# Found, not imported: NumPy takes time to import, and a pair of KMEs without a QKD link does not use it.
if not all(map(_util.find_spec, ("aiohttp", "numpy"))):
    raise ImportError(
        "the KME emulator needs aiohttp and NumPy; install them with: pip install aiohttp numpy"
    )

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
