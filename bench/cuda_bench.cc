#include "bench/cuda_bench.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "bench/layer.h"
#include "bench/paged_batch.h"
#include "bench/random_data.h"
#include "bench/row_check.h"

namespace quire::bench {
namespace {

constexpr Device kDevice{DeviceType::kCuda, 0};

// Of a row's largest value. bf16 has steps of 0.4 %, and kernels round the weights to it as well as
// the output.
constexpr double kTolerance = 0.02;

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

class DeviceMemory {
 public:
  DeviceMemory() = default;
  explicit DeviceMemory(std::int64_t bytes) {
    check(cudaMalloc(&data_, static_cast<std::size_t>(std::max<std::int64_t>(bytes, 1))));
  }
  DeviceMemory(DeviceMemory&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~DeviceMemory() { cudaFree(data_); }
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

// One workload's layer on the device.
class CudaLayer {
 public:
  CudaLayer(const Workload& workload, const Options& options, std::int64_t num_caches)
      : workload_(workload),
        options_(options),
        announced_prefix_(options.cascade ? workload.shared_prefix : 0),
        batch_(make_paged_batch(workload, options.block_size, options.seed)),
        plan_(layer_config(workload.model, options, sinks_of(workload.model))) {
    const Model& model = workload.model;
    check(cudaStreamCreate(&stream_));
    context_.stream = stream_;
    common_ = batch_.metadata();
    for (ConstTensorView* view : {&common_.query_start_loc, &common_.seq_lens, &common_.block_table,
                                  &common_.slot_mapping}) {
      *view = uploaded(*view);
    }
    const std::int64_t tokens = std::max(batch_.num_tokens, kFillTokens);
    query_ = random({batch_.num_tokens, model.num_heads, model.head_size});
    output_ = random({batch_.num_tokens, model.num_heads, model.head_size});
    keys_.push_back(random({tokens, model.num_kv_heads, model.head_size}));
    values_.push_back(random({tokens, model.num_kv_heads, model.head_size}));
    for (std::int64_t i = 0; i < num_caches; ++i) {
      add_cache(model);
      if (i == 0) continue;
      keys_.push_back(duplicate(keys_[0]));
      values_.push_back(duplicate(values_[0]));
    }
    add_copies(write_bytes(workload, element_sizes(options)) / 2, num_caches);
    check(cudaStreamSynchronize(stream_));
  }
  ~CudaLayer() { cudaStreamDestroy(stream_); }

  void plan() { plan_.update(common_, announced_prefix_, context_); }
  void write(std::size_t call) {
    const std::size_t i = call % caches_.size();
    write_kv_cache(keys_[i], values_[i], caches_[i], common_.slot_mapping, context_);
  }
  // Moves as many bytes as write(), over as much memory in turn.
  void copy(std::size_t call) {
    const Copy& copy = copies_[call % copies_.size()];
    check(cudaMemcpyAsync(copy.to, copy.from, static_cast<std::size_t>(copy_bytes_),
                          cudaMemcpyDeviceToDevice, stream_));
  }
  void attend(std::size_t call) {
    AttentionArgs args;
    args.query = query_;
    args.kv_cache = cache(call);
    args.output = output_;
    attention(plan_, args, context_);
  }
  cudaStream_t stream() const { return stream_; }
  std::int64_t cache_bytes() const { return cache_bytes_; }
  std::int64_t workspace_bytes() const { return plan_.workspace_bytes(); }

  // Of the latest output: the caches hold the same.
  double max_error() const {
    return largest_row_error(workload_, options_, batch_, caches_[0], query_, output_,
                             [this](void* to, const void* from, std::int64_t bytes) {
                               check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes),
                                                     cudaMemcpyDeviceToHost, stream_));
                               check(cudaStreamSynchronize(stream_));
                             });
  }

 private:
  TensorView sinks_of(const Model& model) {
    if (!model.sinks) return {};
    std::vector<float> sinks(static_cast<std::size_t>(model.num_heads), kSink);
    return uploaded(TensorView(sinks.data(), DType::kFloat32, {model.num_heads}));
  }

