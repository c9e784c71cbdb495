"""Makes the k-th call through a seam fail, once; and the k-th tensor operation of a block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["EveryTensorOperation", "KthFault"]

T = TypeVar("T")


class KthFault:
    """Armed for k, call ``k`` raises ``error()``; earlier and later ones pass."""

    def __init__(self, error: Callable[[], BaseException]) -> None:
        self.error = error
        self._left: int | None = None

    def arm(self, k: int) -> None:
        self._left = k

    def disarm(self) -> bool:
        """Whether it has struck since it was armed."""
        struck, self._left = self._left is None, None
        return struck

    def each_k(self) -> Iterator[int]:
        """Arms it for 0, 1, 2 … until a round passes without a fault; at least one must strike."""
        k = 0
        while True:
            self.arm(k)
            yield k
            if not self.disarm():
                break
            k += 1
        assert k > 0, "nothing went through the seam"

    def pass_through(self) -> None:
        """One call."""
        if self._left is None:
            return
        self._left -= 1
        if self._left < 0:
            self._left = None
            raise self.error()

    def before(self, function: Callable[..., T]) -> Callable[..., T]:
        """``function``, with a fault in its place when it is due."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> T:
            self.pass_through()
            return function(*args, **kwargs)

        return wrapped

    def within(self, function: Callable[..., T]) -> Callable[..., T]:
        """``function``, with a fault in the place of any tensor operation that it runs."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> T:
            with EveryTensorOperation(self):
                return function(*args, **kwargs)

        return wrapped


class EveryTensorOperation(TorchDispatchMode):  # type: ignore[misc]  # torch has no types here
    """Allocations, copies, casts: of this thread, while it is entered."""

    def __init__(self, fault: KthFault) -> None:
        super().__init__()
        self._fault = fault

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self._fault.pass_through()
        return operation(*args, **(kwargs or {}))
