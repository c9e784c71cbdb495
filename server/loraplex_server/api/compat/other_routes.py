"""Routes of other servers, and the route here that does the same, as docs/coming-from.md says."""

from collections.abc import Mapping

OTHER_ROUTES: Mapping[str, str] = {
    # TGI and SGLang
    "/embed": "/v1/embeddings",
    "/get_model_info": "/v1/models",
    # llama.cpp
    "/completion": "/v1/completions",
    "/embedding": "/v1/embeddings",
    "/lora-adapters": "/v1/adapters",
    "/props": "/v1/models",
    "/slots": "/v1/requests",
    # Ollama
    "/api/generate": "/v1/completions",
    "/api/chat": "/v1/chat/completions",
    "/api/embed": "/v1/embeddings",
    "/api/tags": "/v1/models",
    # vLLM
    "/load": "/v1/requests",
}