  void* allocate(std::int64_t bytes) {
    memory_.emplace_back(bytes);
    return memory_.back().data();
  }

  TensorView uploaded(const ConstTensorView& view) {
    const std::int64_t bytes = view.num_elements() * size_of(view.dtype);
    void* data = allocate(bytes);
    check(cudaMemcpy(data, view.data, static_cast<std::size_t>(bytes), cudaMemcpyHostToDevice));
    const std::span shape(view.shape.data(), static_cast<std::size_t>(view.ndim));
    return TensorView(data, view.dtype, shape, kDevice);
  }

  TensorView random(std::initializer_list<std::int64_t> shape) {
    TensorView view(nullptr, options_.dtype, shape);
    std::vector<char> host(static_cast<std::size_t>(view.num_elements() * size_of(options_.dtype)));
    NormalSource(options_.dtype, options_.seed + memory_.size())
        .fill(host.data(), static_cast<std::size_t>(view.num_elements()));
    view.data = host.data();
    return uploaded(view);
  }

  TensorView duplicate(const TensorView& view) {
    const std::int64_t bytes = view.num_elements() * size_of(view.dtype);
    TensorView copy = view;
    copy.data = allocate(bytes);
    check(cudaMemcpy(copy.data, view.data, static_cast<std::size_t>(bytes),
                     cudaMemcpyDeviceToDevice));
    return copy;
  }

  struct Copy {
    char* from = nullptr;
    char* to = nullptr;
  };

  void add_copies(std::int64_t bytes, std::int64_t count) {
    copy_bytes_ = bytes;
    const TensorView& key = keys_[0];
    const std::int64_t key_bytes = key.num_elements() * size_of(key.dtype);
    for (std::int64_t i = 0; i < count; ++i) {
      copies_.push_back({static_cast<char*>(allocate(bytes)), static_cast<char*>(allocate(bytes))});
      for (std::int64_t begin = 0; begin < bytes;
           begin += key_bytes) {  // no zeros: they are cheaper
        check(cudaMemcpy(copies_.back().from + begin, key.data,
                         static_cast<std::size_t>(std::min(key_bytes, bytes - begin)),
                         cudaMemcpyDeviceToDevice));
      }
    }
  }

  void add_cache(const Model& model) {
    const CacheLayout layout(model, options_, batch_.num_blocks);
    cache_bytes_ = layout.data_bytes + layout.scale_bytes;
    void* data = allocate(layout.data_bytes);
    void* scales = layout.scale_bytes > 0 ? allocate(layout.scale_bytes) : nullptr;
    const PagedKvCache made = layout.view(data, scales);
    caches_.push_back(made);
    const std::int64_t num_slots = batch_.num_blocks * options_.block_size;
    std::vector<std::int64_t> slots(static_cast<std::size_t>(num_slots));
    std::iota(slots.begin(), slots.end(), 0);
    const TensorView all = uploaded(TensorView(slots.data(), DType::kInt64, {num_slots}));
    for (std::int64_t begin = 0; begin < num_slots; begin += kFillTokens) {
      write_kv_cache(keys_[0], values_[0], made,
                     all.slice(0, begin, std::min(begin + kFillTokens, num_slots)), context_);
    }
    check(cudaStreamSynchronize(stream_));
    memory_.pop_back();  // the slots
  }

  const PagedKvCache& cache(std::size_t call) const { return caches_[call % caches_.size()]; }

