"""Adapters (LoRA and its kin): on which layers, how they are computed, and as folders of peft."""
