"""The commands of the documentation that these tests do not run, each with the reason.

What is not run is at least a real command: ``real_commands`` says how that is checked.
"""

from collections.abc import Mapping

_SERVES = "serves until it is stopped; the server of these tests is started by the same command"
_OPTIONS = "the same command with options for a base, a GPU or a bucket of the reader's"
_MAKES = "makes an environment from a clone, which is what runs these tests"
_STATE = "needs the directory of a server that ran; tests/server/cli/test_verify_cli.py has some"
_IMAGES = "needs a server of an image encoder; tests/vectors/test_images.py asks one"
_DOCKER = "needs a Docker engine; `make docker-check` and tests/deploy replay the image's steps"
_KUBERNETES = "needs a cluster of Kubernetes; the chart is rendered here with these values"

# Page → the beginning of a command → why it is not run.
NOT_RUN: Mapping[str, Mapping[str, str]] = {
    "README.md": {"make serve": _MAKES},
    "CONTRIBUTING.md": {
        "git clone": _MAKES,
        "def read_sora": "part of a file; tests/adapter_store/test_contributing.py runs it",
    },
    "docs/index.md": {"git clone": _MAKES},
    "docs/console.md": {"loraplex serve": _SERVES},
    "docs/tinker.md": {"pip install": _SERVES},
    "docs/training.md": {
        "loraplex eval": "needs a server with the adapter; tests/server/cli/test_chat.py has one"
    },
    "docs/quantization.md": {"loraplex serve": _OPTIONS},
    "docs/gguf.md": {"loraplex serve": _OPTIONS},
    "docs/performance.md": dict.fromkeys(
        ("loraplex serve --prefix-cache-dir", "loraplex serve --kv-cache-dtype"), _OPTIONS
    ),
    "docs/images.md": {
        "loraplex serve": _OPTIONS,
        "import base64": "needs such a base; tests/server/api/test_chat_images.py serves one",
        "with open": "needs such a base; tests/server/api/test_uploaded_images.py serves one",
    },
    "docs/image-encoders.md": {
        "loraplex serve": _OPTIONS,
        "import base64": _IMAGES,
        "body =": _IMAGES,
    },
    "docs/image-classes.md": {
        "import base64": "needs a server of a CLIP; tests/vectors/test_few_shot.py asks one",
    },
    "docs/gpu.md": {"loraplex serve --model … --device cuda:0\n": _OPTIONS},
    "docs/tensor-parallel.md": {"loraplex serve --model … --device cuda:0 --tensor": _OPTIONS},
    "docs/gpu-evidence.md": {
        "make gpu-report": "needs a GPU; tests/loadtests runs its sections without one"
    },
    "docs/coming-from.md": {"loraplex serve": _OPTIONS},
    "docs/catalogue.md": {"pip install": _OPTIONS},
    "docs/tutorials/serve-your-adapters.md": {"loraplex serve --model": _OPTIONS},
    "docs/tutorials/classifiers.md": {
        "loraplex serve": "serves another base; tests/examples runs the script against it",
        "python examples/": "needs a folder of tasks; tests/examples runs it without one",
        "import httpx": "needs the server of that base",
    },
    "docs/deployment.md": {
        "docker build": _DOCKER,
        "loraplex pull": _DOCKER,
        "LORAPLEX_API_KEY=": _DOCKER,
    },
    "docs/state-directory.md": {
        "loraplex adapters verify\n": _STATE,
        "loraplex adapters verify ~": _STATE,
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
    "docs/scale-out.md": {
        "serve start": "joins a Ray that runs; tests/cluster/test_up_and_down.py runs both",
        "python -m loadtests.replicas": "minutes of load on three servers",
    },
    "docs/adapters-from-adapters.md": {
        "loraplex serve --generator-dir": "tests/generation/test_store_methods.py runs both",
        "import httpx": "needs a server of a CLIP; tests/generation/test_clip_experts.py asks one",
    },
    "docs/structured-output.md": {
        "git clone": "fetches 11,000 schemas; tests/loadtests/test_schema_bench.py judges two"
    },
    "docs/tools.md": {"loraplex serve": "an hour of questions; tests/contract asks some of them"},
}

# Run by tests/docs/test_cluster_pages.py (`make test-cluster`).
ON_A_CLUSTER: Mapping[str, tuple[str, ...]] = {
    "docs/tutorials/scale-out.md": (
        'pip install "loraplex[ray]"',
        "loraplex cluster status",
        "loraplex cluster down",
    ),
    "docs/scale-out.md": ("loraplex cluster up",),
    "docs/operate-a-cluster.md": ("curl -s http://127.0.0.1:8000/v1/cluster",),
}
