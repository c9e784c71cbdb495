"""Load tests: locust users, scenarios, baselines and reports. See README.md."""
