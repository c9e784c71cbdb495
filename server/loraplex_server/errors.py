"""Errors as clients see them: one OpenAI error object for every failure.

ApiError                     status + {"error": {"message", "type", "param", "code"}}
├── from_engine(error)       EngineError → 400, 429, 500 or 503
├── from_image(error)        ImageRefused → 400 or 413
├── from_store(error)        StoreError → 400, 403, 404, 409, 412, 413, 422 or 503
└── from_unexpected(error)   anything else → 503 if a retry may help, else 500
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import orjson

from loraplex_adapter_store import errors as store_errors
from loraplex_generation import errors as generator_errors
from loraplex_server.engine import errors as engine_errors
from loraplex_server.health_tracker import kind_of_failure, part_of
from loraplex_server.images import ImageRefused

from .settings.api_keys import EVERY_ADAPTER, AdapterAccess

# status → OpenAI's error type
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    409: "conflict_error",
    412: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """An error answer, or an error event once the stream has begun."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, object] | None = None,
    ) -> None:
        """``kind`` is the error's ``type``. None means the usual type of the status.

        ``details`` are further JSON-ready fields of the error object.
        """
        super().__init__(message)
        self.status = status
        self.kind = kind or _TYPES.get(status, "server_error")
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        self.details = dict(details or {})

    def __reduce__(self) -> tuple[partial[ApiError], tuple[()]]:
        """Pickle the error, because gateways of a cluster answer with errors of the coordinator."""
        make = partial(
            ApiError,
            self.status,
            self.message,
            code=self.code,
            param=self.param,
            kind=self.kind,
            headers=self.headers,
            details=self.details,
        )
        return make, ()

    def body(self) -> bytes:
        """Return the JSON of an error answer or error event."""
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
            **self.details,
        }
        return orjson.dumps({"error": error})


def invalid(message: str, param: str | None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code=code, param=param)


def not_found(message: str, param: str | None, code: str) -> ApiError:
    return ApiError(404, message, code=code, param=param)


def too_many(message: str, code: str, retry_after_s: float) -> ApiError:
    return ApiError(429, message, code=code, headers=_retry_after(retry_after_s))


def unavailable(message: str, code: str, retry_after_s: float = 5.0) -> ApiError:
    return ApiError(503, message, code=code, headers=_retry_after(retry_after_s))


def from_engine(error: engine_errors.EngineError, *, prompt_param: str | None = None) -> ApiError:
    """Convert an engine error. ``prompt_param`` is the field of the prompt."""
    match error:
        case engine_errors.QueueFull():
            return too_many(str(error), "queue_full", error.retry_after_s)
        case engine_errors.EngineDraining():
            return unavailable(str(error) or "the server is shutting down", "server_draining")
        case engine_errors.ContextOverflow():
            return invalid(str(error), prompt_param, "context_length_exceeded")
        case engine_errors.GrammarTooComplex():
            return invalid(str(error), None, "grammar_too_complex")
        case engine_errors.NoTokenAllowed():
            return invalid(str(error), error.param, "no_token_allowed")
        case engine_errors.AdapterUnservable():
            return invalid(str(error), "adapter", "adapter_unservable")
        case engine_errors.AdapterLoadFailed():
            return unavailable(str(error), "adapter_load_failed", retry_after_s=1.0)
        case engine_errors.NoAdapterSlot():
            return unavailable(str(error), "adapter_memory_full")
        case engine_errors.EngineDead():
            return unavailable(str(error) or "the engine has stopped", "engine_dead")
        case _:
            return ApiError(500, f"the engine failed: {error}", code="engine_error")


def from_image(error: ImageRefused, param: str, where: str | None = None) -> ApiError:
    """Convert the refusal of an image. ``where``: which image of the field ``param``."""
    status = 413 if error.code == "image_too_large" else 400
    return ApiError(status, f"{where or param}: {error}", code=error.code, param=param)


def from_store(
    error: store_errors.StoreError,
    *,
    param: str | None = "adapter",
    access: AdapterAccess = EVERY_ADAPTER,
) -> ApiError:
    """Convert a store error. The message names only adapters that ``access`` allows."""
    converted = _from_store(error, param, access)
    if access.tenant:
        converted.message = converted.message.replace(f"'{access.tenant}:", "'")
    return converted


