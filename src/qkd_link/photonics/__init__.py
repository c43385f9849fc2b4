"""The optics: what the transmitter sends, what the fibre and an eavesdropper leave, what the receiver detects."""
