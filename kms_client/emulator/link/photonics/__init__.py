"""The optics: what the transmitter sends, what the fibre and an eavesdropper leave, what the receiver detects."""

from kms_client.emulator.link.photonics.line import Choices, Line, Photons, Sent
from kms_client.emulator.link.photonics.parameters import (
    CHECK_BASIS,
    DEFAULT,
    GYS,
    KEY_BASIS,
    Detector,
    Eavesdropper,
    Fibre,
    Optics,
    Source,
)
from kms_client.emulator.link.photonics.receiver import Clicks, Receiver

__all__ = [
    "CHECK_BASIS",
    "DEFAULT",
    "GYS",
    "KEY_BASIS",
    "Choices",
    "Clicks",
    "Detector",
    "Eavesdropper",
    "Fibre",
    "Line",
    "Optics",
    "Photons",
    "Receiver",
    "Sent",
    "Source",
]
