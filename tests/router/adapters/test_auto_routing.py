"""``auto`` on the shipped adapters, by the benchmark whose numbers the documentation gives."""

from importlib.resources import files
from pathlib import Path

import pytest

from loraplex_router.adapters.auto_router import AutoRouter
from loraplex_server.adapters.resolving.semantic_router import SemanticRouter
from loraplex_server.adapters.resolving.sentence_encoder import SharedEncoder
from loraplex_server.adapters.worker_pools import WorkerPools
from research.routing.auto_routing import (
    BASE,
    evaluate,
    held_out_prompts,
    plot,
    shipped_profiles,
)


@pytest.mark.slow
def test_shipped_tasks_are_told_apart_and_unrelated_prompts_left_alone(
    pulled_encoder: Path, tmp_path: Path
) -> None:
    """The acceptance bar of ``auto``, on the cards of the adapters in the package."""
    profiles = shipped_profiles(Path(str(files("loraplex_adapter_store") / "demos")))
    assert len(profiles) >= 8
    pools = WorkerPools()
    router = SemanticRouter(
        SharedEncoder(lambda: pulled_encoder), lambda: profiles, pools.routing, pools.encoder
    )
    result = evaluate(router, [p.name for p in profiles if not p.for_tools], n=40)
    pools.close()
    assert result.right >= 0.95
    assert result.false_picks <= 0.02
    assert sum(result.confusion[BASE].values()) == 130
    plot(result, tmp_path / "auto.png")
    assert (tmp_path / "auto.png").stat().st_size > 1000


def test_only_requests_with_tools_are_given_to_the_adapter_for_tools(pulled_encoder: Path) -> None:
    """Its questions are ordinary ones: without tools it is not even weighed."""
    profiles = shipped_profiles(Path(str(files("loraplex_adapter_store") / "demos")))
    assert [p.name for p in profiles if p.for_tools] == ["tool-calls"]
    router = AutoRouter(SharedEncoder(lambda: pulled_encoder))
    router.update(profiles)
    texts = [*held_out_prompts("tool-calls", 40), *held_out_prompts("sql", 10)]
    assert {decision.adapter for decision in router.route(texts, with_tools=True)} == {"tool-calls"}
    without = router.route(texts)
    assert all(decision.adapter != "tool-calls" for decision in without)
    assert sum(decision.adapter == "sql" for decision in without) >= 9
    router.update([p for p in profiles if not p.for_tools])
    assert router.route(texts) == without  # as if it were not there


def test_held_out_prompts_are_on_no_card() -> None:
    from research.demos import DEMOS
    from research.demos.task import shown_prompts

    for demo in DEMOS.values():
        assert not set(shown_prompts(demo, 16)) & set(held_out_prompts(demo.name, 40))
