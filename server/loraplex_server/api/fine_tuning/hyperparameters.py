"""The values of hyperparameters that a job leaves to the server (``auto``)."""

from collections.abc import Mapping

from loraplex_server.adapters.fine_tuning.training_lines import Method

_LEARNING_RATES = {"supervised": 1e-3, "dpo": 2e-4}  # at a multiplier of 1
_BETA = 0.1
# OpenAI's guide to data preparation: three epochs, unless there are few or many examples.
_EPOCHS, _MAX_EPOCHS = 3, 25
_MIN_EXAMPLES, _MAX_EXAMPLES = 100, 25_000  # of all epochs together
_BATCHES = (8, 64)  # least and largest batch
_BATCH_SHARE = 0.002  # of the examples


def resolved(
    method: Method, asked: Mapping[str, str | int | float], n_examples: int
) -> tuple[dict[str, int | float], float]:
    """Return the hyperparameters as numbers, and the learning rate."""
    epochs = _EPOCHS
    if n_examples * epochs < _MIN_EXAMPLES:
        epochs = min(_MAX_EPOCHS, -(-_MIN_EXAMPLES // n_examples))
    elif n_examples * epochs > _MAX_EXAMPLES:
        epochs = max(1, _MAX_EXAMPLES // n_examples)
    batch = min(max(_BATCHES[0], round(n_examples * _BATCH_SHARE)), _BATCHES[1])
    values: dict[str, int | float] = {
        "n_epochs": epochs,
        "batch_size": min(batch, n_examples),
        "learning_rate_multiplier": 1.0,
        **({"beta": _BETA} if method == "dpo" else {}),
    }
    values |= {name: value for name, value in asked.items() if not isinstance(value, str)}
    return values, _LEARNING_RATES[method] * values["learning_rate_multiplier"]
