"""The metrics of /metrics: the help text of every name, and the builders of metric families."""

from collections.abc import Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric

LABELS = ("model_name", "engine")  # of the metrics under vLLM's names

HELP = dict(
    line.split(maxsplit=1)
    for line in """\
vllm:time_to_first_token_seconds Seconds from a call's arrival at the engine to each choice's \
first token.
vllm:inter_token_latency_seconds Seconds between two tokens of a choice.
vllm:time_per_output_token_seconds Older name of vllm:inter_token_latency_seconds.
vllm:e2e_request_latency_seconds Seconds from a call's arrival at the engine to the end of each \
choice.
vllm:request_queue_time_seconds Seconds a request waited before the engine admitted it.
vllm:request_inference_time_seconds Seconds from admission to the end of a choice.
vllm:request_prefill_time_seconds Seconds from admission to the first token.
vllm:request_decode_time_seconds Seconds from the first token to the last.
vllm:request_prompt_tokens Prompt tokens of a call.
vllm:request_generation_tokens Tokens generated for a choice.
vllm:request_params_n Choices that a call asked for (n).
vllm:request_params_max_tokens Most tokens that a call allowed a choice.
vllm:num_requests_running Requests that the engine computes now.
vllm:num_requests_waiting Requests that wait for the engine.
vllm:kv_cache_usage_perc Share of KV pages in use, 0 to 1.
vllm:gpu_cache_usage_perc Older name of kv_cache_usage_perc.
loraplex_kv_pages Pages of the KV cache.
vllm:cache_config_info Geometry of the KV cache.
vllm:prefix_cache_queries Prompt tokens looked up in the prefix cache.
vllm:prefix_cache_hits Prompt tokens found in the prefix cache.
loraplex_prefix_cache_restored Prompt tokens that came back from files of --prefix-cache-dir.
vllm:num_preemptions Requests whose KV pages were taken for an older one.
loraplex_forced_tokens Tokens that a grammar forced.
vllm:spec_decode_num_drafts Times that a step verified guesses of a choice's next tokens.
vllm:spec_decode_num_draft_tokens Guessed next tokens that steps verified.
vllm:spec_decode_num_accepted_tokens Guessed next tokens that became tokens of answers.
vllm:iteration_tokens_total Tokens computed in an engine step.
loraplex_engine_steps Forward passes of the engine.
loraplex_lost_at_start Kernels or CUDA graphs that failed at start, by kind of layers.
loraplex_engine_up 1 while the engine lives.
loraplex_engine_step_age_seconds Seconds since the engine's last step.
loraplex_rows_taken_back Running requests that were preempted for another tenant.
loraplex_tenant_requests Requests in the engine by tenant of their API key.
loraplex_tenant_queue_steps Steps of the engine that requests waited for their first row.
vllm:lora_requests_info Adapters on the device and adapters that requests wait for. The value \
is the time.
vllm:lora_adapter_loaded Level of each loaded adapter: at most 128, device first.
vllm:num_gpu_loaded_lora_adapters Adapters in device memory.
vllm:num_cpu_loaded_lora_adapters Adapters in host memory, not on the device.
vllm:max_gpu_lora_adapters Distinct adapters that one step may use.
loraplex_adapter_pool_bytes Bytes of the device pool of adapter pages.
loraplex_adapter_loads Adapters copied to the device.
loraplex_adapter_device_load_seconds Seconds of a load to the device.
loraplex_adapter_evictions Adapters evicted from the device.
vllm:prompt_tokens Prompt tokens of all admitted calls.
vllm:generation_tokens Tokens generated for all choices.
vllm:request_success Choices by how they ended.
loraplex_adapters_registered Registered adapter names.
loraplex_host_tier_bytes Bytes of adapters in host memory: used, and the budget.
loraplex_disk_tier_bytes Bytes of adapter files on disk.
loraplex_adapter_leases Leases that running requests hold on adapters.
loraplex_host_tier_hits Leases of adapters that were in host memory.
loraplex_host_tier_loads Loads from disk.
loraplex_host_tier_evictions Adapters that left host memory for others.
vllm:lora_adapter_load_seconds Loads from disk.
loraplex_adapter_requests Calls by adapter.
loraplex_adapter_prompt_tokens Prompt tokens by adapter.
loraplex_adapter_tokens Generated tokens by adapter.
loraplex_adapter_prefix_hit_tokens Prompt tokens found in the prefix cache, by adapter.
loraplex_adapter_lease_seconds Seconds that calls waited for their adapter.
loraplex_adapter_queue_seconds Seconds in the queue by adapter.
loraplex_adapter_time_to_first_token_seconds Seconds to the first token, by adapter.
loraplex_adapter_tier 1 for the highest tier that an adapter lies in: device, host or disk.
loraplex_adapter_bytes Bytes that an adapter takes on disk, and in host and device memory while \
it is there.
loraplex_adapters_by_tier Registered names by the highest tier they lie in.
loraplex_event_loop_lag_seconds Delay of the event loop, measured ten times a second.
http_requests HTTP answers by route, method and status.
http_request_duration_seconds Seconds from a request to the last byte of its answer.
loraplex_faults Failures of the server's own parts.
loraplex_auto_decisions Texts for which an adapter or the base was chosen.
loraplex_auto_seconds Seconds of work of the semantic router.
loraplex_expert_entropy Entropy of expert use in the last minute, 0 to 1.
loraplex_expert_imbalance Load of the busiest expert over the mean load.
loraplex_expert_load Share of rows in the last minute.
loraplex_generations Requests for generated adapters by outcome.
loraplex_generation_seconds Seconds from a description to a stored adapter.
loraplex_training_batches Forwards of training; shared: several adapters learnt in one.
""".splitlines()
)

_Rows = Iterable[tuple[Sequence[str], float]]  # values of the labels, value


def gauge(name: str, labels: Sequence[str], rows: _Rows) -> Metric:
    family = GaugeMetricFamily(name, HELP[name], labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def states(name: str, *, used: float, total: float) -> Metric:
    """Return a gauge of the used part and of the whole."""
    return gauge(name, ("state",), [(("used",), used), (("total",), total)])


def counter(name: str, labels: Sequence[str], rows: _Rows) -> Metric:
    family = CounterMetricFamily(name, HELP[name], labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def summary(
    name: str, labels: Sequence[str], rows: Iterable[tuple[Sequence[str], int, float]]
) -> Metric:
    """``rows``: values of the labels, number of observations, their sum."""
    family = SummaryMetricFamily(name, HELP[name], labels=labels)
    for values, count, total in rows:
        family.add_metric(values, count, total)
    return family
