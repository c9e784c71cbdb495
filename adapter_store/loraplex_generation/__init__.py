"""Adapters from a sentence: the task zoo, its library, and the maps from text to weights."""
