"""Small, exactly scored tasks: operation × language × output format."""
