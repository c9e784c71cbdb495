"""The commands of the documentation that these tests do not run, each with the reason.

What is not run is at least a real command: ``real_commands`` says how that is checked.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["NOT_RUN", "ON_A_CLUSTER"]

_SERVES = "serves until it is stopped; the server of these tests is started by the same command"
_OPTIONS = "the same command with options for a base, a GPU or a bucket of the reader's"
_MAKES = "makes an environment from a clone, which is what runs these tests"
_DOCKER = "needs a Docker engine; `make docker-check` and tests/deploy replay the image's steps"
_KUBERNETES = "needs a cluster of Kubernetes; the chart is rendered here with these values"
_HOURS = "hours of measuring or training"

# Page → the beginning of a command → why it is not run.
NOT_RUN: Mapping[str, Mapping[str, str]] = {
    "README.md": {"make serve": _MAKES},
    "CONTRIBUTING.md": {
        "git clone": _MAKES,
        "def read_sora": "part of a file; tests/adapter_store/test_contributing.py runs it",
    },
    "docs/index.md": {"git clone": _MAKES},
    "docs/console.md": {"loraplex serve": _SERVES},
    "docs/quantization.md": {"loraplex serve": _OPTIONS},
    "docs/gpu.md": {
        "loraplex serve --model … --device cuda:0\n": _OPTIONS,
        "loraplex serve --model … --device cuda:0 --tensor": _OPTIONS,
        "make gpu-report": "needs a GPU; tests/loadtests runs its sections without one",
    },
    "docs/catalogue.md": {"pip install": _OPTIONS},
    "docs/tutorials/serve-your-adapters.md": {"loraplex serve --model": _OPTIONS},
    "docs/deployment.md": {
        "docker build": _DOCKER,
        "loraplex pull": _DOCKER,
        "LORAPLEX_API_KEY=": _DOCKER,
    },
    "docs/kubernetes.md": {
        "docker build -t": _KUBERNETES,
        "docker build --build-arg": _KUBERNETES,
        "helm install": _KUBERNETES,
    },
    "docs/tutorials/load-test.md": {
        "loraplex bench adapters": "minutes of load; the page's own scenario is run"
    },
    "docs/load-testing.md": {
        "git clone": _MAKES,
        "loraplex bench list": "minutes of load; tests/loadtests runs every kind of phase",
        "locust": "opens a page and waits for its reader; tests/loadtests runs the same file",
    },
    "docs/benchmarks.md": {"python -m venv": "compiles llama.cpp and downloads vLLM"},
    "docs/families.md": {"python -m pytest": "a test of its own, which CI runs"},
    "docs/scale-out-simulation.md": {"python -m router": _HOURS},
    "docs/scale-out.md": {
        "serve start": "joins a Ray that runs; tests/cluster/test_up_and_down.py runs both",
        "python -m loadtests.replicas": "minutes of load on three servers",
    },
    "docs/tools.md": {"loraplex serve": "an hour of questions; tests/contract asks some of them"},
    "docs/generated-adapters-method.md": {
        "python -m adapter_store.benchmarks.few_shot plan": _HOURS,
        "python -m adapter_store.benchmarks.few_shot run --draws": "a quarter of an hour",
        "python -m adapter_store.benchmarks.few_shot test": _HOURS,
        "loraplex zoo train --base": _HOURS + "; tests/generation trains a tiny one",
        "loraplex zoo train --restart": _HOURS + "; tests/generation trains a tiny one",
    },
}

# Run by tests/docs/test_cluster_pages.py (`make test-cluster`).
ON_A_CLUSTER: Mapping[str, tuple[str, ...]] = {
    "docs/tutorials/scale-out.md": (
        'pip install "loraplex[ray]"',
        "loraplex cluster status",
        "loraplex cluster down",
    ),
    "docs/scale-out.md": ("loraplex cluster up", "curl -s http://127.0.0.1:8000/v1/cluster"),
}
