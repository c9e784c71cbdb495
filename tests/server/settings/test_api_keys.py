"""The keys file: what it may say, and that a mistake in it is named without repeating a value."""

import hashlib
from pathlib import Path

import pytest

from loraplex_adapter_store.names.put_options import Quota
from loraplex_server.settings.api_keys import AdapterAccess, ApiKey, Scope, parse_keys
from loraplex_server.settings.config import ConfigError
from loraplex_server.settings.sources import resolve_config

DIGEST = hashlib.sha256(b"a-long-secret").hexdigest()


def test_a_keys_file_is_read_with_the_other_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f"""
        [[key]]
        name = "team-a"
        sha256 = "{DIGEST}"
        scope = "infer"
        adapters = ["team-a/*", "shared"]
        requests_per_minute = 60
        tokens_per_minute = 1000
    """)
    config = resolve_config({"keys": str(file), "api_key": ["operator-key"]})
    operator, team = config.http.api_keys
    assert operator.scopes == frozenset(Scope)
    assert operator.access.patterns is None
    assert team.sha256.hex() == DIGEST
    assert (team.id, team.scopes) == ("team-a", frozenset({Scope.INFER}))
    assert (team.requests_per_minute, team.tokens_per_minute) == (60, 1000)
    assert team.access == AdapterAccess(("team-a/*", "shared"), (), "team-a")
    assert DIGEST not in repr(config)
    monkeypatch.setenv("LORAPLEX_KEYS", str(file))
    assert resolve_config({}).http.api_keys == (team,)


def test_what_a_key_does_not_say_is_not_limited() -> None:
    (key,) = parse_keys(f'[[key]]\nname = "a"\nsha256 = "{DIGEST.upper()}"\nscope = "admin"\n')
    assert key.access.allows("anything/at/all")
    assert key.requests_per_minute is key.tokens_per_minute is None


def test_a_key_is_a_tenant_of_its_own_unless_it_names_one() -> None:
    keys = parse_keys(
        "".join(
            f'[[key]]\nname = "{name}"\nsha256 = "{number:064x}"\nscope = "infer"\n{tenant}\n'
            for number, (name, tenant) in enumerate(
                [("a", 'tenant = "acme"'), ("b", 'tenant = "acme"'), ("c", "")]
            )
        )
    )
    assert [key.tenant for key in keys] == ["acme", "acme", "c"]


def _keys(*tables: str) -> tuple[ApiKey, ...]:
    return parse_keys(
        "".join(
            f'[[key]]\nname = "k{number}"\nsha256 = "{number:064x}"\n{table}\n'
            for number, table in enumerate(tables)
        )
    )


@pytest.mark.parametrize(
    ("table", "tenant"),
    [
        ('scope = "admin"\noperator = true', None),
        ('scope = "admin"', "k0"),
        ('scope = "admin"\noperator = false', "k0"),
        ('scope = "metrics"', None),
        ('scope = "admin"\ntenant = "acme"', "acme"),
        ('scope = "admin"\nadapters = ["*"]', "k0"),
        ('scope = "infer"', "k0"),
    ],
)
def test_whose_a_keys_adapters_are(table: str, tenant: str | None) -> None:
    (key,) = _keys(table)
    assert key.access.tenant == tenant
    assert key.access.sources == (None if tenant is None else ())


def test_a_quota_of_one_key_holds_for_its_tenant() -> None:
    admin = 'scope = "admin"\ntenant = "acme"\nmax_adapters = 3\nmax_jobs = 1'
    infer = 'scope = "infer"\ntenant = "acme"\nmax_bytes = 10'
    first, second, other = _keys(admin, infer, 'scope = "infer"')
    assert first.access.quota == second.access.quota == Quota(3, 10)
    assert first.access.max_jobs == second.access.max_jobs == 1
    assert other.access.quota == Quota()
    with pytest.raises(ValueError, match="different max_adapters"):
        _keys(admin, infer + "\nmax_adapters = 4")
    with pytest.raises(ValueError, match="give it a tenant"):
        _keys('scope = "admin"\noperator = true\nmax_pins = 1')


