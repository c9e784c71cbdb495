"""The `loraplex` command."""
