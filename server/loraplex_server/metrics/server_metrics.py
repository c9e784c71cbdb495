"""Counts HTTP requests and their tokens. Event loop only."""

from __future__ import annotations

from collections import Counter
from time import perf_counter

from prometheus_client import CollectorRegistry

from loraplex_server.call_log import CallLog, CallRecord

from .adapter_usage import AdapterActivities, AdapterActivity, AdapterCounters, AdapterUsage
from .histograms import CallHistograms, LoopLag

# reason → its name in the record of a call
_UNFINISHED = {"abort": "client_left", "error": "engine_error"}
_N_ADAPTERS_SHOWN = 20
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})


class ServerMetrics:
    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self.histograms = CallHistograms(registry, model_name)
        self.loop_lag = LoopLag(registry)
        self.n_prompt_tokens = 0
        self.n_output_tokens = 0
        self.finished: Counter[str] = Counter({"stop": 0, "length": 0, "abort": 0, "error": 0})
        self.http: Counter[tuple[str, str, int]] = Counter()  # handler, method, status
        self.http_seconds: dict[str, tuple[int, float]] = {}  # handler → answers, seconds
        self.usage = AdapterUsage(_N_ADAPTERS_SHOWN)
        self.activities = AdapterActivities()
        self.calls = CallLog()

    def answered(self, handler: str, method: str, status: int, seconds: float) -> None:
        """Count an HTTP answer. ``handler`` is a route's template, so series are bounded."""
        method = method if method in _METHODS else "OTHER"
        self.http[handler, method, status] += 1
        count, total = self.http_seconds.get(handler, (0, 0.0))
        self.http_seconds[handler] = (count + 1, total + seconds)


class CallMetrics:
    """Counts one API call. Called for every token. A refused call is not counted."""

    __slots__ = (
        *("_adapter", "_load_s", "_max_tokens", "_n", "_n_prompt", "_server", "_started"),
        *("_activity", "_first_at", "_queue_s", "_record"),
    )

    def __init__(
        self,
        server: ServerMetrics,
        record: CallRecord,
        *,
        adapter: str,
        load_s: float,
        n: int,
        max_tokens: int,
        n_prompt: int,
    ) -> None:
        """Begin a call before it is submitted. ``n_prompt``: tokens of all prompts."""
        is_first = record.load_s is None  # of the calls that share the record
        record.n_choices = n if is_first else record.n_choices + n
        record.prompt_tokens += n_prompt
        record.load_s = load_s
        self._server, self._record = server, record
        self._adapter: AdapterCounters | str = adapter  # counters once admitted
        self._activity: AdapterActivity | None = None  # once admitted
        self._load_s = load_s
        self._n = n
        self._max_tokens = max_tokens
        self._n_prompt = n_prompt
        self._started = perf_counter()
        self._queue_s = 0.0
        self._first_at: float | None = None  # the call's first token

    def admitted(self) -> None:
        """Count the admission of the call. Call this once, before the methods below."""
        server = self._server
        assert isinstance(self._adapter, str)
        activity = self._activity = server.activities.used(self._adapter)
        activity.n_requests += 1
        counters = self._adapter = server.usage.counters(self._adapter)
        server.histograms.params_n.observe(self._n)
        server.histograms.params_max_tokens.observe(self._max_tokens)
        server.histograms.prompt_tokens.observe(self._n_prompt)
        server.n_prompt_tokens += self._n_prompt
        counters.n_requests += 1
        counters.n_prompt_tokens += self._n_prompt
        counters.load_s += self._load_s

    def tokens(self, n_tokens: int, now: float, *, previous: float | None) -> None:
        server, adapter = self._server, self._adapter
        assert isinstance(adapter, AdapterCounters)
        assert self._activity is not None
        self._activity.add_tokens(n_tokens, now)
        server.n_output_tokens += n_tokens
        adapter.n_output_tokens += n_tokens
        self._record.output_tokens += n_tokens
        if previous is None:
            if self._first_at is None:
                self._record.first_token_s = now - self._started
            server.calls.first_token_s.add(now - self._started, now)
            server.histograms.ttft.observe(now - self._started)
            server.histograms.prefill.observe(max(0.0, now - self._started - self._queue_s))
            self._first_at = self._first_at or now
            adapter.ttft_s += now - self._started
            adapter.n_first_tokens += 1
        else:
            server.histograms.between_tokens((now - previous) / n_tokens, n_tokens)
            server.calls.gap_s.add(now - previous, now)

    def queued(self, seconds: float) -> None:
        assert isinstance(self._adapter, AdapterCounters)
        self._queue_s = seconds
        if self._record.queue_s is None:
            self._record.queue_s = seconds
        self._server.histograms.queue.observe(seconds)
        self._adapter.queue_s += seconds
        self._adapter.n_queued += 1

    def found_in_prefix_cache(self, n_tokens: int) -> None:
        assert isinstance(self._adapter, AdapterCounters)
        self._adapter.n_prefix_hits += n_tokens

    def finished(self, reason: str, n_output: int) -> None:
        """Count the end of a choice: stop, length, abort (the client left) or error."""
        self._server.finished[reason] += 1
        if reason in _UNFINISHED:
            self._record.error = self._record.error or _UNFINISHED[reason]
        self._server.histograms.output_tokens.observe(n_output)
        now = perf_counter()
        self._server.histograms.e2e.observe(now - self._started)
        self._server.histograms.inference.observe(max(0.0, now - self._started - self._queue_s))
        if self._first_at is not None:
            self._server.histograms.decode.observe(now - self._first_at)
