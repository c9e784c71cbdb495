"""Files in the form of Anthropic's clients."""

from collections.abc import Sequence
from datetime import UTC, datetime

from .records import FileRecord

PURPOSE = "user_data"  # of their uploads, which name none
_PAGE = "page_"  # begins a cursor; the id of the last file follows


def anthropic_file(file: FileRecord) -> dict[str, object]:
    return {
        "type": "file",
        "id": file.id,
        "filename": file.filename,
        "mime_type": file.media_type,
        "size_bytes": file.n_bytes,
        "created_at": datetime.fromtimestamp(file.created, UTC).isoformat(),
        "downloadable": True,
    }


def anthropic_page(files: Sequence[FileRecord], *, has_more: bool) -> dict[str, object]:
    next_page = f"{_PAGE}{files[-1].id}" if has_more else None
    return {"data": [anthropic_file(file) for file in files], "next_page": next_page}


def last_of(page: str | None) -> str | None:
    """Return the id of the file that a cursor continues after."""
    return None if page is None else page.removeprefix(_PAGE)
