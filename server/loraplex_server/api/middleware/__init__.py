"""ASGI middleware, outermost first: request ids, tracing, browser guard, keys, body limits."""
