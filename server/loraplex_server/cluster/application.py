"""The deployments of a cluster, with what Ray has to know of each."""

from __future__ import annotations

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from .config import ClusterConfig, EnginesConfig
from .engine_replica import EngineReplica
from .gateway import Desk, Gateway
from .key_limits import KeyLimits, is_limited

__all__ = ["build_application"]

_ROUTER = "loraplex_router.replicas.ray_serve:AdapterRequestRouter"
_POLICY = "loraplex_server.cluster.autoscaling:policy"
_STATS_PERIOD_S = 0.5
_HEALTH_PERIOD_S = 2.0
_MANY = 100_000  # more than gateways have requests
_QUIET = {"enable_access_log": False}  # a line for each call between processes; we log requests
# A process that has died is seen at once. One that does not answer is busy more likely than stuck,
# and to replace it ends all that it answers: a gateway of 400 calls was once, beside other work.
_HEALTH_LIMIT_S = 120.0
_LAST_WORDS_S = 5.0  # for a gateway to tell clients that an engine was stopped, after its time


def build_application(config: ClusterConfig) -> Application:
    """Gateways bound to a desk, to engines and to the count of limits; nothing runs yet."""
    server = config.server
    engines = _engines(config).bind(server)
    is_counted = any(map(is_limited, server.http.api_keys))
    limits = _limits().bind(server.http.api_keys) if is_counted else None
    desk = _desk(config).bind(server, engines, limits)
    return _gateways(config).bind(server, engines, limits, desk)


def _engines(config: ClusterConfig) -> serve.Deployment:
    """Requests wait in the engines, whose queues are fair between tenants, and Ray refuses none.

    An engine lets each tenant have ``max_queue`` requests waiting. With a limit of Ray's, one
    tenant could fill it, and the others would wait in Ray's queue, which knows no tenants.
    """
    sizes, server = config.engines, config.server
    return serve.deployment(
        EngineReplica,
        name="Engine",
        num_replicas=sizes.replicas if _is_fixed(sizes) else None,
        autoscaling_config=None if _is_fixed(sizes) else _autoscaling(sizes),
        ray_actor_options={"num_cpus": sizes.cpus, "num_gpus": sizes.gpus},
        max_replicas_per_node=sizes.max_per_node,
        max_ongoing_requests=_MANY,
        max_surge_percent=100,  # by default Ray stops the old replicas first
        logging_config=_QUIET,
        graceful_shutdown_timeout_s=server.http.drain_timeout_s,
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_LIMIT_S,
        request_router_config=RequestRouterConfig(
            request_router_class=_ROUTER,
            request_routing_stats_period_s=_STATS_PERIOD_S,
        ),
    )


def _gateways(config: ClusterConfig) -> serve.Deployment:
    sizes, server = config.gateways, config.server
    return serve.deployment(
        Gateway,
        name="Gateway",
        num_replicas=sizes.replicas,
        ray_actor_options={"num_cpus": sizes.cpus},
        max_ongoing_requests=sizes.max_requests,
        max_surge_percent=100,
        logging_config=_QUIET,
        graceful_shutdown_timeout_s=server.http.drain_timeout_s + _LAST_WORDS_S,
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_LIMIT_S,
    )


def _desk(config: ClusterConfig) -> serve.Deployment:
    """One, also in an upgrade: its folder has one owner."""
    return serve.deployment(
        Desk,
        name="Desk",
        num_replicas=1,
        ray_actor_options={"num_cpus": config.gateways.cpus},
        max_ongoing_requests=config.gateways.max_requests,
        logging_config=_QUIET,
        graceful_shutdown_timeout_s=config.server.http.drain_timeout_s + _LAST_WORDS_S,
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_LIMIT_S,
    )


def _limits() -> serve.Deployment:
    return serve.deployment(
        KeyLimits,
        name="Limits",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_MANY,
        logging_config=_QUIET,
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_LIMIT_S,
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
