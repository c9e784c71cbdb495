"""KV pages: none leaked, none shared across adapters or tenants."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_server.engine.memory.kv_cache import KvCache, KvGeometry
from loraplex_server.engine.memory.page_pool import KeyTurn, PagePool, page_keys, prefix_root
from loraplex_server.engine.memory.window import Window


def _cache(
    n_pages: int = 12, *, prefix_cache: bool = True, window: Window | None = None
) -> KvCache:
    return KvCache(
        KvGeometry(1, 1, 4, window),
        n_pages=n_pages,
        page_size=4,
        max_requests=8,
        max_model_len=64,
        dtype=torch.float32,
        device=torch.device("cpu"),
        prefix_cache=prefix_cache,
    )


def test_a_released_page_with_a_key_is_found_again() -> None:
    pool = PagePool(2)
    (page,) = pool.take(1) or []
    pool.publish(page, b"k")
    pool.release(page)
    assert pool.find(b"k") == page
    assert pool.n_available == 2


def test_cached_pages_are_evicted_least_recently_used_first() -> None:
    pool = PagePool(2)
    first, second = pool.take(2) or []
    pool.publish(first, b"first")
    pool.publish(second, b"second")
    pool.release(first)
    pool.release(second)
    pool.take(1)
    assert pool.find(b"first") is None
    assert pool.find(b"second") == second


def test_taking_more_pages_than_there_are_changes_nothing() -> None:
    pool = PagePool(2)
    assert pool.take(3) is None
    assert pool.n_available == 2


def test_releasing_a_free_page_is_an_error() -> None:
    pool = PagePool(1)
    with pytest.raises(RuntimeError, match="released more often"):
        pool.release(0)


def test_prefix_keys_depend_on_adapter_and_tenant() -> None:
    roots = {
        prefix_root("", ""),
        prefix_root("a", ""),
        prefix_root("", "a"),
        prefix_root("a", "b"),
        prefix_root("ab", ""),
    }
    assert len(roots) == 5
    keys = {key for root in roots for key in page_keys(root, range(16), 4)}
    assert len(keys) == 5 * 4


def test_a_page_key_depends_on_everything_before_it() -> None:
    root = prefix_root("a", "")
    one = list(page_keys(root, [1, 2, 3, 4, 5, 6, 7, 8], 4))
    other = list(page_keys(root, [1, 2, 3, 9, 5, 6, 7, 8], 4))
    assert one[1] != other[1]


def test_keys_before_an_activated_adapter_are_those_of_the_base() -> None:
    root, tokens = prefix_root("", ""), list(range(16))
    of_base = list(page_keys(root, tokens, 4))
    turns = [KeyTurn(1, b"a:4"), KeyTurn(1, b"a:6"), KeyTurn(1, b"b:4"), KeyTurn(2, b"a:8")]
    keys = [list(page_keys(root, tokens, 4, turn=turn)) for turn in turns]
    assert all(
        own[: turn.page] == of_base[: turn.page] for own, turn in zip(keys, turns, strict=True)
    )
    later = [key for own, turn in zip(keys, turns, strict=True) for key in own[turn.page :]]
    assert len({*later, *of_base}) == len(later) + len(of_base)


def test_pages_of_an_activated_adapter_have_one_key_however_they_were_published() -> None:
    cache, root, tokens = _cache(), prefix_root("", ""), list(range(13))
    turn = KeyTurn(1, b"a:5")
    cache.admit("one", root, tokens, turn=turn)
    for n_computed in (5, 9, 13):
        cache.publish("one", tokens, n_computed)
    assert cache.admit("two", root, tokens, turn=turn) == 12
    assert cache.admit("three", root, tokens) == 4


def test_a_second_request_reuses_full_pages_but_never_the_last_token() -> None:
    cache = _cache()
    root = prefix_root("a", "")
    tokens = list(range(8))
    assert cache.admit("one", root, tokens) == 0
    cache.publish("one", tokens, 8)
    assert cache.admit("two", root, tokens) == 4
    assert cache.page_table[cache.row("two"), 0] == cache.page_table[cache.row("one"), 0]
    assert cache.page_table[cache.row("two"), 1] != cache.page_table[cache.row("one"), 1]


def test_another_adapter_or_tenant_finds_nothing() -> None:
    cache = _cache()
    tokens = list(range(9))
    cache.admit("one", prefix_root("a", "t"), tokens)
    cache.publish("one", tokens, 8)
    assert cache.admit("two", prefix_root("b", "t"), tokens) == 0
    assert cache.admit("three", prefix_root("a", "u"), tokens) == 0
    assert cache.admit("four", prefix_root("a", "t"), tokens) == 8


def test_no_prefix_is_kept_when_the_prefix_cache_is_off() -> None:
    cache = _cache(prefix_cache=False)
    tokens = list(range(9))
    cache.admit("one", prefix_root("a", ""), tokens)
    cache.publish("one", tokens, 8)
    assert cache.admit("two", prefix_root("a", ""), tokens) == 0


def test_a_prefix_is_found_by_the_pages_that_a_window_sees() -> None:
    cache, root, tokens = (
        _cache(window=Window(n_seen=5, n_ahead=4)),
        prefix_root("", ""),
        list(range(21)),
    )
    cache.admit("one", root, tokens)
    for n_computed in range(4, 24, 4):
        assert cache.extend("one", len(tokens))
        assert cache.n_pages_held <= cache.pages_needed(21) == 5
        cache.publish("one", tokens, n_computed)
        cache.slide("one", n_computed)
    cache.release("one")
    assert cache.admit("other", prefix_root("b", ""), tokens) == 0
    assert cache.extend("other", 21)
    cache.admit("more", prefix_root("c", ""), tokens[:12])  # evicts the first pages of "one"
    assert cache.admit("two", root, tokens) == 20
    assert cache.n_pages_held == 5 + 3 + 2  # of "two": the last page that is seen, and a new one


def test_a_layer_without_a_window_keeps_all_pages() -> None:
    assert Window.of_layers([16, None, 16], 8) is None
    assert Window.of_layers([None], 8) is None
    assert Window.of_layers([16, 32], 8) == Window(32, 8)


_actions = st.lists(
    st.tuples(
        st.sampled_from(["admit", "extend", "publish", "release"]),
        st.integers(0, 5),  # request
        st.integers(0, 2),  # adapter
        st.integers(1, 30),  # tokens
    ),
    max_size=60,
)


@given(_actions)
@settings(max_examples=150, deadline=None)
def test_pages_are_never_leaked_nor_shared_across_digests(
    actions: list[tuple[str, int, int, int]],
) -> None:
    cache = _cache()
    tokens: dict[str, list[int]] = {}
    adapters: dict[str, int] = {}
    for action, request, adapter, n_tokens in actions:
        name = f"r{request}"
        if action == "admit" and name not in tokens:
            ids = [index % 3 for index in range(n_tokens)]
            if cache.admit(name, prefix_root(str(adapter), ""), ids) is not None:
                tokens[name], adapters[name] = ids, adapter
        elif name in tokens and action == "extend":
            longer = tokens[name] + [request] * n_tokens
            if len(longer) <= 64 and cache.extend(name, len(longer)):
                tokens[name] = longer
        elif name in tokens and action == "publish":
            cache.publish(name, tokens[name], len(tokens[name]))
        elif name in tokens and action == "release":
            cache.release(name)
            del tokens[name], adapters[name]
        owners: dict[int, set[int]] = {}
        for other, ids in tokens.items():
            pages = cache.page_table[cache.row(other), : cache.pages_for(len(ids))]
            assert len(set(pages.tolist())) == len(pages)
            for page in pages.tolist():
                owners.setdefault(page, set()).add(adapters[other])
        assert all(len(digests) == 1 for digests in owners.values())
        assert cache.n_pages_held == len(owners)
    for name in list(tokens):
        cache.release(name)
    assert cache.n_pages_held == 0
    assert cache.n_pages_available == cache.n_pages
