"""How well generated adapters do their tasks: methods, scores, reports. Outside the wheel."""
