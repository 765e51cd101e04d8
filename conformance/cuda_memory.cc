// CUDA memory for the conformance suite. Linked by builds with QUIRE_CUDA.
#include <cuda_runtime.h>
#include <cxxabi.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "conformance/device_memory.h"

namespace quire::conformance {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

std::string demangled(const char* name) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> text(
      abi::__cxa_demangle(name, nullptr, nullptr, &status), &std::free);
  return status == 0 ? text.get() : name;
}

std::set<std::string> kernels_of(cudaGraph_t graph) {
  std::size_t count = 0;
  check(cudaGraphGetNodes(graph, nullptr, &count), "cudaGraphGetNodes");
  std::vector<cudaGraphNode_t> nodes(count);
  check(cudaGraphGetNodes(graph, nodes.data(), &count), "cudaGraphGetNodes");
  std::set<std::string> names;
  for (const cudaGraphNode_t node : nodes) {
    cudaGraphNodeType type{};
    check(cudaGraphNodeGetType(node, &type), "cudaGraphNodeGetType");
    if (type != cudaGraphNodeTypeKernel) continue;
    cudaKernelNodeParams launch{};
    check(cudaGraphKernelNodeGetParams(node, &launch), "cudaGraphKernelNodeGetParams");
    const char* name = nullptr;
    check(cudaFuncGetName(&name, launch.func), "cudaFuncGetName");
    std::string text = demangled(name);
    // One kernel each to the table of kernels, compiled for several widths or types.
    for (const char* one : {"fp32::(anonymous namespace)::attention<", "cache_write_rows<"}) {
      const std::size_t at = text.find(one);
      if (at != std::string::npos) text.resize(text.find('<', at));
    }
    names.insert(text);
  }
  return names;
}

// A recorded graph and the stream that it runs on.
struct Graph {
  explicit Graph(void* stream_) : stream(static_cast<cudaStream_t>(stream_)) {}
  ~Graph() {
    if (executable != nullptr) cudaGraphExecDestroy(executable);
    cudaStreamDestroy(stream);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  cudaStream_t stream;
  cudaGraphExec_t executable = nullptr;
};

// Buffers that were released and wait for their next use, by size. cudaMalloc and cudaFree take
// longer than a small case, and processes beside each other wait for one another's.
// QUIRE_REUSE_DEVICE_MEMORY asks for it: compute-sanitizer finds more where every buffer has its
// own end.
class SpareBuffers {
 public:
  static std::size_t rounded(std::size_t bytes) {
    return std::bit_ceil(std::max<std::size_t>(bytes, 512));
  }
  void* take(std::size_t bytes) {
    std::vector<void*>& spare = spare_[bytes];
    if (spare.empty()) return nullptr;
    void* memory = spare.back();
    spare.pop_back();
    return memory;
  }
  void lend(void* memory, std::size_t bytes) { lent_[memory] = bytes; }
  bool give_back(void* memory) {
    const auto lent = lent_.find(memory);
    if (lent == lent_.end()) return false;
    spare_[lent->second].push_back(memory);
    lent_.erase(lent);
    return true;
  }

 private:
  std::map<std::size_t, std::vector<void*>> spare_;
  std::map<void*, std::size_t> lent_;
};

class CudaMemory : public DeviceMemory {
 public:
  Device device() const override { return {DeviceType::kCuda, 0}; }
  void* allocate(std::size_t bytes) override {
    if (reuses_) bytes = SpareBuffers::rounded(bytes);
    void* memory = reuses_ ? spare_.take(bytes) : nullptr;
    if (memory == nullptr) check(cudaMalloc(&memory, bytes > 0 ? bytes : 1), "cudaMalloc");
    if (reuses_) spare_.lend(memory, bytes);
    return memory;
  }
  void release(void* memory) override {
    if (!spare_.give_back(memory)) cudaFree(memory);
  }
  void upload(void* to, const void* from, std::size_t bytes) override {
    check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "upload");
  }
  void download(void* to, const void* from, std::size_t bytes) override {
    check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "download");
  }
  void synchronize() override { check(cudaDeviceSynchronize(), "cudaDeviceSynchronize"); }

  void* make_stream() override {
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    return stream;
  }
  void release_stream(void* stream) override {
    cudaStreamDestroy(static_cast<cudaStream_t>(stream));
  }

  std::function<void()> record(const std::function<void(const Context&)>& work) override {
    auto graph = std::make_shared<Graph>(make_stream());
    Context context;
    context.stream = graph->stream;
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");  // this stream waits for no upload
    work(context);  // warms up: the capture below must not allocate
    check(cudaStreamSynchronize(graph->stream), "warm-up of a graph");
    cudaGraph_t captured = nullptr;
    check(cudaStreamBeginCapture(graph->stream, cudaStreamCaptureModeThreadLocal), "begin capture");
    try {
      work(context);
    } catch (...) {
      cudaStreamEndCapture(graph->stream, &captured);
      if (captured != nullptr) cudaGraphDestroy(captured);
      throw;
    }
    check(cudaStreamEndCapture(graph->stream, &captured), "end capture");
    check(cudaGraphInstantiate(&graph->executable, captured, 0), "cudaGraphInstantiate");
    cudaGraphDestroy(captured);
    return [graph] {
      check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
      check(cudaGraphLaunch(graph->executable, graph->stream), "cudaGraphLaunch");
      check(cudaStreamSynchronize(graph->stream), "run of a graph");
    };
  }

  std::set<std::string> launched_kernels(const std::function<void(const Context&)>& work) override {
    Context context;
    cudaStream_t stream = nullptr;
    check(cudaStreamCreate(&stream), "cudaStreamCreate");
    context.stream = stream;
    work(context);  // warms up: the capture below must not allocate
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin of a capture");
    work(context);
    check(cudaStreamEndCapture(stream, &graph), "end of a capture");
    const std::set<std::string> names = kernels_of(graph);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
    return names;
  }

 private:
  const bool reuses_ = std::getenv("QUIRE_REUSE_DEVICE_MEMORY") != nullptr;
  SpareBuffers spare_;
};

}  // namespace

std::unique_ptr<DeviceMemory> make_cuda_memory() { return std::make_unique<CudaMemory>(); }

}  // namespace quire::conformance
