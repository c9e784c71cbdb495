"""Processes of a cluster that run the HTTP application: gateways and the coordinator."""
