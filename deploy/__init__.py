"""Images, monitoring, and the check of both without a Docker engine."""
