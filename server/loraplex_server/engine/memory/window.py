"""Says which pages of a request are kept when every layer of the base has a sliding window."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Window:
    """The tokens of a request whose KV is needed.

    pages: [gone | seen by the next query | written by the next steps]
    """

    n_seen: int  # tokens that a query sees, its own included, in the layer that sees most
    n_ahead: int  # tokens that may be computed before ``KvCache.slide`` is called again

    @classmethod
    def of_layers(cls, windows: Iterable[int | None], n_ahead: int) -> "Window | None":
        """Return the window of all layers; None if a layer has none."""
        sizes = list(windows)
        widest = max((size for size in sizes if size is not None), default=None)
        return None if widest is None or None in sizes else cls(widest, n_ahead)

    def first_page(self, n_computed: int, page_size: int) -> int:
        """Return the first page that the query after ``n_computed`` tokens sees."""
        return max(0, n_computed - self.n_seen + 1) // page_size

    def n_pages(self, page_size: int) -> int:
        """Return the most pages that are not gone: of the window, of the steps, and cut ones."""
        return -(-(self.n_seen + self.n_ahead) // page_size) + 2
