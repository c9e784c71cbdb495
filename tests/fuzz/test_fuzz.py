"""Two thousand odd requests and adapter files; `make fuzz` sends a hundred thousand."""

from .campaign import Target

SEED, N_CASES = 20, 2000


def test_no_request_breaks_the_server_shows_its_inside_or_changes_another_answer(
    target: Target,
) -> None:
    findings = target.run(SEED, range(N_CASES))
    assert not findings, "\n\n".join(map(str, findings))
    # it did reach what lies behind the checks, and was refused in many ways
    assert target.statuses[200] > 200
    assert target.statuses[400] > 800
    assert {201, 404, 405, 415} <= target.statuses.keys()
    paths = target.client.get("/openapi.json").json()["paths"]
    documented = {(method, path) for path, methods in paths.items() for method in methods}
    assert target.routes == documented
