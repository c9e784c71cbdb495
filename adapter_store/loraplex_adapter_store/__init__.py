"""Adapters: reads, checks, folds, stores and caches them."""
