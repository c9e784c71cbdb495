"""Routing: token → experts, request → adapter, request → replica."""
