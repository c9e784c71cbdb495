"""Latencies and sizes of calls, under vLLM's names and buckets, so that its dashboards work."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram

__all__ = ["LABELS", "CallHistograms"]

LABELS = ("model_name", "engine")

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
    """prometheus-client's histograms of one server, registered with ``registry``. Any thread."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        def histogram(name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(name, help_text, LABELS, buckets=buckets, registry=registry)
            return made.labels(model_name, "0")

        self.ttft = histogram(
            "vllm:time_to_first_token_seconds",
            "Seconds from a call's arrival at the engine to each choice's first token.",
            _TTFT_SECONDS,
        )
        self.itl = histogram(
            "vllm:inter_token_latency_seconds",
            "Seconds between two tokens of a choice.",
            _ITL_SECONDS,
        )
        self.time_per_token = histogram(
            "vllm:time_per_output_token_seconds",
            "Older name of vllm:inter_token_latency_seconds.",
            _ITL_SECONDS,
        )
        self.e2e = histogram(
            "vllm:e2e_request_latency_seconds",
            "Seconds from a call's arrival at the engine to the end of each choice.",
            _E2E_SECONDS,
        )
        self.queue = histogram(
            "vllm:request_queue_time_seconds",
            "Seconds a request waited before the engine admitted it.",
            _E2E_SECONDS,
        )
        self.inference = histogram(
            "vllm:request_inference_time_seconds",
            "Seconds from admission to the end of a choice.",
            _E2E_SECONDS,
        )
        self.prefill = histogram(
            "vllm:request_prefill_time_seconds",
            "Seconds from admission to the first token.",
            _E2E_SECONDS,
        )
        self.decode = histogram(
            "vllm:request_decode_time_seconds",
            "Seconds from the first token to the last.",
            _E2E_SECONDS,
        )
        self.prompt_tokens = histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a call.", _TOKENS
        )
        self.output_tokens = histogram(
            "vllm:request_generation_tokens", "Tokens generated for a choice.", _TOKENS
        )
        self.params_n = histogram(
            "vllm:request_params_n", "Choices that a call asked for (n).", (1, 2, 5, 10, 20)
        )
        self.params_max_tokens = histogram(
            "vllm:request_params_max_tokens", "Most tokens that a call allowed a choice.", _TOKENS
        )

    def between_tokens(self, seconds: float, n_tokens: int) -> None:
        """``seconds`` for each of ``n_tokens`` that came together."""
        for _ in range(n_tokens):
            self.itl.observe(seconds)
            self.time_per_token.observe(seconds)
