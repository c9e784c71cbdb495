// All decoder layers of a step in one call: the operators that Python would call one by one, in the
// same order, so with the same bits, and without the microseconds between two of them.
#include "layers/decoder.h"

#include "lora/lora_run.h"

#include <cstring>

namespace loraplex {
namespace {

struct Run {
    const Decoder& decoder;
    const DecoderStep& step;
    int64_t n_rows = step.n_rows;  // of those that are still computed
    const LoraSegments* segments = &step.segments;
    int failed = 0;  // the check that failed, see `SEGMENT_ERRORS` in cpu/lora.py

    void linear(const DecoderLinear& at, const void* x, void* out) {
        const LinearArgs product = {x, at.packed, at.bias, out, at.n_in, at.n_out,
                                    n_rows, at.n_out, at.n_in, nullptr};
        if (segments->n_segments > 0 && at.lora != nullptr) {
            const int result = linear_with_lora(product, *at.lora, *segments);
            if (result != 0) failed = result;
            return;
        }
        kernels().linear[decoder.dtype](product);
    }

    void norm(const void* x, void* residual, const void* weight, double eps, int64_t width) {
        kernels().norm[decoder.dtype]({x, residual, weight, step.x, n_rows, width,
                                         static_cast<float>(eps), 0.0f});
    }

    void attend(const DecoderLayer& layer) {
        const Decoder& d = decoder;
        const int64_t width = (d.n_heads + 2 * d.n_kv_heads) * d.head_dim;
        const int64_t element = element_bytes(d.dtype);
        char* v = static_cast<char*>(step.qkv) + (d.n_heads + d.n_kv_heads) * d.head_dim * element;
        kernels().rope_and_cache[d.dtype]({step.qkv, v, width, width, d.n_heads, d.n_kv_heads, d.head_dim,
                                    d.page_size, d.cos, d.sin, d.head_dim, 1, step.positions,
                                    step.slot_mapping, layer.keys, layer.values, step.n_rows,
                                    d.is_int8});
        kernels().attention[d.dtype](
            {step.qkv, layer.keys, layer.values, step.page_table, step.query_starts, step.kv_lens,
             step.heads, width, d.n_heads * d.head_dim, step.table_stride, step.n_requests,
             d.n_heads, d.n_kv_heads, d.head_dim, d.page_size, layer.window,
             static_cast<float>(layer.scale), 0.0f, d.is_int8});
    }

    // Only the last token of a chunk has a use for what follows the attention of the last layer.
    void keep() {
        const int64_t element = element_bytes(decoder.dtype);
        const int64_t heads = decoder.n_heads * decoder.head_dim * element;
        const int64_t hidden = decoder.layers[0].qkv.n_in * element;
        n_rows = step.n_logits;
        segments = &step.logits_segments;
        for (int64_t i = 0; i < n_rows; ++i) {
            move(step.heads, i, step.logits_indices[i], heads);
            move(step.residual, i, step.logits_indices[i], hidden);
        }
    }

    static void move(void* rows, int64_t to, int64_t from, int64_t n_bytes) {
        char* first = static_cast<char*>(rows);
        if (to != from) std::memcpy(first + to * n_bytes, first + from * n_bytes, n_bytes);
    }

    // x becomes the normed sum of the residual and what stands in `made`, or of the residual alone.
    void enter(int64_t i, const void* made) {
        const Decoder& d = decoder;
        const bool is_end = i == d.n_layers;
        norm(made ? made : step.residual, made ? step.residual : nullptr,
             is_end ? d.norm : d.layers[i].input_norm, is_end ? d.eps : d.layers[i].input_eps,
             d.layers[0].qkv.n_in);
    }

    int64_t layers(int64_t first) {
        const Decoder& d = decoder;
        enter(first, first == 0 ? nullptr : step.mlp);
        for (int64_t i = first; i < d.n_layers && failed == 0; ++i) {
            const DecoderLayer& layer = d.layers[i];
            linear(layer.qkv, step.x, step.qkv);
            attend(layer);
            if (step.n_logits < step.n_rows && i == d.n_layers - 1) keep();
            if (n_rows == 0) break;
            linear(layer.out, step.heads, step.y);
            norm(step.y, step.residual, layer.mlp_norm, layer.mlp_eps, layer.out.n_out);
            if (step.pauses && step.pauses[i] && failed == 0) return i;
            linear(layer.gate_up, step.x, step.gate_up);
            kernels().gate[d.dtype]({step.gate_up, step.act, n_rows, layer.down.n_in, 0});
            linear(layer.down, step.act, step.y);
            enter(i + 1, step.y);
        }
        return failed ? -failed : d.n_layers;
    }
};

}  // namespace
}  // namespace loraplex

// Runs from layer `first` on; if that is not 0, `step->mlp` holds what the MLP of the layer before
// made. Returns the layer whose MLP the caller has to run on x, or the number of layers at the end,
// or -1 times the check of the segments that failed.
LORAPLEX_API int64_t loraplex_decoder(const loraplex::Decoder* decoder,
                                      const loraplex::DecoderStep* step, int64_t first) {
    return loraplex::Run{*decoder, *step}.layers(first);
}
