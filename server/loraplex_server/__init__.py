"""Loraplex inference server: engine and HTTP front."""