def _from_store(
    error: store_errors.StoreError, param: str | None, access: AdapterAccess
) -> ApiError:
    match error:
        case generator_errors.OutOfDistribution():
            return ApiError(
                422,
                str(error),
                code="description_out_of_distribution",
                param=param,
                details={
                    "score": round(error.score, 4),
                    "limit": round(error.limit, 4),
                    "nearest": [{"task": task, "similarity": s} for task, s in error.nearest],
                },
            )
        case generator_errors.UnfitPrompts():
            return invalid(str(error), "prompts", "unfit_prompts")
        case generator_errors.UnfitExamples():
            return invalid(str(error), "examples", "unfit_examples")
        case generator_errors.NothingLearnt():
            return ApiError(422, str(error), code="nothing_learnt", param="examples")
        case generator_errors.OutOfTime():
            return ApiError(503, str(error), code="out_of_time", param="examples")
        case generator_errors.GeneratorError():
            return invalid(str(error), param, "feature_not_enabled")
        case store_errors.UnknownAdapter():
            return not_found(_unknown(error, access), param, "adapter_not_found")
        case store_errors.InvalidName() | store_errors.InvalidSelector():
            return invalid(str(error), param, "invalid_adapter")
        case store_errors.QuotaExceeded():
            return ApiError(403, str(error), code="quota_exceeded")
        case store_errors.RevisionConflict():
            headers = {"x-should-retry": "false"}
            if error.etag is not None:
                headers["etag"] = f'"{error.etag}"'
            return ApiError(412, str(error), code="revision_conflict", param=param, headers=headers)
        case store_errors.LimitExceeded():
            return ApiError(413, str(error), code="adapter_too_large", param=param)
        case store_errors.BaseMismatch():
            return invalid(str(error), _content_param(param), "base_mismatch")
        case store_errors.AdapterRefused():
            return invalid(str(error), _content_param(param), "adapter_refused")
        case store_errors.UnservableAdapter():
            return invalid(str(error), param, "adapter_unservable")
        case store_errors.SourceForbidden():
            return ApiError(403, str(error), code="source_forbidden", param=param)
        case store_errors.SourceError():
            return invalid(str(error), param, "source_unreadable")
        case store_errors.AdapterInUse():
            return ApiError(409, str(error), code="adapter_in_use", param=param)
        case store_errors.AdapterPinned():
            return ApiError(409, str(error), code="adapter_pinned", param=param)
        case store_errors.HostTierFull():
            return unavailable(str(error), "adapter_memory_full", retry_after_s=2.0)
        case store_errors.CatalogueUnavailable() | store_errors.LoadCancelled():
            return unavailable(str(error), "catalogue_unavailable", retry_after_s=2.0)
        case store_errors.StoreClosed():
            return unavailable(str(error), "server_draining")
        case _:
            return ApiError(500, str(error), code="adapter_store_error", param=param)


def from_unexpected(error: Exception, request_id: str) -> ApiError:
    """Convert an unexpected error. Its own message stays in the log, since it may hold paths.

    The log has the message under ``request_id``.
    """
    log = f"the server's log has the details under {request_id}"
    kind = kind_of_failure(error)
    match part_of(error):
        case "catalogue":
            return unavailable(
                f"the catalogue of adapters cannot be used now ({kind}); try again, {log}",
                "catalogue_unavailable",
            )
        case "storage":
            return unavailable(
                f"the server's disk cannot be used now ({kind}); try again, {log}",
                "storage_unavailable",
            )
        case "loader":
            return unavailable(f"the server is out of memory; try again, {log}", "out_of_memory")
        case _:
            return ApiError(
                500,
                f"internal error; try again, and report it if it stays: {log}",
                code="internal_error",
            )


def _content_param(param: str | None) -> str | None:
    """Name the weights: an adapter is refused for its content, not for its name."""
    return "weights" if param == "name" else param


def _unknown(error: store_errors.UnknownAdapter, access: AdapterAccess) -> str:
    if access.patterns is None and access.tenant is None:
        return str(error)
    closest = [access.shown(name) for name in error.closest if access.allows(name)]
    hint = f"; closest registered: {', '.join(closest)}" if closest else ""
    return f"adapter {error.name!r} does not exist{hint}"


def _retry_after(seconds: float) -> dict[str, str]:
    """Return the headers. Clients ignore values above 120 s, so 60 s is the maximum."""
    seconds = min(max(seconds, 0.05), 60.0)
    return {
        "retry-after": str(max(1, math.ceil(seconds))),
        "retry-after-ms": str(math.ceil(seconds * 1000)),
    }
