"""Attention over fewer keys: per-key bias, listed tiles, ANN-sparse history and collapsed prompts."""
