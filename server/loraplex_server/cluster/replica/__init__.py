"""An engine in a process of its own, and the messages between gateways and engines."""
