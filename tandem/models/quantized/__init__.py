"""A base in few bits: its layers, and folders of such models."""
