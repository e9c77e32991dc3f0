"""Texts and tokenizers: what goes into a model."""
