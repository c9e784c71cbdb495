"""Latencies and sizes of calls, under vLLM's names and buckets, so that its dashboards work.

The delay of the event loop is measured, too, because it delays every answer and stream.
"""

import asyncio

from prometheus_client import CollectorRegistry, Histogram

from .families import HELP, LABELS

_LAG_EVERY_S = 0.1
_LAG_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

_TTFT_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_ITL_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_E2E_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))


class CallHistograms:
    """The histograms of one server, registered with ``registry``. Any thread."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        def histogram(name: str, buckets: tuple[float, ...]) -> Histogram:
            metric = Histogram(name, HELP[name], LABELS, buckets=buckets, registry=registry)
            return metric.labels(model_name, "0")

        self.ttft = histogram("vllm:time_to_first_token_seconds", _TTFT_SECONDS)
        self.itl = histogram("vllm:inter_token_latency_seconds", _ITL_SECONDS)
        self.time_per_token = histogram("vllm:time_per_output_token_seconds", _ITL_SECONDS)
        self.e2e = histogram("vllm:e2e_request_latency_seconds", _E2E_SECONDS)
        self.queue = histogram("vllm:request_queue_time_seconds", _E2E_SECONDS)
        self.inference = histogram("vllm:request_inference_time_seconds", _E2E_SECONDS)
        self.prefill = histogram("vllm:request_prefill_time_seconds", _E2E_SECONDS)
        self.decode = histogram("vllm:request_decode_time_seconds", _E2E_SECONDS)
        self.prompt_tokens = histogram("vllm:request_prompt_tokens", _TOKENS)
        self.output_tokens = histogram("vllm:request_generation_tokens", _TOKENS)
        self.params_n = histogram("vllm:request_params_n", (1, 2, 5, 10, 20))
        self.params_max_tokens = histogram("vllm:request_params_max_tokens", _TOKENS)

    def between_tokens(self, seconds: float, n_tokens: int) -> None:
        """Observe ``seconds`` once for each of ``n_tokens`` tokens that arrived together."""
        for _ in range(n_tokens):
            self.itl.observe(seconds)
            self.time_per_token.observe(seconds)


class LoopLag:
    """Measures the delay of the event loop."""

    def __init__(self, registry: CollectorRegistry) -> None:
        name = "loraplex_event_loop_lag_seconds"
        self._seconds = Histogram(name, HELP[name], buckets=_LAG_SECONDS, registry=registry)

    async def watch(self) -> None:
        """Runs until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_EVERY_S
            await asyncio.sleep(_LAG_EVERY_S)
            self._seconds.observe(max(0.0, loop.time() - due))
