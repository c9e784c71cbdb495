from dataclasses import dataclass

import pytest
import torch

from loraplex_router.adapters.auto_router import AdapterProfile, AutoRouter, lexical_features
from loraplex_router.adapters.classifier import Features, TextClassifier
from loraplex_router.adapters.encoder import CachedEncoder
from tests.support.bases.word_encoder import WordEncoder

SQL = AdapterProfile(
    "sql",
    "Writes one SQL query",
    ("SQL: count the orders", "SQL: list the customers", "SQL: average price of the products"),
)
PIRATE = AdapterProfile(
    "pirate",
    "Talks like a pirate",
    ("Arr matey where is the rum", "Arr matey sing a shanty", "Arr matey raise the anchor"),
)


@pytest.fixture
def router() -> AutoRouter:
    router = AutoRouter(WordEncoder())
    router.update([SQL, PIRATE])
    router.route(["hello there"])
    return router


def test_a_text_goes_to_the_adapter_whose_examples_it_resembles(router: AutoRouter) -> None:
    decision = router.route(["Arr matey tell of the sea"])[0]
    assert decision.adapter == "pirate"
    assert decision.candidates[0].name == "pirate"
    assert decision.margin > decision.threshold
    assert router.route(["SQL: count the products"])[0].adapter == "sql"


def test_a_text_like_nothing_known_is_left_to_the_base(router: AutoRouter) -> None:
    decision = router.route(["What is the boiling point of water?"])[0]
    assert decision.adapter is None
    assert decision.margin <= decision.threshold
    assert len(decision.candidates) == 2


@dataclass(frozen=True)
class Only:
    names: tuple[str, ...]

    def allows(self, name: str) -> bool:
        return name in self.names


def test_among_some_adapters_it_decides_as_if_there_were_no_others(router: AutoRouter) -> None:
    texts = ["Arr matey tell of the sea", "SQL: list the orders", "hello there"]
    alone = AutoRouter(WordEncoder())
    alone.update([SQL])
    assert router.route(texts, Only(("sql",))) == alone.route(texts)
    assert router.route(texts, Only(("sql", "pirate"))) == router.route(texts)
    nothing = router.route(texts[:1], Only(()))[0]
    assert (nothing.adapter, nothing.candidates) == (None, ())
    router.update([PIRATE])
    assert router.route(texts[1:2], Only(("sql",)))[0].adapter is None


def test_adapters_for_tools_are_apart_from_the_others() -> None:
    caller = AdapterProfile("caller", "Calls tools", for_tools=True)
    other = AdapterProfile("other", "Arr tools of the sea", for_tools=True)
    texts = ["Arr matey tell of the sea", "Calls tools", "hello there"]
    alone, router = AutoRouter(WordEncoder()), AutoRouter(WordEncoder())
    alone.update([SQL, PIRATE])
    router.update([SQL, PIRATE, caller, other])
    assert router.route(texts) == alone.route(texts)
    assert alone.route(texts, with_tools=True) == alone.route(texts)
    chosen = router.route(texts, with_tools=True)
    assert [decision.adapter for decision in chosen[:2]] == ["other", "caller"]
    assert chosen[2].adapter in ("caller", "other")  # the best, though the text says nothing
    assert all(decision.for_tools for decision in chosen)
    assert router.route(texts, Only(("sql", "pirate")), with_tools=True) == alone.route(texts)


def test_the_indexes_of_parts_are_few(router: AutoRouter) -> None:
    for number in range(40):
        router.route(["SQL: list"], Only(("sql", f"other-{number}")))
    assert len(router._fitted) == 17
    assert router.calibration is not None


def test_a_batch_decides_as_single_texts_do(router: AutoRouter) -> None:
    texts = ["SQL: list the orders", "hello there", "Arr matey"]
    together = router.route(texts)
    for text, decision in zip(texts, together, strict=True):
        alone = router.route([text])[0]
        assert alone.adapter == decision.adapter
        assert alone.margin == pytest.approx(decision.margin, abs=1e-5)


def test_only_new_texts_are_encoded_when_an_adapter_is_added() -> None:
    encoder = WordEncoder()
    router = AutoRouter(encoder)
    router.update([SQL])
    router.route([SQL.texts[0]])
    n_before = sum(map(len, encoder.batches))
    assert router.update([SQL, PIRATE])
    assert sorted(router.unread([SQL.texts[0]])) == sorted(PIRATE.texts)
    router.route([SQL.texts[0]])
    assert router.unread([SQL.texts[0]]) == []
    new = [text for batch in encoder.batches for text in batch][n_before:]
    assert sorted(new) == sorted(PIRATE.texts)
    assert not router.update([PIRATE, SQL])  # nothing changed, whatever the order


