"""Training recipes and families beside each other on natural tasks, at equal time."""
