"""Load tests: locust scenarios, the comparison with peers, and their reports."""
