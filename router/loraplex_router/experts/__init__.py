"""Token → experts."""