def test_an_index_whose_adapters_stay_is_kept_when_others_change(router: AutoRouter) -> None:
    ours = Only(("sql",))
    router.route(["hello there"], ours)
    fitted = dict(router._fitted)
    router.update([SQL, AdapterProfile("pirate", "Arr, another one")])
    kept = [part for part, index in router._fitted.items() if index is fitted[part]]
    assert [part.allowed for part in kept] == [ours]


def test_an_adapter_that_is_removed_is_no_candidate_any_more(router: AutoRouter) -> None:
    router.update([SQL])
    decision = router.route(["Arr matey"])[0]
    assert [c.name for c in decision.candidates] == ["sql"]


def test_without_adapters_or_texts_everything_is_the_bases() -> None:
    router = AutoRouter(WordEncoder())
    assert router.route(["anything"])[0].adapter is None
    router.update([AdapterProfile("mute")])
    decision = router.route(["anything"])[0]
    assert (decision.adapter, decision.candidates) == (None, ())
    assert router.calibration is None


def test_the_threshold_keeps_false_picks_of_unseen_background_texts_rare(
    router: AutoRouter,
) -> None:
    calibration = router.calibration
    assert calibration is not None
    assert calibration.false_picks <= 0.02
    assert calibration.right > 0.5


def test_equal_scores_go_to_the_name_that_sorts_first() -> None:
    twins = [AdapterProfile(name, "the very same words") for name in ("zeta", "alpha")]
    router = AutoRouter(WordEncoder())
    router.update(twins)
    assert router.route(["the very same words"])[0].candidates[0].name == "alpha"


def test_leave_one_out_predictions_are_those_of_refitting_without_the_text() -> None:
    """The closed form that calibrates the threshold, against the definition."""
    encoder = WordEncoder()
    texts = [*SQL.texts, *PIRATE.texts, "hello you", "what time is it", "thanks a lot"]
    labels = [0] * len(SQL.texts) + [1] * len(PIRATE.texts) + [2] * 3
    features = Features(encoder.encode(texts), lexical_features(texts))
    fitted = TextClassifier(features, labels, 2)
    margins = []
    for left_out in range(len(texts)):
        margins.append(_refit_margin(features, labels, left_out))
    background = sorted(margins[-3:], reverse=True)
    assert fitted.calibration.threshold == pytest.approx(background[0], abs=1e-4)


def _refit_margin(features: Features, labels: list[int], left_out: int) -> float:
    from loraplex_router.adapters import classifier as module

    label = torch.tensor(labels)
    counts = torch.bincount(label).double()
    weight = 1.0 / counts[label]
    weight /= weight.mean()
    weight[label == 2] *= module._NONE_WEIGHT
    kept = [i for i in range(len(labels)) if i != left_out]
    kernel = features.kernel(features).double()
    system = kernel[kept][:, kept] + module._RIDGE * torch.diag(1.0 / weight[kept])
    targets = torch.nn.functional.one_hot(label, 3).double()[kept]
    scores = kernel[left_out, kept] @ torch.linalg.solve(system, targets)
    return float(scores[:2].max() - scores[2])


def test_the_cache_forgets_the_least_recently_used_text() -> None:
    encoder = WordEncoder()
    cached = CachedEncoder(encoder, n_remembered=2)
    cached.encode(["a", "b"])
    cached.encode(["a"])
    cached.encode(["c"])  # b goes
    assert cached.encode(["a", "b"]).shape == (2, 64)
    assert encoder.batches == [["a", "b"], ["c"], ["b"]]


def test_the_cache_encodes_a_repeated_text_of_one_call_once_even_if_it_holds_less() -> None:
    encoder = WordEncoder()
    cached = CachedEncoder(encoder, n_remembered=1)
    vectors = cached.encode(["x", "y", "x"])
    assert torch.equal(vectors[0], vectors[2])
    assert cached.n_encoded == 2


def test_numbers_of_one_length_are_worded_alike() -> None:
    first, second, other = lexical_features(["437", "911", "hello"])
    assert float(first @ second) == pytest.approx(1.0)
    assert float(first @ other) == pytest.approx(0.0)
