"""Tandem aligns language models with human preferences and verifiable rewards."""

__version__ = "0.1.0"
