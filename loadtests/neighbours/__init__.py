"""Measurements of what one client's work does to the streams of others."""
