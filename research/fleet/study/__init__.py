"""Costs of a replica, fitted; the simulator, checked; and what it says of fleets."""
