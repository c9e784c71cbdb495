"""SG-LoRA and ICM-LoRA on the adapters of this server's store.

request ─► visible adapters, or the fitted file ─► embeddings of descriptions (a CLIP's own)
        ─► task vector (icm-lora) ─► ``GenerationOrder``
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraplex_adapter_store.names.card import AdapterCard
from loraplex_adapter_store.names.name_syntax import local_name
from loraplex_adapter_store.names.selector import NameRef
from loraplex_adapter_store.plan import PoolingMode
from loraplex_adapter_store.store import AdapterStore
from loraplex_generation.errors import GeneratorMismatch, NotTrained, UnfitExamples
from loraplex_generation.experts.embeddings import Encode, KeptEmbeddings
from loraplex_generation.experts.expert import Expert
from loraplex_generation.experts.fitted import EXPERTS_FILE, FittedExperts
from loraplex_generation.experts.generator import STORE_METHODS, Candidate, ExpertGenerator
from loraplex_generation.experts.icm_lora import task_texts
from loraplex_generation.experts.task_states import encode_task
from loraplex_generation.generated import GeneratedAdapter
from loraplex_generation.request import AdapterGenerationRequest
from loraplex_server.engine.requests.client import EngineClient
from loraplex_server.model.encoder.image_reader import ImageReader
from loraplex_server.settings.api_keys import GENERATED, AdapterAccess
from loraplex_server.tenant_shares import TenantThreads

from .base_states import pooled_states
from .tower_embeddings import TowerEmbeddings


class GenerationOrder(NamedTuple):
    """A request, and the function that makes its adapter; None: the default generator does."""

    request: AdapterGenerationRequest
    make: Callable[[], GeneratedAdapter] | None = None  # blocks; raises GeneratorError


async def order_of(
    methods: "StoreMethods | None", request: AdapterGenerationRequest, access: AdapterAccess
) -> GenerationOrder:
    """Return ``methods.order``, or the request as it is on a server without these methods."""
    return GenerationOrder(request) if methods is None else await methods.order(request, access)


class StoreMethods:
    """Prepares requests for methods that read the store. Event loop only."""

    def __init__(
        self,
        store: AdapterStore,
        engine: EngineClient,
        tokenizer: PreTrainedTokenizerBase,
        encode: Encode,
        threads: TenantThreads,
        *,
        base_name: str,
        folder: Path | None,
        writes_text: bool = True,
        reader: ImageReader | None = None,
    ) -> None:
        """``folder`` may hold a fitted ``experts.safetensors``; None: the store's own adapters.

        ``encode`` embeds descriptions, unless ``reader`` is that of a base with a tower of texts.
        """
        self._store, self._engine, self._tokenizer = store, engine, tokenizer
        self._threads = threads
        self._encode = KeptEmbeddings(encode)
        self._tower: TowerEmbeddings | None = None
        if reader is not None and reader.reads_texts:
            self._tower = TowerEmbeddings(engine, tokenizer, reader, threads)
        self._writes_text = writes_text
        self._generator = ExpertGenerator(base_name, "CAUSAL_LM" if writes_text else None)
        self._file = None if folder is None else folder / EXPERTS_FILE
        self._fitted: tuple[int, FittedExperts] | None = None  # with the file's time of change

    async def order(
        self, request: AdapterGenerationRequest, access: AdapterAccess
    ) -> GenerationOrder:
        """Return the order of a request, for the adapters that the key may use.

        Raises ApiError and GeneratorError.
        """
        if request.method not in STORE_METHODS:
            return GenerationOrder(request)
        if request.examples:
            raise UnfitExamples(
                f'method "{request.method}" reads no examples; leave out the method or the examples'
            )
        if request.method == "icm-lora" and not self._writes_text:
            raise NotTrained(
                'method "icm-lora" reads states of a language model, and this base is an encoder; '
                'choose "sg-lora"'
            )
        fitted, candidates = await self._threads.run(access.tenant, partial(self._library, access))
        task = None
        if request.method == "icm-lora" and fitted is not None:
            texts = [line for text in request.texts for line in task_texts(text, request.prompts)]
            task = await self._task_vector(texts, access)
        if fitted is None:
            parts = [(each.name, each.description, digest) for each, digest in candidates]
            library = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        else:
            library = fitted.digest
        experts = [each for each, _ in candidates]
        encode: Encode = self._encode
        if self._tower is not None:
            texts = [*request.texts, *(each.description for each in experts)]
            encode = await self._tower.read(texts, access.tenant or "")
        make = partial(self._generator.generate, request, experts, fitted, encode, task)
        return GenerationOrder(replace(request, library=library), make)

    def _library(
        self, access: AdapterAccess
    ) -> tuple[FittedExperts | None, list[tuple[Candidate, str]]]:
        """Return the fitted library, or the adapters that the key may use, with digests. Blocks."""
        fitted = self._load()
        if fitted is not None:
            return fitted, []
        cards = access.candidates.listed(self._store.list())
        return None, [
            (self._candidate(card, access.shown(card.name)), card.digest)
            for card in cards
            if card.description and card.task is None and card.unservable is None
            if not local_name(card.name).startswith(GENERATED)
        ]

    def _candidate(self, card: AdapterCard, name: str) -> Candidate:
        description = card.description or ""

        def read() -> Expert:
            plan = self._store.leases.read(NameRef(card.name, card.digest))
            return Expert.of_plan(name, description, plan)

        return Candidate(name, description, read)

    def _load(self) -> FittedExperts | None:
        """Return the fitted file, read again after a change; None if there is none."""
        if self._file is None or not self._file.is_file():
            return None
        changed = self._file.stat().st_mtime_ns
        if self._fitted is None or self._fitted[0] != changed:
            fitted = FittedExperts.load(self._file)
            if fitted.base_fingerprint != self._store.base.fingerprint:
                raise GeneratorMismatch(
                    f"{self._file.name} was fitted to adapters of base "
                    f"{fitted.base_fingerprint[:16]}, not {self._store.base.fingerprint[:16]}; run "
                    "`loraplex generator train` on adapters of this base"
                )
            if fitted.by_base is not (self._tower is not None):
                raise GeneratorMismatch(
                    f"{self._file.name} was fitted with embeddings of another encoder; run "
                    "`loraplex generator train` of this release again, with --base"
                )
            self._fitted = changed, fitted
        return self._fitted[1]

    async def _task_vector(self, texts: Sequence[str], access: AdapterAccess) -> Tensor:
        """Return the mean of the base's last hidden states after the texts. Raises ApiError."""
        tenant = access.tenant or ""
        longest = self._engine.max_model_len - 1
        prompts = await self._threads.run(
            tenant, lambda: [encode_task(self._tokenizer, text)[-longest:] for text in texts]
        )
        states = await pooled_states(
            self._engine, prompts, PoolingMode.LAST, tenant, param="prompts"
        )
        return torch.stack(states).mean(0)
