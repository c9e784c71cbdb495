"""The sizes of captured steps hold what they should, and the number of graphs is bounded."""

import pytest

from loraplex_server.engine.adapters.layer_kind import LayerKind
from loraplex_server.engine.steps.captured_sizes import (
    MAX_GRAPHS,
    MAX_PAIRS,
    SHORT_POSITIONS,
    captured_positions,
    captured_sizes,
)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 64, 200, 256])
def test_every_common_decode_step_is_held_with_little_to_spare(n: int) -> None:
    sizes = captured_sizes(LayerKind.LORA, n, 512, 32).decode
    assert list(sizes) == sorted(set(sizes))
    for rows in range(1, n + 1):
        spare = min(size for size in sizes if size >= rows) - rows
        assert spare < max(8, rows / 4)


@pytest.mark.parametrize("n", [1, 3, 64, 200, 256, 400])
def test_layers_with_experts_hold_as_many_rows_as_pairs_allow(n: int) -> None:
    sizes = captured_sizes(LayerKind.ROUTED_MLP, n, 0, 32)
    assert sizes.mixed == ()
    assert list(sizes.decode) == sorted(set(sizes.decode))
    assert sizes.decode[-1] == min(n, 256)
    for rows in range(1, sizes.decode[-1] + 1):
        assert min(size for size in sizes.decode if size >= rows) < max(2 * rows, 9)
    assert 8 * sizes.decode[-1] <= MAX_PAIRS


@pytest.mark.parametrize("n_layers", [1, 16, 32, 64, 80, 126])
@pytest.mark.parametrize("max_mixed", [0, 16, 100, 512, 2048])
def test_the_number_of_graphs_is_bounded(n_layers: int, max_mixed: int) -> None:
    sizes = [captured_sizes(kind, 256, max_mixed, n_layers) for kind in LayerKind]
    assert sum(len(each.mixed) for each in sizes) * (n_layers + 1) <= MAX_GRAPHS
    assert sum(len(each.decode) for each in sizes) <= 100
    assert all(bool(each.mixed) == bool(max_mixed) for each in sizes)
    assert sizes[LayerKind.LORA].mixed[-1:] == ((max_mixed,) if max_mixed else ())


def test_default_sizes_of_a_model_of_32_layers() -> None:
    sizes = [captured_sizes(kind, 256, 512, 32) for kind in LayerKind]
    assert [len(each.decode) for each in sizes] == [19, 19, 9]
    assert sizes[0].mixed == (16, 32, 64, 96, 128, 192, 256, 384, 512)
    assert sizes[2].mixed == (64, 256)
    widths = [len(captured_positions(kind, 131_072)) for kind in LayerKind]
    n_graphs = sum(
        width * len(each.decode) + 33 * len(each.mixed)
        for width, each in zip(widths, sizes, strict=True)
    )
    assert n_graphs == 745  # docs/gpu-steps.md says so


@pytest.mark.parametrize("kind", list(LayerKind))
@pytest.mark.parametrize("n", [16, SHORT_POSITIONS, SHORT_POSITIONS + 1, 131_072])
def test_decode_steps_of_any_length_are_recorded(kind: LayerKind, n: int) -> None:
    positions = captured_positions(kind, n)
    assert positions[-1] == n
    assert len(positions) == (2 if n > SHORT_POSITIONS and kind is not LayerKind.ROUTED_MLP else 1)
