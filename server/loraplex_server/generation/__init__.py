"""Adapters made on the fly from descriptions, kept in the store for a while."""
