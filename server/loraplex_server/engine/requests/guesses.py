"""Guesses of a request's next tokens: what followed the last time that its last tokens occurred.

The text is [prediction | prompt | output]. A guess that was right goes on where it ended, so an
answer that copies a passage follows it to its end. Guesses decide only how many tokens a step
computes, never which.
"""

from collections.abc import Sequence

_SIZES = (2, 1)  # last tokens that must have occurred before; the first size that did counts
_N_COMPARED = 3  # last tokens that must equal those where the guesses are read
_FIRST_RATE = 0.5
_LEARNING = 0.15  # weight of a guess in the rate
_FORGETTING = 0.002  # how far a rate returns to its first value in a step without guesses


class Guesses:
    """The text of one request, by its n-grams, and how often its guesses are right. Engine thread.

    An update costs only the new tokens.
    """

    def __init__(self, prediction: Sequence[int], prompt: Sequence[int]) -> None:
        """``prediction``: a text that the answer probably repeats from its beginning, or nothing.

        Negative ids in ``prompt`` are virtual tokens, which are never guessed.
        """
        self.rate = _FIRST_RATE  # estimated probability that the next guess is right
        self._text = [*prediction, *prompt]
        self._n_before = len(prediction)
        self._n_indexed = 0  # n-grams that end before this position are indexed
        self._next: dict[tuple[int, ...], int] = {}  # n-gram → the position after its last place
        self._source = 0 if prediction else -1  # where the last guesses were read; −1: nowhere

    def read(self, token_ids: Sequence[int], n_most: int) -> list[int]:
        """Return up to ``n_most`` guesses of what follows ``token_ids``, which only grow."""
        text = self._text
        n_known = len(text) - self._n_before
        text += token_ids[n_known:]
        # The last n-grams have no continuation yet.
        for end in range(self._n_indexed + 1, len(text)):
            for size in _SIZES:
                self._next[tuple(text[max(0, end - size) : end])] = end
        self._n_indexed = len(text) - 1
        self._source = self._follow(len(token_ids) - n_known)
        guesses: list[int] = []
        if self._source >= 0:
            for position in range(self._source, self._source + n_most):
                # Behind the end, the text since the source repeats.
                at_end = position >= len(text)
                token = guesses[position - len(text)] if at_end else text[position]
                if token < 0:
                    break
                guesses.append(token)
        return guesses

    def learn(self, n_guessed: int, n_right: int) -> None:
        """Adapts the rate to the guesses of a step, the first ``n_right`` of which were right."""
        self.rate = 1 - (1 - self.rate) * (1 - _LEARNING) ** n_right
        if n_right < n_guessed:
            self.rate *= 1 - _LEARNING

    def rest(self) -> None:
        """Lets the rate recover, so that a request whose guesses were wrong tries again."""
        self.rate += _FORGETTING * (_FIRST_RATE - self.rate)

    def _follow(self, n_new: int) -> int:
        """Return where the text goes on: after the last guesses, or where the n-gram occurred."""
        text = self._text
        source = self._source + n_new
        n_same = min(_N_COMPARED, n_new)
        if self._source >= 0 and text[source - n_same : source] == text[len(text) - n_same :]:
            return source
        places = (self._next.get(tuple(text[-size:]), -1) for size in _SIZES)
        return next((place for place in places if place >= 0), -1)
