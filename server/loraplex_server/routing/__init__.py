"""Semantic routing in the server: the sentence encoder, and the thread that owns it."""
