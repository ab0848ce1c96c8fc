"""Layers that carry a state from token to token, and whole sequences through them."""
