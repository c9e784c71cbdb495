# syntax=docker/dockerfile:1
# CPU image: docker build -t loraplex .
#   docker run --read-only --tmpfs /tmp -v loraplex:/data -p 8000:8000 -e LORAPLEX_API_KEY=… loraplex
# Checked without a Docker engine by `make docker-check`, which replays these steps in a clean venv.

FROM python:3.11.13-slim-bookworm AS build
# Empty: torch comes from the index that pip is configured for.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/loraplex/venv
ENV PATH=/opt/loraplex/venv/bin:$PATH
# Torch first: it is the largest layer and changes least.
RUN pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "torch>=2.11,<3"
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY kernels kernels
COPY adapter_store adapter_store
COPY training training
COPY router router
COPY server server
# catalogue: adapters from s3://, gs://, az:// too. For Ray Serve: --build-arg EXTRAS=otel,catalogue,ray
ARG EXTRAS=otel,catalogue
RUN pip install ".[$EXTRAS]"
# The default base and the sentence encoder are part of the image; nothing is fetched at start.
ENV LORAPLEX_HOME=/opt/loraplex/home
RUN loraplex pull --quiet

FROM python:3.11.13-slim-bookworm AS serve
LABEL org.opencontainers.image.title="loraplex" \
      org.opencontainers.image.description="One base model, hundreds of adapters, one batch" \
      org.opencontainers.image.licenses="Apache-2.0"
# wget: KubeRay asks with it whether a pod of Ray is alive and ready.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 loraplex \
    && useradd --uid 10001 --gid 10001 --home-dir /data --shell /usr/sbin/nologin loraplex \
    && mkdir /data \
    && chown 10001:10001 /data
COPY --from=build /opt/loraplex /opt/loraplex
# Everything that is written goes to /data (a volume) and /tmp (a tmpfs): the root may be read-only.
ENV PATH=/opt/loraplex/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_OFFLINE=1 \
    HOME=/data \
    LORAPLEX_HOME=/opt/loraplex/home \
    LORAPLEX_STATE_DIR=/data/adapters \
    LORAPLEX_HOST=0.0.0.0 \
    LORAPLEX_PORT=8000 \
    LORAPLEX_LOG_FORMAT=json
VOLUME /data
WORKDIR /data
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f\"http://127.0.0.1:{os.environ['LORAPLEX_PORT']}/health\", timeout=4)"]
# The server is process 1 and drains on SIGTERM: give it time with `docker stop --time 40`.
STOPSIGNAL SIGTERM
ENTRYPOINT ["loraplex"]
CMD ["serve"]
