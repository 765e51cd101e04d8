// merge_states: a plain loop over semantics/, tokens in parallel.
#include "cpu/layer_plan.h"
#include "semantics/merge_row.h"

namespace quire::cpu {
namespace {

void merge_row(const MergeParams& p, std::int64_t token, std::int32_t head) {
  const auto merged =
      semantics::merge_rows<float>(*p.a.lse_at(token, head), *p.b.lse_at(token, head));
  const void* a = p.a.row(p.dtype, token, head);
  const void* b = p.b.row(p.dtype, token, head);
  void* result = const_cast<void*>(p.result.row(p.dtype, token, head));
  for (std::int64_t i = 0; i < p.head_size_v; ++i) {
    semantics::store_element(result, p.dtype, i, merged.element(a, b, p.dtype, i));
  }
  if (p.result.lse != nullptr) {
    *const_cast<float*>(p.result.lse_at(token, head)) = merged.lse;
  }
}

}  // namespace

void run_merge(const MergeParams& p, ThreadPool& pool) {
  auto task = [&](std::int64_t token, int) {
    for (std::int32_t head = 0; head < p.num_heads; ++head) merge_row(p, token, head);
  };
  parallel_for(pool, p.num_tokens, task);
}

}  // namespace quire::cpu
