"""The loaded library: which kernels it has, and that it means the structs that Python fills."""

import ctypes

import pytest

from kernels.benchmarks import kernel_sets
from loraplex_kernels.cpu import native, structs

needs_native = pytest.mark.skipif(
    not native.available(), reason="no C++ compiler built the kernels"
)


@needs_native
def test_the_best_kernels_of_this_processor_are_in_use_and_the_portable_ones_always_run() -> None:
    sets = kernel_sets.kernel_sets()
    assert kernel_sets.kernel_set() == sets[0]
    assert sets[-1] == "portable"


@needs_native
def test_kernels_that_do_not_run_here_are_refused() -> None:
    with pytest.raises(ValueError, match="no native kernels 'avx1024' run here"):
        kernel_sets.use_kernel_set("avx1024")


@needs_native
def test_every_struct_and_field_lies_where_the_library_has_it() -> None:
    lib = native.library()
    assert lib is not None
    assert structs.layout_faults(lib) == []


@needs_native
def test_a_struct_of_another_layout_is_found() -> None:
    class LoraSegmentsStruct(ctypes.Structure):
        _fields_ = (
            ("slots", ctypes.c_void_p),
            ("indices", ctypes.c_void_p),
            ("indptr", ctypes.c_void_p),
            ("colour", ctypes.c_int64),
        )

    lib = native.library()
    assert lib is not None
    assert structs.layout_faults(lib, (LoraSegmentsStruct,)) == [
        "LoraSegments is 32 in Python, 48 in the library",
        "LoraSegments.indices is 8 in Python, 16 in the library",
        "LoraSegments.indptr is 16 in Python, 8 in the library",
        "LoraSegments.colour is 24 in Python, -1 in the library",
    ]
