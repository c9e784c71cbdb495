"""The deployments of a cluster, with the options that Ray needs for each."""

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from .config import ClusterConfig, EnginesConfig
from .gateway.coordinator import Coordinator
from .gateway.gateway import Gateway
from .replica.engine_replica import EngineReplica

_ROUTER = "loraplex_router.replicas.ray_serve:AdapterRequestRouter"
_POLICY = "loraplex_server.cluster.replica.autoscaling:policy"
_STATS_PERIOD_S = 0.5
_MANY = 100_000  # more than the requests of all gateways
_LAST_MESSAGES_S = 5.0  # for a gateway to tell clients that an engine has stopped
_OPTIONS: dict[str, Any] = {
    "logging_config": {"enable_access_log": False},  # a line for each call between processes
    "health_check_period_s": 2.0,
    # Ray notices a dead process at once. A process that does not answer is probably busy, and
    # replacing it ends its requests: a gateway with 400 calls has needed this long.
    "health_check_timeout_s": 120.0,
}


def build_application(config: ClusterConfig) -> Application:
    """Return gateways bound to a coordinator and to engines. Nothing runs yet."""
    server, sizes = config.server, config.gateways
    options = _OPTIONS | {
        "ray_actor_options": {"num_cpus": sizes.cpus},
        "graceful_shutdown_timeout_s": server.http.drain_timeout_s + _LAST_MESSAGES_S,
    }
    engines = _engines(config).bind(server)
    # The coordinator is one process, in an upgrade too: the old one stops first.
    coordinator = serve.deployment(
        Coordinator, name="Coordinator", num_replicas=1, max_ongoing_requests=_MANY, **options
    ).bind(server, engines)
    return serve.deployment(
        Gateway,
        name="Gateway",
        num_replicas=sizes.replicas,
        max_ongoing_requests=sizes.max_requests,
        max_surge_percent=100,
        **options,
    ).bind(server, engines, coordinator)


def _engines(config: ClusterConfig) -> serve.Deployment:
    """Requests wait in the engines, whose queues are fair between tenants. Ray refuses none.

    An engine lets each tenant have ``max_queue`` requests waiting. With a limit of Ray's, one
    tenant could fill it, and the others would wait in Ray's queue, which knows no tenants.
    """
    sizes = config.engines
    return serve.deployment(
        EngineReplica,
        name="Engine",
        num_replicas=sizes.replicas if _is_fixed(sizes) else None,
        autoscaling_config=None if _is_fixed(sizes) else _autoscaling(sizes),
        ray_actor_options={"num_cpus": sizes.cpus, "num_gpus": sizes.gpus},
        max_replicas_per_node=sizes.max_per_node,
        max_ongoing_requests=_MANY,
        max_surge_percent=100,  # by default Ray stops the old replicas first
        graceful_shutdown_timeout_s=config.server.http.drain_timeout_s,
        request_router_config=RequestRouterConfig(
            request_router_class=_ROUTER,
            request_routing_stats_period_s=_STATS_PERIOD_S,
        ),
        **_OPTIONS,
    )


def _is_fixed(sizes: EnginesConfig) -> bool:
    return sizes.min_replicas is None and sizes.max_replicas is None


def _autoscaling(sizes: EnginesConfig) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=sizes.replicas if sizes.min_replicas is None else sizes.min_replicas,
        initial_replicas=sizes.replicas,
        max_replicas=sizes.max_replicas or sizes.replicas,
        target_ongoing_requests=sizes.requests_per_replica,
        upscale_delay_s=sizes.upscale_delay_s,
        downscale_delay_s=sizes.downscale_delay_s,
        look_back_period_s=sizes.look_back_s,
        policy=AutoscalingPolicy(policy_function=_POLICY),
    )
