"""GMP-ATL: gender-augmented multi-scale pseudo-labels for speech emotion recognition with HuBERT."""

__version__ = "0.1.0"
