"""Makes the k-th call through a seam, or the k-th tensor operation of a block, fail once."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")


class KthFault:
    """A fault: armed for k, call ``k`` raises ``error()``, and all other calls pass."""

    def __init__(self, error: Callable[[], BaseException]) -> None:
        self.error = error
        self._left: int | None = None

    def arm(self, k: int) -> None:
        self._left = k

    def disarm(self) -> bool:
        """Return True if the fault was raised since it was armed, and disarm it."""
        struck, self._left = self._left is None, None
        return struck

    def each_k(self) -> Iterator[int]:
        """Arm for 0, 1, 2 … until a round has no fault. At least one round must have one."""
        k = 0
        while True:
            self.arm(k)
            yield k
            if not self.disarm():
                break
            k += 1
        assert k > 0, "nothing went through the seam"

    def pass_through(self) -> None:
        """Count one call, and raise if its turn has come."""
        if self._left is None:
            return
        self._left -= 1
        if self._left < 0:
            self._left = None
            raise self.error()

    def before(self, function: Callable[..., T]) -> Callable[..., T]:
        """Wrap ``function``, so that the k-th call raises instead."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> T:
            self.pass_through()
            return function(*args, **kwargs)

        return wrapped

    def within(self, function: Callable[..., T]) -> Callable[..., T]:
        """Wrap ``function``, so that its k-th tensor operation raises instead."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> T:
            with EveryTensorOperation(self):
                return function(*args, **kwargs)

        return wrapped


class EveryTensorOperation(TorchDispatchMode):  # type: ignore[misc]  # torch has no types here
    """A mode that counts this thread's tensor operations: allocations, copies and casts."""

    def __init__(self, fault: KthFault) -> None:
        super().__init__()
        self._fault = fault

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self._fault.pass_through()
        return operation(*args, **(kwargs or {}))
