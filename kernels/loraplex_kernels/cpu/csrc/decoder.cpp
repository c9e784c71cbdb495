// All decoder layers of a step in one call: the operators that Python would call one by one, in the
// same order, so with the same bits, and without the microseconds between two of them.
#include "decoder.h"

#include "model_ops.h"

namespace loraplex {
namespace {

struct Run {
    const Decoder& decoder;
    const DecoderStep& step;
    int failed = 0;  // the check that failed, see `SEGMENT_ERRORS` in cpu/lora.py

    void linear(const DecoderLinear& at, const void* x, void* out) {
        if (step.n_segments > 0 && at.lora != nullptr) {
            const int result = loraplex_adapted_linear(
                at.lora, at.packed, at.bias, x, at.n_in, out, at.n_out, step.n_rows, step.entries,
                step.starts, step.rows, step.weights, step.n_segments);
            if (result != 0) failed = result;
            return;
        }
        model_ops().linear[decoder.dtype]({x, at.packed, at.bias, out, at.n_in, at.n_out,
                                           step.n_rows, at.n_out, at.n_in, nullptr});
    }

    void norm(const void* x, void* residual, const void* weight, double eps, int64_t width) {
        model_ops().norm[decoder.dtype]({x, residual, weight, step.x, step.n_rows, width,
                                         static_cast<float>(eps), 0.0f});
    }

    void attend(const DecoderLayer& layer) {
        const Decoder& d = decoder;
        const int64_t width = (d.n_heads + 2 * d.n_kv_heads) * d.head_dim;
        const int64_t element = d.dtype == kBFloat16 ? 2 : 4;
        char* v = static_cast<char*>(step.qkv) + (d.n_heads + d.n_kv_heads) * d.head_dim * element;
        model_ops().cache[d.dtype]({step.qkv, v, width, width, d.n_heads, d.n_kv_heads, d.head_dim,
                                    d.page_size, d.cos, d.sin, d.head_dim, 1, step.positions,
                                    step.slots, layer.keys, layer.values, step.n_rows});
        model_ops().attention[d.dtype](
            {step.qkv, layer.keys, layer.values, step.page_table, step.query_starts, step.kv_lens,
             step.heads, width, d.n_heads * d.head_dim, step.table_stride, step.n_requests,
             d.n_heads, d.n_kv_heads, d.head_dim, d.page_size, layer.window,
             static_cast<float>(layer.scale), 0.0f});
    }

    int layers() {
        const Decoder& d = decoder;
        const int64_t hidden = d.layers[0].qkv.n_in;
        norm(step.residual, nullptr, d.layers[0].input_norm, d.layers[0].input_eps, hidden);
        for (int64_t i = 0; i < d.n_layers && failed == 0; ++i) {
            const DecoderLayer& layer = d.layers[i];
            linear(layer.qkv, step.x, step.qkv);
            attend(layer);
            linear(layer.out, step.heads, step.y);
            norm(step.y, step.residual, layer.mlp_norm, layer.mlp_eps, hidden);
            linear(layer.gate_up, step.x, step.gate_up);
            model_ops().gate[d.dtype]({step.gate_up, step.act, step.n_rows, layer.down.n_in, 0});
            linear(layer.down, step.act, step.y);
            const bool is_last = i + 1 == d.n_layers;
            norm(step.y, step.residual, is_last ? d.norm : d.layers[i + 1].input_norm,
                 is_last ? d.eps : d.layers[i + 1].input_eps, hidden);
        }
        return failed;
    }
};

}  // namespace
}  // namespace loraplex

// Returns 0, or which check of the segments failed.
LORAPLEX_API int loraplex_decoder(const loraplex::Decoder* decoder,
                                  const loraplex::DecoderStep* step) {
    return loraplex::Run{*decoder, *step}.layers();
}
