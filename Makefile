# Two commands do everything: `make serve` and `make test`.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

CLIENTS := .venv-clients

.PHONY: help beside serve cluster test test-cluster test-nightly research-tests test-fast check ci lint types bandit sbom unit unit-all interpreter fuzz soak bench bench-gpu gpu gpu-report gpu-sanitize load kernels-report native demos clients docker-check images clean venv console docs wheel

help:  # what each target does
	@sed -n 's/^\([a-z-]*\):[^#]*# *\(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

venv: $(STAMP)

$(STAMP): pyproject.toml setup.py $(wildcard kernels/loraplex_kernels/cpu/csrc/*/*)
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or newer is needed; try: make PYTHON=python3 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev,load,research]"
	@touch $@

serve: venv  # a server of the default base on port 8000
	$(BIN)/loraplex pull
	$(BIN)/loraplex serve --port 8000

cluster: venv  # two engine replicas behind two gateways on this machine; Ctrl-C ends all of it
	$(BIN)/python -m pip install --quiet --editable ".[ray]"
	$(BIN)/loraplex pull
	$(BIN)/loraplex cluster up deploy/cluster.yaml

test: check  # before a push: all but Triton's interpreter and tests marked slow or nightly

check: lint
	$(MAKE) --jobs 2 unit beside

ci: lint  # what .ci/run does: make test, make interpreter and the slow tests
	$(MAKE) --jobs 2 unit-all beside BESIDE="types bandit interpreter"

# Checks of one core each, one after the other, in the time that tests leave over while they wait.
BESIDE := types bandit
beside: venv
	nice -n 5 $(MAKE) --output-sync=target $(BESIDE)

lint: venv  # ruff
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: venv  # mypy
	$(BIN)/mypy

SHIPPED := setup.py server/loraplex_server kernels/loraplex_kernels adapter_store/loraplex_adapter_store \
	training/loraplex_training training/loraplex_generation router/loraplex_router

bandit: venv  # unsafe calls in what is shipped
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive $(SHIPPED)

sbom: venv  # what a plain install brings along, as CycloneDX, into sbom.json
	$(PYTHON) -m venv build/sbom
	build/sbom/bin/python -m pip install --quiet .
	$(BIN)/cyclonedx-py environment --output-format JSON --output-file sbom.json build/sbom/bin/python

unit: venv  # the tests of make test
	$(BIN)/loraplex pull --quiet
	$(TESTS) -m "not gpu and not interpreter and not cluster and not slow and not nightly" $(CLUSTERLESS)

interpreter: venv  # Triton's kernels in its interpreter, and compiled for GPUs; two minutes
	$(PYTEST) --timeout 1500 -m "interpreter and not nightly" tests/kernels/triton

test-cluster: venv  # real clusters on this machine; some minutes
	$(PYTEST) tests/cluster tests/docs/test_cluster_pages.py

test-nightly: venv  # what CI has no time for: ten lives of soak, long walks of the contract …
	$(BIN)/loraplex pull --quiet
	$(TESTS) -m "nightly and not gpu" $(CLUSTERLESS)

research-tests: venv  # the zoo, trainings on tiny bases, demo data, the fleet simulator
	$(BIN)/loraplex pull --quiet
	$(TESTS) -m nightly research/tests

unit-all: venv  # the tests of make ci
	$(BIN)/loraplex pull --quiet
	$(TESTS) -m "not gpu and not interpreter and not cluster and not nightly" $(CLUSTERLESS)

# One thread for each process: two on a core wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=25
# One process for each core: more of them slow down what some tests bound in seconds of CPU time. A
# file runs whole, so that its tests share servers; tests/conftest.py has the order. Clusters are
# not even imported.
WORKERS ?= auto
TESTS := $(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder
CLUSTERLESS := --ignore=tests/cluster

FUZZ := --seed 1 --cases 100000
fuzz: venv  # odd requests and adapter files against a real server; some twenty minutes
	$(BIN)/python -m tests.fuzz $(FUZZ)

console: venv  # builds the console from server/console; needs npm
	mkdir -p build
	$(BIN)/python -m tests.console.openapi > build/openapi.json
	cd server/console && npm ci --no-fund --no-audit && npm run types && npm run check && npm run build

docs: venv  # builds the documentation into the package: GET /guide; warnings are errors
	$(BIN)/python -m docs.site

wheel: docs  # into dist/, with the documentation
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

soak: venv  # an hour of mixed chaos against a real server
	$(BIN)/python -m tests.soak.run $(SOAK)

FAST := architecture deploy router adapter_store
test-fast: lint types  # some two minutes
	$(PYTEST) -m "not gpu and not slow and not nightly" $(addprefix tests/,$(FAST))

gpu: venv  # the tests that need the CUDA device of this machine
	$(BIN)/python -m pytest -m "gpu" tests/kernels tests/server

gpu-sanitize: venv  # the same under compute-sanitizer: out-of-bounds, races, uninitialised reads
	for tool in memcheck racecheck initcheck; do \
		compute-sanitizer --tool $$tool --error-exitcode 1 \
			$(BIN)/python -m pytest -m "gpu" tests/kernels/triton/device || exit 1; \
	done

clients: venv $(CLIENTS)/.installed  # real clients against a real server; writes docs/clients.md
	$(BIN)/python -m tests.clients $(CLIENTS) $(ONLY)

CLIENT_GROUPS := $(shell sed -n 's/^\(clients-.*\) = \[.*/\1/p' pyproject.toml)
$(CLIENTS)/.installed: pyproject.toml
	for group in $(CLIENT_GROUPS); do \
		$(PYTHON) -m venv $(CLIENTS)/$$group && \
		$(CLIENTS)/$$group/bin/python -m pip install --quiet --upgrade pip && \
		$(CLIENTS)/$$group/bin/python -m pip install --quiet --group $$group || exit 1; \
	done
	@touch $@

gpu-report: venv  # all that a GPU can tell, into gpu-report/report.html and report.json; stop it whenever
	$(BIN)/python -m loadtests.gpu_report $(REPORT)

bench-gpu: venv  # measures the kernels on a GPU
	$(BIN)/python -m kernels.benchmarks.bench_gpu

bench: venv  # measures the kernels on this CPU
	$(BIN)/python -m kernels.benchmarks.bench_cpu

load: venv  # measures a server under mixed load
	$(BIN)/loraplex bench mixed

docker-check: venv  # lints the Dockerfiles and replays the CPU image's steps in a clean venv
	$(BIN)/hadolint Dockerfile Dockerfile.cuda
	$(BIN)/python -m deploy.replay

IMAGES := dist
images:  # builds both images; their digests go into dist/images.txt
	@command -v docker >/dev/null || { echo "make images needs Docker, which is not on the PATH"; exit 1; }
	mkdir -p $(IMAGES)
	docker build --iidfile $(IMAGES)/cpu.id --tag loraplex .
	docker build --iidfile $(IMAGES)/cuda.id --tag loraplex:cuda --file Dockerfile.cuda .
	printf 'loraplex %s\nloraplex:cuda %s\n' "$$(cat $(IMAGES)/cpu.id)" "$$(cat $(IMAGES)/cuda.id)" > $(IMAGES)/images.txt
	rm $(IMAGES)/cpu.id $(IMAGES)/cuda.id

native: venv  # builds the C++ library again
	$(BIN)/python setup.py -q build_ext --inplace

kernels-report: venv  # compiles every GPU kernel: registers, shared memory, spills, faults
	$(BIN)/python -m tests.support.gpu.compiled_kernels

demos: venv  # trains the shipped adapters again, but for chores and clock-12h, into ./demos
	$(BIN)/python -m research.demos --out demos

clean:
	rm -rf $(VENV) $(CLIENTS) build *.egg-info .mypy_cache .ruff_cache .hypothesis
