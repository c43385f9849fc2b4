"""The optics: the pulses sent, the losses in the fibre and to an eavesdropper, the receiver's clicks."""

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
