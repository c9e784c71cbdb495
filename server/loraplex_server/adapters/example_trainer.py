"""Trains an adapter on examples, in a thread that serving hardly notices."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator

import torch

from loraplex_adapter_store.errors import StoreError
from loraplex_adapter_store.faults import FaultLog, NoFaultLog
from loraplex_generation.chat_base import ChatBase
from loraplex_generation.from_examples import encode_pairs, generate_from_examples
from loraplex_generation.packing import ChatCodec
from loraplex_generation.refinement import Progress, RefinementRecipe
from loraplex_generation.service import GeneratedAdapter, Generator
from loraplex_generation.zoo.tasks import Example
from loraplex_server.api.errors import ApiError, unavailable

from .background_share import BackgroundShare
from .generated_adapters import AdapterGenerationRequest
from .jobs import JobCancelled

__all__ = ["ExampleTrainer"]

_NICE = 10  # the kernel gives such a thread a tenth of what one of the engine gets
_log = logging.getLogger(__name__)


class ExampleTrainer:
    """A ``Trainer``. ``train`` changes the priority of the thread that it runs on, for good."""

    def __init__(
        self,
        find_generator: Callable[[], Generator],
        find_base: Callable[[], ChatBase],
        find_codec: Callable[[], ChatCodec],
        share: BackgroundShare,
        *,
        n_threads: int = 1,
        recipe: RefinementRecipe = RefinementRecipe(),  # noqa: B008  frozen value
        faults: FaultLog = NoFaultLog(),  # noqa: B008  stateless
    ) -> None:
        """What ``find_…`` find is loaded at the first use. ``share``: of the base's products."""
        self._find_generator, self._find_base = find_generator, find_base
        self._find_codec, self._share = find_codec, share
        self._n_threads, self._recipe, self._faults = n_threads, recipe, faults

    def check(self, request: AdapterGenerationRequest) -> None:
        with self._failures():
            self._find_generator()  # raises GeneratorMismatch for a base that it is not for
            encode_pairs(self._find_codec(), _pairs(request))

    def train(
        self,
        request: AdapterGenerationRequest,
        *,
        deadline: float,
        stop: threading.Event,
        report: Progress,
    ) -> GeneratedAdapter:
        _yield_to_serving(self._n_threads)
        self._share.start(deadline, stop)
        with self._failures():
            return generate_from_examples(
                self._find_generator(),
                *self._find_base(),
                request.description,
                _pairs(request),
                wordings=request.wordings,
                unlabelled=request.prompts,
                method=request.method,
                seed=request.seed,
                samples=request.samples,
                force=request.force,
                recipe=self._recipe,
                deadline=deadline,
                report=report,
            )

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Errors that are no fault of the request, for the log and for its sender."""
        try:
            yield
        except (StoreError, ApiError, JobCancelled):
            raise
        except Exception as error:
            _log.exception("learning from examples failed")
            self._faults.failed("generator", error)
            raise unavailable(
                "learning from examples failed; the server's log says why. A draft stays as it is",
                "generator_unavailable",
            ) from error
        self._faults.worked("generator")


def _pairs(request: AdapterGenerationRequest) -> list[Example]:
    return [Example(prompt, answer) for prompt, answer in request.examples]


def _yield_to_serving(n_threads: int) -> None:
    """Linux counts priorities by thread; elsewhere a thread has that of its process."""
    if torch.get_num_threads() != n_threads:
        torch.set_num_threads(n_threads)
        # New threads take what any thread has set last: theirs is one, as the engine wants it.
        others = threading.Thread(target=torch.set_num_threads, args=(1,))
        others.start()
        others.join()
    with contextlib.suppress(OSError, AttributeError):
        thread = threading.get_native_id()
        nice = max(_NICE, os.getpriority(os.PRIO_PROCESS, thread))
        os.setpriority(os.PRIO_PROCESS, thread, nice)
