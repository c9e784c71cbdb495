"""Plain ASGI middleware, outermost first: request ids and logs, keys, body limits."""
