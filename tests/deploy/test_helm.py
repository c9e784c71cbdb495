"""The Helm chart, rendered by Helm's own code and held against the schemas of Kubernetes."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from loraplex_server.api.routes import health
from loraplex_server.cluster.config import read_config
from loraplex_server.settings.config import ServerConfig
from loraplex_server.settings.sources import resolve_config, server_options

helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="it is not installed")

CHART = Path(__file__).resolve().parents[2] / "deploy/helm/loraplex"
FILES = sorted(path.name for path in CHART.glob("values*.yaml"))
VERSIONS = ("1.25", "1.31", "1.37")
SECRETS = {
    "auth": {
        "apiKeySecret": {"name": "keys"},
        "keysFileSecret": {"name": "keys"},
        "metricsKeySecret": {"name": "keys"},
    },
    "serviceMonitor": {"enabled": True},
    "adaptersVolume": {"persistentVolumeClaim": {"claimName": "adapters", "readOnly": True}},
    "modelVolume": {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
}
CUSTOM = {"RayService", "ServiceMonitor", "InferencePool"}  # Kubernetes has no schema of them


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge values files as Helm does."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    return result


def values_of(name: str) -> dict[str, Any]:
    layer = {} if name == "values.yaml" else yaml.safe_load((CHART / name).read_text())
    return merged(layer, SECRETS)


def rendered(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    with helm.Chart.load(CHART) as chart:
        files = chart.render(dict(values), name="demo", namespace="prod")
    return [
        document
        for name, text in files.items()
        if name.endswith(".yaml")
        for document in yaml.safe_load_all(text)
        if document
    ]


def only(documents: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    found = [document for document in documents if document["kind"] == kind]
    assert len(found) == 1, kind
    return found[0]


def pod_templates(documents: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for document in documents:
        if document["kind"] == "StatefulSet":
            yield document["spec"]["template"]
        if document["kind"] == "RayService":
            cluster = document["spec"]["rayClusterConfig"]
            yield cluster["headGroupSpec"]["template"]
            yield from (group["template"] for group in cluster["workerGroupSpecs"])


@pytest.fixture(params=FILES)
def documents(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return rendered(values_of(request.param))


@pytest.mark.parametrize("name", FILES)
def test_helm_lints_the_chart_without_a_finding(name: str) -> None:
    report = helm.lint(CHART, values_of(name), strict=True)
    assert report["errors"] == []
    assert [m for m in report["messages"] if m["severity"] > 1] == []  # 1: it has no icon


def test_every_manifest_is_valid_for_old_and_new_kubernetes(
    documents: list[dict[str, Any]],
) -> None:
    pods = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "pod", **template["metadata"]},
            "spec": template["spec"],
        }
        for template in pod_templates(documents)
    ]
    known = [document for document in documents if document["kind"] not in CUSTOM]
    for manifest in [*known, *pods]:
        for version in VERSIONS:
            kubernetes_validate.validate(manifest, version, strict=True)
    assert len({(d["kind"], d["metadata"]["name"]) for d in documents}) == len(documents)


def test_no_container_may_write_its_root_or_become_root(documents: list[dict[str, Any]]) -> None:
    for template in pod_templates(documents):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 10001  # the image's
        assert spec["automountServiceAccountToken"] is False
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert {"/data", "/tmp"} <= mounts  # all that the image writes
            named = {volume["name"] for volume in spec["volumes"]}
            claimed = {
                claim["metadata"]["name"]
                for document in documents
                if document["kind"] == "StatefulSet"
                for claim in document["spec"]["volumeClaimTemplates"]
            }
            assert {mount["name"] for mount in container["volumeMounts"]} <= named | claimed


def test_whoever_selects_pods_selects_ours(documents: list[dict[str, Any]]) -> None:
    labels = [template["metadata"]["labels"] for template in pod_templates(documents)]
    selectors = []
    for document in documents:
        spec = document.get("spec", {})
        if document["kind"] == "Service":
            selectors.append(spec["selector"])
        elif document["kind"] == "NetworkPolicy":
            selectors.append(spec["podSelector"]["matchLabels"])
        elif document["kind"] in ("PodDisruptionBudget", "InferencePool", "StatefulSet"):
            selectors.append(spec["selector"]["matchLabels"])
    assert len(selectors) >= 2
    assert all(selector.items() <= pod.items() for selector in selectors for pod in labels)


def test_the_monitor_selects_a_service_and_reads_with_the_metrics_key() -> None:
    found = rendered(values_of("values.yaml"))
    wanted = only(found, "ServiceMonitor")["spec"]["selector"]["matchLabels"]
    services = [d["metadata"]["labels"] for d in found if d["kind"] == "Service"]
    assert sum(wanted.items() <= labels.items() for labels in services) == 1
    endpoint = only(found, "ServiceMonitor")["spec"]["endpoints"][0]
    assert endpoint["authorization"]["credentials"]["name"] == "keys"
    of_ray = rendered(values_of("values-ray.yaml"))
    service = only(of_ray, "RayService")["spec"]["serveService"]["metadata"]["labels"]
    wanted = only(of_ray, "ServiceMonitor")["spec"]["selector"]["matchLabels"]
    assert wanted.items() <= service.items()


def test_probes_ask_routes_that_need_no_key_and_a_pod_has_time_to_drain() -> None:
    stateful = only(rendered(values_of("values.yaml")), "StatefulSet")["spec"]
    container = stateful["template"]["spec"]["containers"][0]
    probes = [container[f"{kind}Probe"] for kind in ("startup", "liveness", "readiness")]
    asked = {probe["httpGet"]["path"] for probe in probes}
    assert asked <= {route.path for route in health.router.routes}
    assert {probe["httpGet"]["port"] for probe in probes} == {container["ports"][0]["name"]}
    grace = stateful["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > ServerConfig().http.drain_timeout_s


@pytest.mark.parametrize("name", ["values.yaml", "values-gpu.yaml", "values-gateway.yaml"])
def test_the_server_takes_the_config_and_knows_the_variables(name: str, tmp_path: Path) -> None:
    found = rendered(values_of(name))
    config = tmp_path / "loraplex.yaml"
    config.write_text(only(found, "ConfigMap")["data"]["loraplex.yaml"])
    assert resolve_config({}, config).http.log_format == "json"
    names = {
        entry["name"]
        for template in pod_templates(found)
        for container in template["spec"]["containers"]
        for entry in container["env"]
    }
    assert names <= {f"LORAPLEX_{option.name.upper()}" for option in server_options()}


@pytest.mark.parametrize("name", ["values.yaml", "values-gateway.yaml"])
def test_a_caller_stays_with_the_pod_that_has_its_files(name: str) -> None:
    found = rendered(values_of(name))
    service = next(d["spec"] for d in found if d["kind"] == "Service")
    is_one = only(found, "StatefulSet")["spec"]["replicas"] == 1
    assert service.get("sessionAffinity") == (None if is_one else "ClientIP")


def test_a_gpu_is_asked_for_and_the_config_uses_it() -> None:
    found = rendered(values_of("values-gpu.yaml"))
    container = next(pod_templates(found))["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "device: cuda" in only(found, "ConfigMap")["data"]["loraplex.yaml"]
    of_ray = rendered(merged(values_of("values-ray.yaml"), {"gpu": {"count": 2}}))
    head, worker = pod_templates(of_ray)
    assert "nvidia.com/gpu" not in head["spec"]["containers"][0]["resources"]["limits"]
    assert worker["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 2


@pytest.mark.parametrize("name", FILES)
def test_another_base_is_mounted_where_the_config_names_it(name: str) -> None:
    found = rendered(merged(values_of(name), {"config": {"model": "/models/qwen3"}}))
    assert "model: /models/qwen3" in "".join(only(found, "ConfigMap")["data"].values())
    for template in pod_templates(found):
        spec = template["spec"]
        mounts = {mount["name"]: mount for mount in spec["containers"][0]["volumeMounts"]}
        assert mounts["models"] == {"name": "models", "mountPath": "/models", "readOnly": True}
        claims = {volume["name"]: volume for volume in spec["volumes"]}
        assert claims["models"]["persistentVolumeClaim"]["claimName"] == "models"


def test_the_cluster_takes_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change = {"gpu": {"count": 2}, "ray": {"engines": {"replicas": 3, "max_replicas": 5}}}
    found = rendered(merged(values_of("values-ray.yaml"), change))
    file = tmp_path / "cluster.yaml"
    file.write_text(only(found, "ConfigMap")["data"]["cluster.yaml"])
    monkeypatch.setenv("LORAPLEX_CATALOGUE", f"file://{tmp_path}")
    cluster = read_config(file)
    assert (cluster.engines.replicas, cluster.engines.max_replicas) == (3, 5)
    assert cluster.engines.gpus == 2
    assert cluster.gateways.replicas == 2
    assert cluster.server.http.log_format == "json"


def test_ray_serves_our_application_with_the_mounted_config() -> None:
    found = rendered(values_of("values-ray.yaml"))
    service = only(found, "RayService")["spec"]
    serve = yaml.safe_load(service["serveConfigV2"])
    application = serve["applications"][0]
    assert application["import_path"] == "loraplex_server.cluster:app"
    folder, name = application["args"]["config"].rsplit("/", 1)
    assert name in only(found, "ConfigMap")["data"]
    for template in pod_templates(found):
        mounts = template["spec"]["containers"][0]["volumeMounts"]
        assert any(m["name"] == "config" and m["mountPath"] == folder for m in mounts)
    ports = {p["targetPort"] for p in service["serveService"]["spec"]["ports"]}
    assert ports == {serve["http_options"]["port"]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"auth": {"apiKeySecret": {"name": ""}, "keysFileSecret": {"name": ""}}}, "without a key"),
        ({"replicas": 2}, "catalogue.url"),
        ({"mode": "ray"}, "catalogue.url"),
        ({"auth": {"metricsKeySecret": {"name": ""}}}, "metricsKeySecret"),
    ],
)
def test_values_that_would_serve_wrongly_are_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(helm.HelmRenderError, match=told):
        rendered(merged(SECRETS, change))


@pytest.mark.parametrize(
    "change",
    [
        *({"replica": 2}, {"mode": "swarm"}, {"catalogue": {"url": "ftp://x"}}),
        *({"gpu": {"count": -1}}, {"ray": {"workers": {"max": 8}}}),  # nothing would scale them
    ],
)
def test_values_that_the_chart_does_not_know_are_refused(change: dict[str, Any]) -> None:
    with helm.Chart.load(CHART) as chart, pytest.raises(helm.HelmError):
        chart.validate_schema(chart.merge_values(merged(SECRETS, change)))


def test_beside_an_endpoint_picker_metrics_need_no_key_and_the_pool_names_our_port() -> None:
    found = rendered(values_of("values-gateway.yaml"))
    assert "public-metrics: true" in only(found, "ConfigMap")["data"]["loraplex.yaml"]
    pool = only(found, "InferencePool")["spec"]
    container = next(pod_templates(found))["spec"]["containers"][0]
    assert pool["targetPorts"] == [{"number": container["ports"][0]["containerPort"]}]
    assert only(found, "StatefulSet")["spec"]["replicas"] > 1


def test_no_secret_is_written_into_a_manifest() -> None:
    """Keys come from Secrets that somebody else made; the chart makes none."""
    for name in FILES:
        found = rendered(values_of(name))
        assert all(document["kind"] != "Secret" for document in found)
        for template in pod_templates(found):
            for entry in template["spec"]["containers"][0]["env"]:
                secret = entry["name"].endswith(("_KEY", "_TOKEN"))
                assert secret == ("valueFrom" in entry)
