"""Training of one adapter: a loop that can be stopped at any time and resumed."""

import contextlib
import shutil
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from .config import TrainingConfig
from .errors import CheckpointError
from .run import OnStep, Run, StepReport, TrainedAdapter


def train(
    config: TrainingConfig,
    *,
    on_step: OnStep = lambda report: None,
    restart: bool = False,
    overwrite: bool = False,
) -> TrainedAdapter:
    """Train an adapter and write a PEFT directory with a card to ``config.out``.

    An interrupted run leaves a checkpoint below ``config.out``. The same call resumes it, with the
    result of an uninterrupted run. On the main thread, Ctrl-C first ends the step and its
    validation; a second Ctrl-C stops at once. ``restart`` ignores the checkpoint, ``overwrite``
    replaces a finished adapter. Raises TrainingError.
    """
    state = config.out / ".training"
    if restart:
        shutil.rmtree(state, ignore_errors=True)
    if (config.out / "adapter_config.json").exists() and not (overwrite or state.exists()):
        raise CheckpointError(f"{config.out} holds an adapter already; give --overwrite to replace")
    run = Run(config, state / "checkpoint.safetensors")
    run.resume()
    with _interrupts() as interrupted:

        def report_step(report: StepReport) -> None:
            """Report a step, and stop if asked to: after its validation, the state is complete."""
            on_step(report)
            if interrupted.is_set():
                run.checkpoint()
                raise KeyboardInterrupt

        run.loop(report_step)
    trained = run.export()
    shutil.rmtree(state, ignore_errors=True)
    return trained


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C sets; a second Ctrl-C raises KeyboardInterrupt."""
    interrupted = threading.Event()
    default = signal.default_int_handler

    def handle(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, default)
        interrupted.set()

    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not default
    ):
        yield interrupted
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, default)
