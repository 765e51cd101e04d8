// A cache write and the attention behind it in one forward(): attention may begin while the write
// is under way (docs/design/0006), and must see all of it. Each batch fills the device. What is
// wanted is the same step as two calls with a wait between them, to the bit; before each forward()
// the slots that it writes hold NaN, so that one key read too early is seen.
#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "tests/conformance/cuda_fixture.h"

namespace quire::conformance {
namespace {

constexpr std::int64_t kBlockSize = 16;
constexpr int kRounds = 4;

struct StepSpec {
  std::vector<SequenceSpec> sequences;
  std::int64_t heads = 32;
  std::int64_t kv_heads = 8;
  std::int64_t size = 128;
  std::int64_t window = 0;
  KvCacheDType cache = KvCacheDType::kAuto;
  // Each sequence's first blocks are the first sequence's, which this step writes.
  std::int64_t shared_blocks = 0;
  // A row more is written for each sequence: to its slot of key 0, by a row that is no query's.
  bool rewrites = false;
  bool odd_rows = false;  // that no wide copy fits
  bool slow = false;      // they lie in the host's memory
  bool cascade = false;   // shared blocks may be attended once for all; not in graphs
};

class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    for (void* data : all_) cudaFree(data);
    for (void* data : on_host_) cudaFreeHost(data);
  }
  void* allocate(std::size_t bytes) {
    void* data = nullptr;
    check(cudaMalloc(&data, bytes));
    all_.push_back(data);
    return data;
  }
  template <class T>
  T* upload(const std::vector<T>& values, bool to_host = false) {
    void* data = nullptr;
    if (to_host) {
      check(cudaMallocHost(&data, values.size() * sizeof(T)));
      on_host_.push_back(data);
      std::memcpy(data, values.data(), values.size() * sizeof(T));
      return static_cast<T*>(data);
    }
    data = allocate(values.size() * sizeof(T));
    check(cudaMemcpy(data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    return static_cast<T*>(data);
  }

 private:
  std::vector<void*> all_;
  std::vector<void*> on_host_;
};

constexpr Device kGpu{DeviceType::kCuda, 0};

// One layer's step on the device.
class Step {
 public:
  explicit Step(const StepSpec& spec) : spec_(spec) {
    config_.device = kGpu;
    config_.dtype = DType::kBFloat16;
    config_.num_heads = spec.heads;
    config_.num_kv_heads = spec.kv_heads;
    config_.head_size = spec.size;
    config_.block_size = kBlockSize;
    config_.kv_cache_dtype = spec.cache;
    config_.auto_cascade = spec.cascade;
    if (spec.window > 0) config_.mask = Mask::sliding_window(spec.window);
    make_batch();
    make_cache();
    query_ = TensorView(random(tokens_ * spec.heads * spec.size, 0), DType::kBFloat16,
                        {tokens_, spec.heads, spec.size}, kGpu);
    output_ = TensorView(memory_.allocate(static_cast<std::size_t>(output_bytes())),
                         DType::kBFloat16, {tokens_, spec.heads, spec.size}, kGpu);
    for (TensorView* fresh : {&key_, &value_}) *fresh = rows(fresh == &key_ ? 1 : 2);
    std::vector<std::uint16_t> nan(static_cast<std::size_t>(rows_ * row_pitch() + 1), 0x7FC0);
    nan_ = rows_at(memory_.upload(nan));
    fill();
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    ctx_.stream = stream_;
    check(cudaDeviceSynchronize());
  }
  ~Step() { cudaStreamDestroy(stream_); }
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;

  void expect_same() {
    AttentionMetadataBuilder builder(config_);
    const AttentionImpl layer(config_);
    AttentionMetadata metadata = builder.build(0, batch_, false, ctx_);
    const auto attend = [&] {
      layer.forward({}, query_, {}, {}, cache_, &metadata, output_, std::nullopt, {}, {}, ctx_);
    };
    const auto forward = [&] {
      layer.forward({}, query_, key_, value_, cache_, &metadata, output_, std::nullopt, {}, {},
                    ctx_);
    };
    // In a graph these are like one.
    const auto two_calls = [&] {
      layer.do_kv_cache_update({}, key_, value_, cache_, batch_.slot_mapping, ctx_);
      attend();
    };
    expect_same("eager", attend, forward);
    if (spec_.cascade) return;
    metadata = builder.build_for_cudagraph_capture(batch_, ctx_);
    forward();
    const Call attend_in_graph = captured(attend, 0);
    expect_same("graph", attend_in_graph, captured(forward, 1));
    expect_same("graph of two calls", attend_in_graph, captured(two_calls, 1));
  }

 private:
  // Elements from one token to the next.
  std::int64_t row_pitch() const { return spec_.kv_heads * spec_.size + (spec_.odd_rows ? 1 : 0); }
  std::int64_t output_bytes() const { return tokens_ * spec_.heads * spec_.size * 2; }

  // bf16 from -2 to 2.
  std::uint16_t* random(std::int64_t count, std::uint32_t seed, bool to_host = false) {
    std::vector<std::uint16_t> values(static_cast<std::size_t>(count));
    std::uint32_t state = seed * 77 + 1;
    for (std::uint16_t& value : values) {
      state = state * 1664525U + 1013904223U;
      const float x = static_cast<float>(state >> 8U) * 0x1p-22F - 2.0F;
      std::uint32_t bits = 0;
      std::memcpy(&bits, &x, 4);
      value = static_cast<std::uint16_t>(bits >> 16U);
    }
    return memory_.upload(values, to_host);
  }
  TensorView rows(std::uint32_t seed) {
    return rows_at(random(rows_ * row_pitch() + 1, seed, spec_.slow));
  }
  TensorView rows_at(std::uint16_t* data) const {
    return TensorView(data + (spec_.odd_rows ? 1 : 0), DType::kBFloat16,
                      {rows_, spec_.kv_heads, spec_.size}, {row_pitch(), spec_.size, 1}, kGpu);
  }

  void make_batch() {
    std::vector<std::int32_t> starts{0};
    std::vector<std::int32_t> lens;
    std::int64_t width = 1;
    for (const SequenceSpec& s : spec_.sequences) {
      starts.push_back(starts.back() + static_cast<std::int32_t>(s.query_len));
      lens.push_back(static_cast<std::int32_t>(s.seq_len));
      width = std::max(width, (s.seq_len + kBlockSize - 1) / kBlockSize);
    }
    const auto num_seqs = static_cast<std::int64_t>(lens.size());
    tokens_ = starts.back();
    rows_ = tokens_ + (spec_.rewrites ? num_seqs : 0);
    blocks_ = num_seqs * width;
    std::vector<std::int32_t> table(static_cast<std::size_t>(blocks_));
    std::vector<std::int64_t> slots;
    for (std::int64_t s = 0; s < num_seqs; ++s) {
      for (std::int64_t i = 0; i < width; ++i) {
        // Scattered: 7919 is a prime.
        const std::int64_t own = i < spec_.shared_blocks ? i : s * width + i;
        table[static_cast<std::size_t>(s * width + i)] =
            static_cast<std::int32_t>(own * 7919 % blocks_);
      }
    }
    const auto slot_of = [&](std::int64_t s, std::int64_t position) {
      return table[static_cast<std::size_t>(s * width + position / kBlockSize)] * kBlockSize +
             position % kBlockSize;
    };
    for (std::int64_t s = 0; s < num_seqs; ++s) {
      const SequenceSpec& sequence = spec_.sequences[static_cast<std::size_t>(s)];
      for (std::int64_t i = sequence.seq_len - sequence.query_len; i < sequence.seq_len; ++i) {
        slots.push_back(slot_of(s, i));
      }
    }
    for (std::int64_t s = 0; spec_.rewrites && s < num_seqs; ++s) slots.push_back(slot_of(s, 0));
    batch_.query_start_loc =
        TensorView(memory_.upload(starts), DType::kInt32, {num_seqs + 1}, kGpu);
    batch_.seq_lens = TensorView(memory_.upload(lens), DType::kInt32, {num_seqs}, kGpu);
    batch_.block_table = TensorView(memory_.upload(table), DType::kInt32, {num_seqs, width}, kGpu);
    batch_.slot_mapping = TensorView(memory_.upload(slots), DType::kInt64, {rows_}, kGpu);
    batch_.num_actual_tokens = tokens_;
    for (const SequenceSpec& s : spec_.sequences) {
      batch_.max_query_len = std::max(batch_.max_query_len, s.query_len);
    }
  }

  void make_cache() {
    const DType storage = storage_dtype(spec_.cache, DType::kBFloat16);
    const std::int64_t rows = blocks_ * 2 * kBlockSize * spec_.kv_heads;
    void* data = memory_.allocate(static_cast<std::size_t>(rows * spec_.size * size_of(storage)));
    cache_ = PagedKvCache::from_combined(
        TensorView(data, storage, {blocks_, 2, kBlockSize, spec_.kv_heads, spec_.size}, kGpu),
        spec_.cache);
    if (!is_per_token_head(spec_.cache)) return;
    for (TensorView* scales : {&cache_.k_scale_cache, &cache_.v_scale_cache}) {
      *scales = TensorView(memory_.allocate(static_cast<std::size_t>(rows / 2 * 4)),
                           DType::kFloat32, {blocks_, kBlockSize, spec_.kv_heads}, kGpu);
    }
  }

  // Every slot of the cache.
  void fill() {
    std::vector<std::int64_t> slots(static_cast<std::size_t>(blocks_ * kBlockSize));
    for (std::size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<std::int64_t>(i);
    const std::int64_t count = blocks_ * kBlockSize;
    const std::int64_t at_once = std::min<std::int64_t>(count, 4096);
    const TensorView all(memory_.upload(slots), DType::kInt64, {count}, kGpu);
    const TensorView some(random(at_once * spec_.kv_heads * spec_.size, 3), DType::kBFloat16,
                          {at_once, spec_.kv_heads, spec_.size}, kGpu);
    for (std::int64_t first = 0; first < count; first += at_once) {
      const std::int64_t end = std::min(count, first + at_once);
      write_kv_cache(some.slice(0, 0, end - first), some.slice(0, 0, end - first), cache_,
                     all.slice(0, first, end));
    }
  }

  // The slots that the step writes hold NaN, and so does the output.
  void poison() {
    write_kv_cache(nan_, nan_, cache_, batch_.slot_mapping, ctx_);
    check(cudaMemsetAsync(output_.data, 0xFF, static_cast<std::size_t>(output_bytes()), stream_));
    check(cudaStreamSynchronize(stream_));
  }
  std::vector<char> output() const {
    check(cudaStreamSynchronize(stream_));
    std::vector<char> bytes(static_cast<std::size_t>(output_bytes()));
    check(cudaMemcpy(bytes.data(), output_.data, bytes.size(), cudaMemcpyDeviceToHost));
    return bytes;
  }

  using Call = std::function<void()>;

  // `early`: how many of its launches may begin before the one before them has ended, on Hopper.
  Call captured(const Call& call, int early) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    call();
    check(cudaStreamEndCapture(stream_, &graph));
    if (device_major() == 9) expect_early(graph, early);
    check(cudaGraphInstantiate(&executable, graph, 0));
    cudaGraphDestroy(graph);
    graphs_.emplace_back(executable, cudaGraphExecDestroy);
    return [this, executable] { check(cudaGraphLaunch(executable, stream_)); };
  }

  static int device_major() {
    int major = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    return major;
  }
  static void expect_early(cudaGraph_t graph, int early) {
#if CUDART_VERSION >= 13000
    std::size_t count = 0;
    check(cudaGraphGetEdges(graph, nullptr, nullptr, nullptr, &count));
    std::vector<cudaGraphNode_t> from(count);
    std::vector<cudaGraphNode_t> to(count);
    std::vector<cudaGraphEdgeData> edges(count);
    check(cudaGraphGetEdges(graph, from.data(), to.data(), edges.data(), &count));
    EXPECT_EQ(std::count_if(edges.begin(), edges.end(),
                            [](const cudaGraphEdgeData& edge) {
                              return edge.type == cudaGraphDependencyTypeProgrammatic;
                            }),
              early);
#endif
  }

  void expect_same(const char* how, const Call& attend, const Call& forward) {
    poison();
    write_kv_cache(key_, value_, cache_, batch_.slot_mapping, ctx_);
    check(cudaStreamSynchronize(stream_));
    attend();
    const std::vector<char> wanted = output();
    for (int round = 0; round < kRounds; ++round) {
      poison();
      forward();
      expect_equal(wanted, output(), std::string(how) + ", round " + std::to_string(round));
    }
  }

  void expect_equal(const std::vector<char>& wanted, const std::vector<char>& got,
                    const std::string& where) const {
    const auto* is = reinterpret_cast<const std::uint16_t*>(got.data());
    const auto* was = reinterpret_cast<const std::uint16_t*>(wanted.data());
    std::int64_t nan = 0;
    std::int64_t other = 0;
    for (std::int64_t i = 0; i < output_bytes() / 2; ++i) {
      nan += (is[i] & 0x7FFFU) > 0x7F80U ? 1 : 0;
      other += is[i] != was[i] ? 1 : 0;
    }
    EXPECT_TRUE(nan == 0 && other == 0) << where << ": of " << output_bytes() / 2 << " elements "
                                        << nan << " are NaN and " << other << " differ";
  }

  const StepSpec spec_;
  Memory memory_;
  AttentionConfig config_;
  CommonAttentionMetadata batch_;
  std::int64_t tokens_ = 0;
  std::int64_t rows_ = 0;  // that are written
  std::int64_t blocks_ = 0;
  PagedKvCache cache_;
  TensorView query_, key_, value_, nan_, output_;
  std::vector<std::shared_ptr<CUgraphExec_st>> graphs_;
  cudaStream_t stream_ = nullptr;
  Context ctx_;
};

std::vector<SequenceSpec> equal(std::int64_t count, std::int64_t query_len, std::int64_t keys) {
  return std::vector<SequenceSpec>(static_cast<std::size_t>(count), SequenceSpec{query_len, keys});
}
std::vector<SequenceSpec> both(std::vector<SequenceSpec> a, const std::vector<SequenceSpec>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// With keys and values in the GPU's memory, then in the host's: that write is still at work when
// attention begins.
void check_step(StepSpec spec) {
  for (const bool slow : {false, true}) {
    SCOPED_TRACE(slow ? "rows come from the host" : "");
    spec.slow = slow;
    Step(spec).expect_same();
  }
}

class CudaForwardTest : public CudaTest {};

TEST_F(CudaForwardTest, Decode) {
  for (const std::int64_t keys : {1, 17, 300, 2000}) {
    SCOPED_TRACE(keys);
    check_step({equal(256, 1, keys)});
    check_step({equal(128, 4, keys + 3)});
  }
}

TEST_F(CudaForwardTest, DecodeOverOtherCaches) {
  for (const KvCacheDType cache : {KvCacheDType::kFp8E4M3PerTokenHead,
                                   KvCacheDType::kInt8PerTokenHead, KvCacheDType::kFp8E4M3}) {
    SCOPED_TRACE(to_string(cache));
    StepSpec spec{equal(256, 1, 100)};
    spec.cache = cache;
    check_step(spec);
  }
}

TEST_F(CudaForwardTest, HeadSizesAndWindows) {
  for (const std::int64_t size : {64, 256}) {
    SCOPED_TRACE(size);
    StepSpec spec{equal(256, 1, 200)};
    spec.size = size;
    check_step(spec);
    spec.sequences = equal(8, 500, 700);
    check_step(spec);
    spec.window = 128;  // at head size 64 a kernel of its own
    check_step(spec);
    spec.sequences = equal(256, 1, 400);
    check_step(spec);
  }
}

TEST_F(CudaForwardTest, Prefill) {
  check_step({equal(8, 1000, 1000)});
  check_step({equal(64, 64, 64)});
  check_step({equal(4, 200, 3000)});
}

TEST_F(CudaForwardTest, PrefillAndDecode) {
  check_step({both(equal(2, 700, 900), equal(120, 1, 500))});
  StepSpec spec{both(equal(3, 300, 300), equal(60, 1, 90))};
  spec.size = 64;
  check_step(spec);
}

TEST_F(CudaForwardTest, RowsThatAreWrittenElementByElement) {
  for (const std::int64_t query_len : {1, 5, 200}) {
    SCOPED_TRACE(query_len);
    StepSpec spec{equal(query_len > 100 ? 16 : 200, query_len, query_len + 60)};
    spec.odd_rows = true;
    check_step(spec);
  }
}

// Keys older than the sequence's own tokens may be this step's: blocks that one sequence shares with
// another that fills them in this very step, and slots written anew.
TEST_F(CudaForwardTest, OldKeysThatThisStepWrites) {
  StepSpec spec{both(equal(1, 1024, 1024), equal(130, 1, 1100))};
  spec.shared_blocks = 64;
  check_step(spec);
  spec.cascade = true;
  check_step(spec);
  spec.sequences = both(equal(1, 320, 320), equal(20, 100, 430));
  spec.shared_blocks = 20;
  check_step(spec);
  StepSpec again{equal(256, 1, 150)};
  again.rewrites = true;
  check_step(again);
}

}  // namespace
}  // namespace quire::conformance
