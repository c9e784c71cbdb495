"""Thin routes: parse, call, encode."""
