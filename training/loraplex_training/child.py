"""Training in a process of its own, for a server. Each step prints a line of JSON.

    python -m loraplex_training.child FOLDER

``FOLDER/order.json`` holds the settings (``Order``) and ``FOLDER/data.jsonl`` the chats. The
adapter is written to ``FOLDER/adapter``. The last line is ``{"done": …}`` or ``{"error": …}``.
The process ends when its standard input is closed, because then its parent is gone.
"""

import contextlib
import json
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from .config import PLAIN, AdapterShape, Schedule, TrainingConfig
from .errors import ExamplesError, TrainingError
from .run import StepReport
from .trainer import train

ORDER, DATA, ADAPTER = "order.json", "data.jsonl", "adapter"  # names below the folder
_NICE = 10  # a process at this priority gets a tenth of the time that a serving process gets
_HELD_OUT = 0.1  # share of the examples for validation, at least one example
_MAX_HELD_OUT_TOKENS = 8192  # a validation takes as long as a few steps
_MAX_LEN = 1024  # tokens of an example
_N_VALIDATIONS = 10


@dataclass(frozen=True, slots=True)
class Order:
    """The settings of a job, JSON-ready. `base` is a transformers directory."""

    base: str
    base_name: str
    rank: int
    alpha: float
    steps: int
    lr: float
    seed: int
    max_seconds: float
    n_threads: int
    recipe: str = PLAIN

    def config(self, folder: Path) -> TrainingConfig:
        return TrainingConfig(
            data=folder / DATA,
            out=folder / ADAPTER,
            base=Path(self.base),
            base_name=self.base_name,
            shape=AdapterShape(recipe=self.recipe, rank=self.rank, alpha=self.alpha),
            schedule=Schedule(
                steps=self.steps,
                lr=self.lr,
                warmup_steps=min(10, max(1, self.steps // 10)),
                validate_every=max(1, self.steps // _N_VALIDATIONS),
                max_seconds=self.max_seconds,
                seed=self.seed,
            ),
            validation=_HELD_OUT,
            max_validation_tokens=_MAX_HELD_OUT_TOKENS,
            max_len=_MAX_LEN,
            device="cpu",  # accelerators serve
            threads=self.n_threads,
        )


def main() -> None:
    folder = Path(sys.argv[1])
    with contextlib.suppress(OSError, AttributeError):
        os.nice(_NICE)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    order = Order(**json.loads((folder / ORDER).read_text()))
    try:
        trained = train(order.config(folder), on_step=_tell_step)
    except TrainingError as error:  # the client sees it, so paths are removed
        message = str(error).replace(f"{folder}/", "").replace(order.base, order.base_name)
        _tell({"error": message, "param": "examples" if isinstance(error, ExamplesError) else None})
    else:
        done = trained.progress
        _tell({"done": {"step": done.step, "validation_loss": trained.validation_loss}})


def _tell_step(report: StepReport) -> None:
    _tell(
        {
            "step": report.step,
            "n_steps": report.steps,
            "loss": report.train_loss,
            "validation_loss": report.validation_loss,
            "base_validation_loss": report.base_validation_loss,
            "tokens_per_s": report.tokens_per_s,
        }
    )


def _tell(line: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    while os.read(0, 1):  # not of sys.stdin: its lock would be held when the process ends
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