def test_the_share_of_one_key_holds_for_its_tenant() -> None:
    given = 'scope = "infer"\ntenant = "acme"\nweight = 2\nmax_running = 16\nmax_queued = 5'
    first, second, other = _keys(given, 'scope = "infer"\ntenant = "acme"', 'scope = "infer"')
    for key in (first, second):
        assert (key.weight, key.max_running, key.max_queued) == (2.0, 16, 5)
    assert (other.weight, other.max_running, other.max_queued) == (None, None, None)
    with pytest.raises(ValueError, match="different weight"):
        _keys(given, 'scope = "infer"\ntenant = "acme"\nweight = 3')


@pytest.mark.parametrize(
    ("patterns", "allowed", "refused"),
    [
        (("team-a/*",), ["team-a/x", "team-a/x/y"], ["team-b/x", "team-a", "x/team-a/x"]),
        (("sql", "t?"), ["sql", "t1"], ["SQL", "t12", "sql2"]),
        ((), [], ["sql"]),
    ],
)
def test_patterns_are_globs_over_the_whole_name(
    patterns: tuple[str, ...], allowed: list[str], refused: list[str]
) -> None:
    access = AdapterAccess(patterns)
    assert all(access.allows(name) for name in allowed)
    assert not any(access.allows(name) for name in refused)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('key = "my-plain-secret"', "unknown fields"),
        ('sha256 = "my-plain-secret"', "sha256sum"),
        ('scope = "root"', "scope must be one of metrics, infer, admin"),
        ('name = "a b"', "needs a name"),
        ('tenant = "a/b"', "tenant must be 1 to 64"),
        ('operator = "yes"', "operator must be true or false"),
        ("operator = true", 'operator = true needs scope = "admin"'),
        ('adapters = "team-a/*"', "adapters must be a list"),
        ('adapters = [""]', "adapters must be a list"),
        ("requests_per_minute = 0", "requests_per_minute"),
        ("max_pins = 0", "max_pins"),
        ("max_running = 0", "max_running"),
        ('max_queued = "all"', "max_queued"),
        ("weight = 0", "weight must be a number"),
        ("weight = true", "weight must be a number"),
        ("weight = inf", "weight must be a number"),
        ("tokens_per_minute = 1.5", "tokens_per_minute"),
    ],
)
def test_a_mistake_stops_the_start_and_shows_no_secret(
    line: str, told: str, tmp_path: Path
) -> None:
    fields = {"name": 'name = "a"', "sha256": f'sha256 = "{DIGEST}"', "scope": 'scope = "infer"'}
    fields[line.partition(" ")[0]] = line
    file = tmp_path / "keys.toml"
    file.write_text("\n".join(["[[key]]", *fields.values()]))
    with pytest.raises(ConfigError, match=told) as raised:
        resolve_config({"keys": str(file)})
    assert str(file) in str(raised.value)
    assert "secret" not in str(raised.value)


def test_the_same_key_or_name_twice_is_refused(tmp_path: Path) -> None:
    table = f'[[key]]\nname = "a"\nsha256 = "{DIGEST}"\nscope = "infer"\n'
    with pytest.raises(ValueError, match="same name"):
        parse_keys(table + table)
    with pytest.raises(ValueError, match="same sha256"):
        parse_keys(table + table.replace('"a"', '"b"'))
    file = tmp_path / "keys.toml"
    file.write_text(table)
    with pytest.raises(ConfigError, match="given twice"):
        resolve_config({"keys": str(file), "api_key": ["a-long-secret"]})


@pytest.mark.parametrize("text", ["", "[key]\n", "x = 1\n", "[[key", "key = [1]\n"])
def test_a_file_that_is_no_list_of_keys_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\[\[key|TOML"):
        parse_keys(text)


def test_the_message_about_a_keys_file_names_it_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('keyz = "a"\n')
    with pytest.raises(ConfigError) as told:
        resolve_config({"keys": str(path)})
    assert str(told.value) == f"keys: {path}: the file must hold [[key]] tables and nothing else"


def test_a_missing_keys_file_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml"):
        resolve_config({"keys": str(tmp_path / "nothing.toml")})
