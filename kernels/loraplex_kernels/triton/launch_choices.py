"""Tile shapes of the LoRA launches. The rule has not been measured on a GPU.

A choice changes speed and never a bit of a result (see ``arithmetic``), so the rule may change
freely. ``kernels/benchmarks/tune_gpu.py`` measures the alternatives on a GPU.
"""

from dataclasses import dataclass

_FEW_PAIRS = 256
_ONE_WAVE = 64  # programs of a launch that a GPU runs at once, whatever their tiles
_SHARED_RANKS = 16  # up to this many pairs, a tile's pages are shared by programs
_MANY_PAIRS = 1024
_NARROW = 1024  # input columns


@dataclass(frozen=True, slots=True)
class ShrinkChoice:
    serial: bool  # one program adds the chunks of a tile; else each chunk has its own program
    rank_programs: int  # programs that share the pages of a tile
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class ExpandChoice:
    block_m: int  # rows of a tile that one program computes, at most
    block_n: int
    num_warps: int
    num_stages: int


def shrink_choice(n_pairs: int, in_features: int, max_pages: int, itemsize: int) -> ShrinkChoice:
    """Return the tile of a shrink. ``max_pages`` is the tables' limit of rank pages for a slot."""
    is_few, is_many = n_pairs <= _FEW_PAIRS, n_pairs > _MANY_PAIRS
    serial = is_many or (not is_few and in_features <= _NARROW)
    rank_programs = min(max_pages, 4) if n_pairs <= _SHARED_RANKS else 1
    if is_few:
        return ShrinkChoice(serial, rank_programs, 2, 4 if itemsize == 2 else 2)
    if itemsize == 2:
        return ShrinkChoice(serial, rank_programs, 4, 3)
    return ShrinkChoice(serial, rank_programs, *((8, 3) if is_many else (4, 2)))


def expand_choice(n_pairs: int, itemsize: int) -> ExpandChoice:
    block_m = 16 if n_pairs <= _FEW_PAIRS else 32
    return ExpandChoice(block_m, 128 if itemsize == 2 else 64, num_warps=4, num_stages=2)


def tile_programs(n_tiles: int, n_pairs: int, block_m: int) -> int:
    """Return how many programs walk the ``n_tiles`` that a step can have, for each column tile.

    A step has as many tiles as pairs if each pair has an adapter of its own, and a fraction of them
    otherwise. The launch depends on shapes alone, and a program without a tile still costs a
    nanosecond. So large steps get programs for half as many tiles again as full tiles would be, and
    each program walks several tiles if there are more.
    """
    full = -(-n_pairs // block_m)
    return min(n_tiles, _ONE_WAVE if n_pairs <= _FEW_PAIRS else full + full // 2)
