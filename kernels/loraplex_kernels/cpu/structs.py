"""The C structs that Python fills, with the fields of csrc. ``native`` compares the layouts."""

import ctypes

_P, _N, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class LoraTargetStruct(ctypes.Structure):
    """``LoraTarget`` of lora.h."""

    _fields_ = (
        *((name, _P) for name in ("storage", "ranks", "a_pages", "b_pages", "scale", "bias")),
        ("out_features", _P),
        *((name, _N) for name in ("in_features", "n_slices", "max_pages", "n_slots", "dtype")),
    )


class LoraSegmentsStruct(ctypes.Structure):
    """``LoraSegments`` of lora.h."""

    _fields_ = (
        *((name, _P) for name in ("slots", "indptr", "indices", "weights")),
        ("n_segments", _N),
        ("n_indices", _N),
    )


class DecoderLinearStruct(ctypes.Structure):
    """``DecoderLinear`` of decoder.h."""

    _fields_ = (("packed", _P), ("bias", _P), ("lora", _P), ("n_in", _N), ("n_out", _N))
    lora: int | None


class DecoderLayerStruct(ctypes.Structure):
    """``DecoderLayer`` of decoder.h."""

    _fields_ = (
        *((name, DecoderLinearStruct) for name in ("qkv", "out", "gate_up", "down")),
        *((name, _P) for name in ("input_norm", "mlp_norm", "keys", "values")),
        ("window", _N),
        *((name, _D) for name in ("input_eps", "mlp_eps", "scale")),
    )


class DecoderStruct(ctypes.Structure):
    """``Decoder`` of decoder.h."""

    _fields_ = (
        ("layers", _P),
        ("n_layers", _N),
        *((name, _P) for name in ("norm", "cos", "sin")),
        *((name, _N) for name in ("n_heads", "n_kv_heads", "head_dim", "page_size", "dtype")),
        ("is_int8", _N),
        ("eps", _D),
    )


class DecoderStepStruct(ctypes.Structure):
    """``DecoderStep`` of decoder.h."""

    _fields_ = (
        ("n_rows", _N),
        *((name, _P) for name in ("residual", "x", "y", "qkv", "heads", "gate_up", "act")),
        *((name, _P) for name in ("positions", "slot_mapping", "page_table")),
        ("table_stride", _N),
        ("query_starts", _P),
        ("kv_lens", _P),
        ("n_requests", _N),
        ("segments", LoraSegmentsStruct),
        ("logits_indices", _P),
        ("n_logits", _N),
        ("logits_segments", LoraSegmentsStruct),
        ("pauses", ctypes.c_char_p),
        ("mlp", _P),
    )
    segments: LoraSegmentsStruct
    logits_indices: int
    n_logits: int
    logits_segments: LoraSegmentsStruct
    pauses: bytes | None
    mlp: int


STRUCTS: tuple[type[ctypes.Structure], ...] = (
    LoraTargetStruct,
    LoraSegmentsStruct,
    DecoderLinearStruct,
    DecoderLayerStruct,
    DecoderStruct,
    DecoderStepStruct,
)


def layout_faults(
    lib: ctypes.CDLL, structs: tuple[type[ctypes.Structure], ...] = STRUCTS
) -> list[str]:
    """Return a line for each struct or field whose size or offset differs in the library."""
    known = lib.loraplex_layout
    known.argtypes, known.restype = (ctypes.c_char_p,), ctypes.c_int64
    faults = []
    for struct in structs:
        name = struct.__name__.removesuffix("Struct")
        here = {name: ctypes.sizeof(struct)}
        for field, *_ in struct._fields_:
            here[f"{name}.{field}"] = getattr(struct, field).offset
        for field_name, value in here.items():
            there = known(field_name.encode())
            if there != value:
                faults.append(f"{field_name} is {value} in Python, {there} in the library")
    return faults