  const Workload& workload_;
  const Options& options_;
  std::int64_t announced_prefix_;
  std::vector<DeviceMemory> memory_;
  PagedBatch batch_;
  Context context_;
  cudaStream_t stream_ = nullptr;
  CommonAttentionMetadata common_;
  Plan plan_;
  TensorView query_, output_;
  std::vector<TensorView> keys_, values_;  // one of each a cache
  std::vector<PagedKvCache> caches_;
  std::vector<Copy> copies_;
  std::int64_t copy_bytes_ = 0;
  std::int64_t cache_bytes_ = 0;
};

// Microseconds of one call, by replays of a graph of `calls` calls of body(i).
template <class Body>
std::vector<double> time_graph(cudaStream_t stream, std::size_t calls, double min_ms,
                               int min_repeats, const Body& body) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (std::size_t i = 0; i < calls; ++i) body(i);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&executable, graph, 0));
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<double> samples;
  double total_ms = 0.0;
  for (int warm_up = 0; warm_up < 2; ++warm_up) check(cudaGraphLaunch(executable, stream));
  while (total_ms < min_ms || static_cast<int>(samples.size()) < min_repeats) {
    check(cudaEventRecord(begin, stream));
    check(cudaGraphLaunch(executable, stream));
    check(cudaEventRecord(end, stream));
    check(cudaEventSynchronize(end));
    float ms = 0.0F;
    check(cudaEventElapsedTime(&ms, begin, end));
    samples.push_back(1e3 * ms / static_cast<double>(calls));
    total_ms += ms;
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  return samples;
}

// The same for what no graph can hold: queued call by call.
template <class Body>
std::vector<double> time_queue(cudaStream_t stream, std::size_t calls, int repeats,
                               const Body& body) {
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<double> samples;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    check(cudaEventRecord(begin, stream));
    for (std::size_t i = 0; i < calls; ++i) body(i);
    check(cudaEventRecord(end, stream));
    check(cudaEventSynchronize(end));
    float ms = 0.0F;
    check(cudaEventElapsedTime(&ms, begin, end));
    samples.push_back(1e3 * ms / static_cast<double>(calls));
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return samples;
}

// Microseconds of the host alone for an eager cache write and attention call.
std::vector<double> time_host(CudaLayer* layer) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> samples;
  for (std::size_t i = 0; i < 50; ++i) {
    const auto begin = Clock::now();
    layer->write(i);
    layer->attend(i);
    samples.push_back(std::chrono::duration<double, std::micro>(Clock::now() - begin).count());
    // The launch queue must not fill up: its waiting is not the host's work.
    check(cudaStreamSynchronize(layer->stream()));
  }
  return samples;
}

}  // namespace

Result measure_cuda(const Workload& workload, const Options& options, std::int64_t num_caches) {
  CudaLayer layer(workload, options, num_caches);
  Result result;
  result.workload = workload;
  result.flops = flops(workload);
  result.bytes = bytes(workload, element_sizes(options));
  result.write_bytes = write_bytes(workload, element_sizes(options));
  result.num_caches = static_cast<int>(num_caches);
  result.cache_bytes = layer.cache_bytes();
  layer.plan();
  layer.write(0);
  layer.attend(0);
  check(cudaStreamSynchronize(layer.stream()));
  const auto calls = static_cast<std::size_t>(std::max<std::int64_t>(num_caches, 4));
  const double ms = options.min_time_ms;
  result.write_us =
      time_graph(layer.stream(), calls, 5.0, 5, [&](std::size_t i) { layer.write(i); });
  result.copy_us = time_graph(layer.stream(), calls, 5.0, 5, [&](std::size_t i) { layer.copy(i); });
  result.attention_us = time_graph(layer.stream(), calls, ms, options.min_repeats,
                                   [&](std::size_t i) { layer.attend(i); });
  if (options.num_layers > 1) {
    // Whole passes over the layers, each with a cache of its own.
    result.layer_us = time_graph(layer.stream(), static_cast<std::size_t>(num_caches), ms,
                                 options.min_repeats, [&](std::size_t i) {
                                   layer.write(i);
                                   layer.attend(i);
                                 });
  }
  result.host_us = time_host(&layer);
  // Last: from a capture on, what is planned does without cascade.
  const auto plan = [&](std::size_t) { layer.plan(); };
  result.plan_us = workload.shared_prefix > 0 && options.cascade
                       ? time_queue(layer.stream(), 8, 5, plan)
                       : time_graph(layer.stream(), 8, 1.0, 5, plan);
  result.workspace_bytes = layer.workspace_bytes();
  result.max_error = layer.max_error();
  if (result.max_error > kTolerance) {
    throw std::runtime_error(workload.name + ": the output is wrong, off by " +
                             std::to_string(result.max_error) + " of a row's largest value");
  }
  return result;
}

}  // namespace quire::bench
