// Runs planned LoRA calls on torch's threads, alone or after the base's product.
#pragma once

#include "dispatch/kernel_set.h"
#include "dispatch/scratch.h"
#include "lora/lora_plan.h"

namespace loraplex {

void run_shrink(const LoraCall& call, LoraPlan& plan, const ShrinkItem& item);
void shrink_task(const LoraCall& call, LoraPlan& plan, const SegmentTask& task);

// Adds the product of a planned call to `out`.
void run_lora(const LoraCall& call, LoraPlan& plan);

// Plans a call whose rows of out are `n_rows`, and computes the base's product. The threads that compute
// it prefetch the factors of the call meanwhile.
void run_base_and_plan(const LinearArgs& base, const LoraCall& call, LoraPlan& plan, int64_t n_rows);

// The base's product into `out` and the call's on top. Returns 0, or the check that failed.
int linear_with_lora(const LinearArgs& base, const LoraTarget& target, const LoraSegments& segments);

}  // namespace loraplex
