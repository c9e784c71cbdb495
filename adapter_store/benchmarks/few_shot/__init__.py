"""Adapters from a sentence and k examples, beside what else one can do with them."""
