"""Lowers the priority of a thread that works beside serving."""

import contextlib
import os
import threading

import torch

_NICE = 10  # Linux gives such a thread a tenth of the time of an engine thread


def yield_to_serving(n_threads: int) -> None:
    """Lower the calling thread's priority for good. Other systems than Linux ignore this.

    ``n_threads``: of torch's operations on the calling thread.
    """
    if torch.get_num_threads() != n_threads:
        torch.set_num_threads(n_threads)
        # New threads inherit the number that any thread has set last, and the engine needs 1.
        reset = threading.Thread(target=torch.set_num_threads, args=(1,))
        reset.start()
        reset.join()
    with contextlib.suppress(OSError, AttributeError):
        thread = threading.get_native_id()
        nice = max(_NICE, os.getpriority(os.PRIO_PROCESS, thread))
        os.setpriority(os.PRIO_PROCESS, thread, nice)
