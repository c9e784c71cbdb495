"""Stop strings are found whatever the pieces, and never shown in part."""

from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_server.text.stop_strings import StopScanner

short = st.text("ab", max_size=12)
stops = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


def scan(pieces: list[str], stop: list[str]) -> tuple[str, str | None]:
    scanner = StopScanner(stop)
    text = ""
    for piece in pieces:
        scanned = scanner.push(piece)
        text += scanned.text
        if scanned.stop is not None:
            return text, scanned.stop
    return text + scanner.flush(), None


def first_stop(text: str, stop: list[str]) -> tuple[str, str | None]:
    """By definition: the shortest beginning that ends with a stop string, longest one first."""
    for end in range(len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(deadline=None, max_examples=500)
@given(st.lists(short, max_size=5), stops)
def test_the_cut_does_not_depend_on_the_pieces(pieces: list[str], stop: list[str]) -> None:
    assert scan(pieces, stop) == first_stop("".join(pieces), stop)


@settings(deadline=None)
@given(st.lists(short, max_size=5), stops)
def test_at_most_the_longest_stop_string_less_one_character_is_held_back(
    pieces: list[str], stop: list[str]
) -> None:
    scanner = StopScanner(stop)
    given_text = shown = ""
    for piece in pieces:
        given_text += piece
        scanned = scanner.push(piece)
        shown += scanned.text
        if scanned.stop is not None:
            return
        assert len(given_text) - len(shown) <= max(map(len, stop)) - 1


def test_text_that_cannot_become_a_stop_string_is_shown_at_once() -> None:
    scanner = StopScanner(["</answer>"])
    assert scanner.push("42 is").text == "42 is"
    assert scanner.push(" it <").text == " it "
    assert scanner.push("b>").text == "<b>"


def test_an_unarmed_scanner_lets_everything_pass() -> None:
    scanner = StopScanner(["stop"])
    assert scanner.push("stop", armed=False) == ("stop", None)
    assert scanner.push("stop") == ("", "stop")
