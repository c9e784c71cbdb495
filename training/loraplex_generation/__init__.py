"""Adapters from a sentence, refined by examples."""
