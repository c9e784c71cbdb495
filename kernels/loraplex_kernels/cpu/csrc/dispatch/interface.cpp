// Python checks here, when it loads the library, that both sides have the same structs and functions.
#include <cstddef>
#include <cstring>

#include "dispatch/cpu_features.h"
#include "layers/decoder.h"

namespace loraplex {
namespace {

// Changed by accident, a size here fails to compile; changed on purpose, change cpu/structs.py as well.
static_assert(sizeof(LoraTarget) == 12 * 8, "mirrored by cpu/structs.py");
static_assert(sizeof(LoraSegments) == 6 * 8, "mirrored by cpu/structs.py");
static_assert(sizeof(DecoderLinear) == 5 * 8, "mirrored by cpu/structs.py");
static_assert(sizeof(DecoderLayer) == (4 * 5 + 8) * 8, "mirrored by cpu/structs.py");
static_assert(sizeof(Decoder) == 12 * 8, "mirrored by cpu/structs.py");
static_assert(sizeof(DecoderStep) == (15 + 6 + 2 + 6 + 2) * 8, "mirrored by cpu/structs.py");

struct Layout {
    const char* name;
    size_t value;
};

#define STRUCT(type) {#type, sizeof(type)}
#define FIELD(type, field) {#type "." #field, offsetof(type, field)}
const Layout kLayouts[] = {
    STRUCT(LoraTarget), FIELD(LoraTarget, storage), FIELD(LoraTarget, ranks),
    FIELD(LoraTarget, a_pages), FIELD(LoraTarget, b_pages), FIELD(LoraTarget, scale),
    FIELD(LoraTarget, bias), FIELD(LoraTarget, out_features), FIELD(LoraTarget, in_features),
    FIELD(LoraTarget, n_slices), FIELD(LoraTarget, max_pages), FIELD(LoraTarget, n_slots),
    FIELD(LoraTarget, dtype),
    STRUCT(LoraSegments), FIELD(LoraSegments, slots), FIELD(LoraSegments, indptr),
    FIELD(LoraSegments, indices), FIELD(LoraSegments, weights), FIELD(LoraSegments, n_segments),
    FIELD(LoraSegments, n_indices),
    STRUCT(DecoderLinear), FIELD(DecoderLinear, packed), FIELD(DecoderLinear, bias),
    FIELD(DecoderLinear, lora), FIELD(DecoderLinear, n_in), FIELD(DecoderLinear, n_out),
    STRUCT(DecoderLayer), FIELD(DecoderLayer, qkv), FIELD(DecoderLayer, out),
    FIELD(DecoderLayer, gate_up), FIELD(DecoderLayer, down), FIELD(DecoderLayer, input_norm),
    FIELD(DecoderLayer, mlp_norm), FIELD(DecoderLayer, keys), FIELD(DecoderLayer, values),
    FIELD(DecoderLayer, window), FIELD(DecoderLayer, input_eps), FIELD(DecoderLayer, mlp_eps),
    FIELD(DecoderLayer, scale),
    STRUCT(Decoder), FIELD(Decoder, layers), FIELD(Decoder, n_layers), FIELD(Decoder, norm),
    FIELD(Decoder, cos), FIELD(Decoder, sin), FIELD(Decoder, n_heads), FIELD(Decoder, n_kv_heads),
    FIELD(Decoder, head_dim), FIELD(Decoder, page_size), FIELD(Decoder, dtype),
    FIELD(Decoder, is_int8), FIELD(Decoder, eps),
    STRUCT(DecoderStep), FIELD(DecoderStep, n_rows), FIELD(DecoderStep, residual),
    FIELD(DecoderStep, x), FIELD(DecoderStep, y), FIELD(DecoderStep, qkv), FIELD(DecoderStep, heads),
    FIELD(DecoderStep, gate_up), FIELD(DecoderStep, act), FIELD(DecoderStep, positions),
    FIELD(DecoderStep, slot_mapping), FIELD(DecoderStep, page_table),
    FIELD(DecoderStep, table_stride), FIELD(DecoderStep, query_starts), FIELD(DecoderStep, kv_lens),
    FIELD(DecoderStep, n_requests), FIELD(DecoderStep, segments), FIELD(DecoderStep, logits_indices),
    FIELD(DecoderStep, n_logits), FIELD(DecoderStep, logits_segments), FIELD(DecoderStep, pauses),
    FIELD(DecoderStep, mlp)};

}  // namespace
}  // namespace loraplex

// Version of the C functions: native.py refuses a library built from other sources.
LORAPLEX_API int loraplex_abi() { return 13; }

// The size of a struct, or the offset of a field "struct.field"; -1 if there is none.
LORAPLEX_API int64_t loraplex_layout(const char* name) {
    for (const loraplex::Layout& layout : loraplex::kLayouts)
        if (std::strcmp(layout.name, name) == 0) return static_cast<int64_t>(layout.value);
    return -1;
}
