"""Prefixes cover whole segments of plain addresses, nothing that only looks alike."""

import pytest

from loraplex_adapter_store.errors import SourceError
from loraplex_adapter_store.sources.prefix import SourcePrefix, canonical_uri


@pytest.mark.parametrize(
    ("prefix", "uri"),
    [
        ("s3://bucket/team", "s3://bucket/team"),
        ("s3://bucket/team/", "s3://bucket/team/a/b"),
        ("s3://", "s3://any/thing"),
        ("hf://org", "hf://org/repo/sub@refs/pr/1"),
        ("hf://org/repo", "hf://org/repo@v1.2"),
        ("hf://org/repo@v1", "hf://org/repo@v1"),
        ("HTTPS://Example.org/a", "https://EXAMPLE.org/a/b%20c"),
        ("https://example.org:8443", "https://example.org:8443/x"),
    ],
)
def test_a_prefix_covers_itself_and_what_lies_below(prefix: str, uri: str) -> None:
    assert SourcePrefix.parse(prefix).covers(canonical_uri(uri))


@pytest.mark.parametrize(
    ("prefix", "uri"),
    [
        ("s3://bucket/team", "s3://bucket/team-b/x"),
        ("s3://bucket", "s3://bucket2/x"),
        ("s3://", "gs://any/thing"),
        ("https://example.org", "https://example.org.evil.net/x"),
        ("https://example.org", "https://example.org:444/x"),
        ("https://example.org", "http://example.org/x"),
        ("https://example.org/A", "https://example.org/a"),
        ("hf://org/repo", "hf://org/repo2@main"),
        ("hf://org/repo@v1", "hf://org/repo@v1/branch"),
        ("hf://org/repo@v1", "hf://org/repo"),
    ],
)
def test_a_prefix_does_not_cover_its_neighbours(prefix: str, uri: str) -> None:
    assert not SourcePrefix.parse(prefix).covers(canonical_uri(uri))


@pytest.mark.parametrize(
    "uri",
    [
        *("s3://", "s3:///a", "s3://b//a", "s3://b/../a", "s3://b/%2e%2E/a", "s3://b/.../a"),
        *("https://h/a%2fb", "https://h/a%5Cb", "https://h/a%252e", "https://h\\@i/a"),
        *("https://user@h/a", "https://h/a?b", "https://h/a#b", "https://h/a b", "https://h/ä"),
        *("https://h/a\n", "hf://org/../x", "ftp://h/a", "/etc", "a/b", "javascript://x"),
    ],
)
def test_an_address_with_a_second_reading_is_refused(uri: str) -> None:
    with pytest.raises(SourceError, match=r"plain address|unknown scheme"):
        canonical_uri(uri)


@pytest.mark.parametrize("text", ["/srv/adapters", "ftp://", "s3", "https://a/../b", ""])
def test_what_is_no_prefix_is_refused_with_the_remedy(text: str) -> None:
    with pytest.raises(ValueError, match="--adapters-dir"):
        SourcePrefix.parse(text)
