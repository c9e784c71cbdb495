"""Gives a GGUF file the form of a model's folder: config, tokenizer, and a link to the file."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from .gguf_config import config_of
from .gguf_file import GgufFile
from .gguf_tokenizer import end_token_ids, tokenizer_of

GGUF_FILE = "model.gguf"
_FORMAT = 1  # of the folder; increase it when its content changes, to write old ones again


def gguf_folder(path: Path, cache: Path) -> Path:
    """Return the folder below ``cache`` for the file, which is written at the first use.

    Its name is that of the file without ".gguf". A file that changed has another folder. Raises
    ModelError for a file that cannot be served, and OSError.
    """
    path = path.resolve()
    stat = path.stat()
    known = json.dumps([_FORMAT, str(path), stat.st_size, stat.st_mtime_ns])
    parent = cache / hashlib.sha256(known.encode()).hexdigest()[:16]
    folder = parent / path.stem
    if folder.is_dir():
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    written = Path(tempfile.mkdtemp(prefix=".", dir=parent))
    try:
        write_gguf_folder(path, written)
        (written / GGUF_FILE).symlink_to(path)
        written.chmod(0o755)
        written.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(written, ignore_errors=True)
    return folder


def write_gguf_folder(path: Path, folder: Path) -> None:
    """Write config and tokenizer of the file ``path`` to ``folder``. Raises ModelError."""
    file = GgufFile(path)
    config = config_of(file)
    tokenizer = tokenizer_of(file)
    tokenizer.model_max_length = int(config["max_position_embeddings"])
    tokenizer.save_pretrained(folder)
    generation = {"eos_token_id": end_token_ids(file)}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
