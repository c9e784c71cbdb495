"""A catalogue of small, exactly scored tasks: operation × language × output format."""
