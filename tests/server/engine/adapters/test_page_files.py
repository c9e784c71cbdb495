"""Files of KV pages: the limit counts, and the oldest files go first."""

import os
from pathlib import Path

from loraplex_server.engine.memory.page_files import PageFiles

_PAGE = 1000


def _files(folder: Path, identity: str = "a", *, n_pages: int = 3) -> PageFiles:
    return PageFiles(folder, identity, page_bytes=_PAGE, max_bytes=n_pages * (_PAGE + 100))


def _key(index: int) -> bytes:
    return bytes([index]) * 16


def _page(index: int) -> memoryview:
    return memoryview(bytes([index]) * _PAGE)


def test_the_least_recently_used_files_go_beyond_the_limit(tmp_path: Path) -> None:
    files = _files(tmp_path)
    for index in range(3):
        files.write(_key(index), _page(index))
    into = bytearray(_PAGE)
    assert files.read(_key(0), memoryview(into))
    assert into == bytes(_page(0))
    files.write(_key(3), _page(3))
    assert [files.has(_key(index)) for index in range(4)] == [True, False, True, True]
    assert len([*tmp_path.glob("*/*")]) == 3
    for used_at, index in enumerate((2, 0, 3)):  # file systems' clocks are coarse
        os.utime(tmp_path / "a" / f"{_key(index).hex()}.kv", (used_at, used_at))
    again = _files(tmp_path, n_pages=2)  # as after a restart with a lower limit
    assert [again.has(_key(index)) for index in range(4)] == [True, False, False, True]


def test_files_of_another_identity_are_not_read_and_count(tmp_path: Path) -> None:
    _files(tmp_path, "other").write(_key(0), _page(0))
    files = _files(tmp_path, n_pages=1)
    assert not files.has(_key(0))
    files.write(_key(1), _page(1))
    assert [path.parent.name for path in tmp_path.glob("*/*.kv")] == ["a"]


def test_a_file_under_the_name_of_another_page_is_a_miss(tmp_path: Path) -> None:
    files = _files(tmp_path)
    files.write(_key(0), _page(0))
    (path,) = tmp_path.glob("*/*.kv")
    path.rename(path.with_name(f"{_key(1).hex()}.kv"))
    again = _files(tmp_path)
    assert again.has(_key(1))
    assert not again.read(_key(1), memoryview(bytearray(_PAGE)))
    assert not again.has(_key(1))


def test_a_short_or_long_file_is_a_miss(tmp_path: Path) -> None:
    files = _files(tmp_path)
    for index in (0, 1):
        files.write(_key(index), _page(index))
    short, long = (tmp_path / "a" / f"{_key(index).hex()}.kv" for index in (0, 1))
    short.write_bytes(short.read_bytes()[:-1])
    long.write_bytes(long.read_bytes() + b"x")
    for index in (0, 1):
        assert not files.read(_key(index), memoryview(bytearray(_PAGE)))
