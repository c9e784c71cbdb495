"""Loaded by schemathesis (SCHEMATHESIS_HOOKS): checks of our own, and resources that exist.

``LORAPLEX_ADAPTER``: an adapter that is there, and the name of its source. ``LORAPLEX_JOB``: a job.
"""

import json
import os
import re
import zlib
from typing import Any

import requests
import schemathesis

ADAPTER, JOB = os.environ["LORAPLEX_ADAPTER"], os.environ["LORAPLEX_JOB"]
KEY = json.loads(os.environ["LORAPLEX_HEADERS"])
SECRETS = os.environ["LORAPLEX_SECRETS"].split(os.pathsep)  # paths of the server
# ``problem_of`` answers so when a value does not fit the model of the request
OF_THE_SCHEMA = ("invalid_json", "missing_required_parameter")


class _Deleted:
    """Whether the adapter has to be put back before the next call."""

    is_gone = False
    is_stateful = False


@schemathesis.hook
def before_call(context: Any, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
    """Every second valid path names something that exists."""
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    if not _Deleted.is_stateful:
        # Scenarios of calls look at what a deletion leaves: nothing comes back among them.
        _Deleted.is_stateful = case.meta.phase.name.value == "stateful"
        if _Deleted.is_gone:
            _put_back(case)
    for name, known in (("name", ADAPTER), ("model_id", ADAPTER), ("job_id", JOB)):
        given = case.path_parameters.get(name)
        if given is not None and zlib.crc32(str(given).encode()) % 2:
            case.path_parameters[name] = known


@schemathesis.hook
def after_call(context: Any, case: schemathesis.Case, response: schemathesis.Response) -> None:
    is_deletion = case.method == "DELETE" or case.path.endswith("/unload_lora_adapter")
    if is_deletion and response.status_code == 200:
        _Deleted.is_gone = True


def _put_back(case: schemathesis.Case) -> None:
    url = str(case.operation.schema.get_base_url()).rstrip("/")
    answer = requests.put(
        f"{url}/v1/adapters/{ADAPTER}", json={"source": ADAPTER}, headers=KEY, timeout=60
    )
    assert answer.status_code in (200, 201), answer.text
    _Deleted.is_gone = False


@schemathesis.check
def errors_are_openai_objects(
    ctx: Any, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    if response.status_code < 400:
        return
    error = _error(response)
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert isinstance(error["code"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    shown = [secret for secret in SECRETS if secret in response.text]
    assert not shown, f"the answer shows a path of the server: {shown[0]}"


@schemathesis.check
def refusals_are_beyond_the_schema(
    ctx: Any, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """Data that the schema allows is not refused for its form.

    But JSON Schema calls 5.0 an integer. Here types are strict: only 5 is one.
    """
    if response.status_code not in (400, 422) or case.meta is None:
        return
    if not case.meta.generation.mode.is_positive:
        return
    error = _error(response)
    if re.search(r", not (a list with )?\[*-?[0-9]+\.0\b", error["message"]):
        return
    assert error["code"] not in OF_THE_SCHEMA, error["message"]
    assert not error["message"].startswith("invalid '"), error["message"]


def _error(response: schemathesis.Response) -> dict[str, Any]:
    error = json.loads(response.content)["error"]
    assert isinstance(error, dict)
    assert error.keys() >= {"message", "type", "param", "code"}
    return error
