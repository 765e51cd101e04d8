// Caches, queries and outputs that pass 2^31 elements: memory is reserved, not used, so that a few
// pages far apart stand for a huge tensor.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstring>
#include <iostream>
#include <span>

#include "tests/conformance/fixture.h"

namespace quire::conformance {
namespace {

constexpr std::int64_t kFar = (std::int64_t{1} << 31) + 4096;  // elements

// Address space without memory behind it until it is touched.
class Reservation {
 public:
  explicit Reservation(std::int64_t bytes) : bytes_(static_cast<std::size_t>(bytes)) {
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  ~Reservation() {
    if (*this) munmap(data_, bytes_);
  }
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;
  explicit operator bool() const { return data_ != MAP_FAILED; }
  char* data() const { return static_cast<char*>(data_); }

 private:
  std::size_t bytes_;
  void* data_;
};

std::int64_t entry_bytes(const ConstTensorView& view) {
  std::int64_t last = 0;
  for (int d = 1; d < view.ndim; ++d) last += (view.shape[d] - 1) * view.strides[d];
  return (last + 1) * size_of(view.dtype);
}

// Moves the entries of dimension 0 apart.
TensorView spread(const ConstTensorView& view, const Reservation& to, bool copy) {
  const auto rank = static_cast<std::size_t>(view.ndim);
  TensorView wide(to.data(), view.dtype, std::span(view.shape.data(), rank),
                  std::span(view.strides.data(), rank), view.device);
  wide.strides[0] = kFar;
  const std::int64_t element = size_of(view.dtype);
  for (std::int64_t i = 0; copy && i < view.shape[0]; ++i) {
    std::memcpy(to.data() + i * kFar * element,
                static_cast<const char*>(view.data) + i * view.strides[0] * element,
                entry_bytes(view));
  }
  return wide;
}

void gather(const TensorView& wide, const TensorView& view) {
  const std::int64_t element = size_of(view.dtype);
  for (std::int64_t i = 0; i < view.shape[0]; ++i) {
    std::memcpy(static_cast<char*>(view.data) + i * view.strides[0] * element,
                static_cast<char*>(wide.data) + i * kFar * element, entry_bytes(view));
  }
}

std::int64_t reserved_bytes(const ConstTensorView& view) {
  return view.shape[0] * kFar * size_of(view.dtype);
}

class LargeStrideTest : public ConformanceTest {};

TEST_P(LargeStrideTest, IndicesAre64Bit) {
  if (backend().device_type() != DeviceType::kCpu) return;  // host memory is what this reserves
  for (const KvCacheDType dtype : {KvCacheDType::kFp8E4M3, KvCacheDType::kAuto}) {
    CaseSpec spec = small_spec({{2, 10}, {1, 7}});
    spec.config.kv_cache_dtype = dtype;
    spec.model_dtype = spec.config.dtype = DType::kBFloat16;
    spec.layout = CacheLayout::kSeparate;
    const Case c = build_case(spec);
    DeviceCase on_device(c, backend());
    AttentionArgs args = on_device.args();
    const TensorView dense_output = args.output;
    const Reservation key(reserved_bytes(args.kv_cache.key));
    const Reservation value(reserved_bytes(args.kv_cache.value));
    const Reservation query(reserved_bytes(args.query));
    const Reservation output(reserved_bytes(args.output));
    if (!key || !value || !query || !output) {
      std::cout << "this machine cannot reserve the address space: nothing to test\n";
      return;
    }
    const PagedKvCache dense = args.kv_cache;
    args.kv_cache.key = spread(dense.key, key, true);
    args.kv_cache.value = spread(dense.value, value, true);
    args.query = spread(args.query, query, true);
    args.output = spread(args.output, output, false);
    // The write lands where attention reads.
    std::memset(key.data() + kFar * size_of(dense.key.dtype), 0x7F, entry_bytes(dense.key));
    std::memset(value.data() + kFar * size_of(dense.value.dtype), 0x7F, entry_bytes(dense.value));
    Tensor slots = make_tensor(DType::kInt64, {c.spec.config.block_size});
    const Tensor rows = make_tensor(DType::kBFloat16, {c.spec.config.block_size, 2, 16});
    Rng rng(1);
    fill_normal(rows, &rng);
    for (std::int64_t i = 0; i < slots.shape[0]; ++i) {
      slots.set_int64(i, c.spec.config.block_size + i);  // block 1
    }
    DeviceBuffers& buffers = on_device.buffers();
    write_kv_cache(buffers.view(rows), buffers.view(rows), args.kv_cache, buffers.view(slots));
    write_kv_cache(buffers.view(rows), buffers.view(rows), dense, buffers.view(slots));
    const Case changed = c;
    std::memcpy(changed.key_cache.buffer->bytes.data(), dense.key.data,
                changed.key_cache.buffer->bytes.size());
    std::memcpy(changed.value_cache.buffer->bytes.data(), dense.value.data,
                changed.value_cache.buffer->bytes.size());

    Plan plan(on_device.config());
    plan.update(on_device.batch());
    attention(plan, args);
    gather(args.output, dense_output);
    Actual actual;
    actual.output = buffers.download(c.output);
    actual.lse = buffers.download(c.lse);
    EXPECT_EQ(compare(changed, actual, literal_attention(changed)), "") << to_string(dtype);
  }
}

QUIRE_ON_EVERY_BACKEND(LargeStrideTest);

}  // namespace
}  // namespace quire::conformance
