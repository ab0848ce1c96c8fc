"""Whether a model computes what its own forward does: a probe, a small copy, and limits that both go beyond."""
