"""Plain ASGI middleware, outermost first: request ids, browser guard, keys, body limits."""
