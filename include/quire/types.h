// Basic vocabulary of Quire: element types, devices, tensor views, execution context, errors.
// Standard library only. Nothing here allocates device memory or touches a device.
#pragma once

#include <array>
#include <chrono>
#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <new>
#include <ranges>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "quire/export.h"

namespace quire {

// ---------------------------------------------------------------------------------------------
// Errors

// Thrown by every public function for a mistake of the caller. By then nothing has been written
// and no work has been queued (but see the rule for graphs at Plan: a capture that gets an Error is
// of no use). `what()` reads "<argument>: expected <...>, got <...>".
//
// `argument()` names the parameter, or the member of a parameter's struct, as the public header
// spells it, without the struct: "num_heads", "window_size", "query", "seq_lens", "softmax_scale".
// Members of PagedKvCache have "kv_cache." ahead, since attention has arguments of the same names:
// "kv_cache.key". An entry of an index tensor has its index behind: "block_table[3][0]". An
// environment variable goes by its own name: "QUIRE_BACKEND".
class QUIRE_API Error : public std::invalid_argument {
 public:
  Error(std::string_view argument, std::string_view expected, std::string_view got)
      : std::invalid_argument(std::string(argument) + ": expected " + std::string(expected) +
                              ", got " + std::string(got)),
        argument_(argument) {}

  const std::string& argument() const noexcept { return argument_; }

 private:
  std::string argument_;
};

// Thrown where a device has no memory left for what a call needs of it: a workspace. `what()` says
// how many bytes on which device. Nothing is lost but the call: a plan whose update() threw it
// needs another update(). Memory of the host that runs out is std::bad_alloc itself. A device that
// fails in another way, a launch or what earlier work on it left, is std::runtime_error, whose
// what() names the call or the kernel and its launch; what has been queued or written by then is
// not known.
class QUIRE_API OutOfMemory : public std::bad_alloc {
 public:
  // NOLINTNEXTLINE(bugprone-throw-keyword-missing): a member, not an exception to throw
  explicit OutOfMemory(const std::string& text) : text_(text) {}
  const char* what() const noexcept override { return text_.what(); }

 private:
  std::runtime_error text_;  // copies of an exception must not throw: those of a string may
};

// ---------------------------------------------------------------------------------------------
// Element types

enum class DType : std::uint8_t {
  kNone = 0,  // "no tensor"
  kFloat32,
  kFloat16,
  kBFloat16,
  kFloat8E4M3,  // OCP e4m3fn: no infinities, largest finite value 448
  kFloat8E5M2,  // OCP e5m2: largest finite value 57344
  kInt8,
  kUInt8,
  kInt32,
  kInt64,
  kBool,  // one byte, 0 or 1
};

constexpr std::int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kNone: return 0;
    case DType::kFloat32:
    case DType::kInt32: return 4;
    case DType::kFloat16:
    case DType::kBFloat16: return 2;
    case DType::kInt64: return 8;
    default: return 1;
  }
}

// "float16", "bfloat16", "float8_e4m3", "int32", ... ; never null.
QUIRE_API const char* to_string(DType dtype);

// ---------------------------------------------------------------------------------------------
// Devices and execution

enum class DeviceType : std::uint8_t { kCpu = 0, kCuda = 1 };

struct Device {
  DeviceType type = DeviceType::kCpu;
  int index = 0;
  friend constexpr bool operator==(const Device&, const Device&) = default;
};

QUIRE_API std::string to_string(Device device);

// A pool of worker threads that CPU kernels run on. Engines that own threads implement this over
// them; others use `default_thread_pool()`.
class QUIRE_API ThreadPool {
 public:
  virtual ~ThreadPool() = default;

  // How many calls of a task may run at the same time, the calling thread included; at least 1 and
  // the same for the pool's whole life.
  virtual int num_threads() const = 0;

  // Calls task(context, index, worker) once for each index in [0, num_tasks), on any threads in
  // any order, and returns when all have returned. `worker` is in [0, num_threads()) and no two
  // calls of this run that are under way at the same time share one. Tasks do not throw.
  // Implementations block rather than spin while they wait, unless their user asked for it.
  //
  // Calls may come from several threads, and from inside a task. One from inside a task must not
  // wait for the run which that task is part of: that would never end. Quire's pools then run it on
  // the calling thread, as worker 0 of its own run, and so do they with a call from inside a task
  // of another of Quire's pools while they are busy. Of a task that runs on a thread of somebody
  // else's they cannot know: it must not call a pool of Quire's whose run waits for it.
  using Task = void (*)(void* context, std::int64_t index, int worker);
  virtual void run(std::int64_t num_tasks, Task task, void* context) = 0;
};

// Quire's pools and fork(): threads do not survive it, so a pool starts new ones at its first run
// in the child (fewer, if the system starts no more), also where another thread was inside a run
// at the time of the fork. Destroying a pool in the child ends nothing of the parent's. In the
// child a task that forked must not return, a plan that another thread was using must not be used,
// and the process's very first call of Quire must not have been under way on another thread. CUDA
// does not survive a fork: a child of a process that used CUDA gets errors from it.

// The process-wide pool, started on first use with default_num_threads() threads. Where the system
// cannot start so many, with half of those that it could, which leaves something to the rest of
// the process; the calling thread alone is always there. Calls from several threads take turns.
QUIRE_API ThreadPool& default_thread_pool();

// What default_thread_pool() asks for: QUIRE_NUM_THREADS from the environment, or one thread for
// each CPU that this process may run on. Throws Error if QUIRE_NUM_THREADS is no number from 1 to
// 4096.
QUIRE_API int default_num_threads();

// A pool of the caller's own: num_threads - 1 threads are started, the calling thread is the last.
// Throws Error unless num_threads is 1 to 4096; std::system_error with the code
// std::errc::resource_unavailable_try_again, saying how many it could start, if the system does not
// start them all (limits of processes or of address space). None is left running then.
//
// `spin`: how long a thread that waits, for the next run or for a run's end, looks for it before it
// sleeps; 0 to 10,000 us, else Error. 0, the default, is right where other threads want the cores
// meanwhile. Waking takes 10 to 50 us: an engine whose runs follow each other faster than that, and
// which has the cores to itself, loses less by looking. `quire generate` does.
QUIRE_API std::unique_ptr<ThreadPool> make_thread_pool(int num_threads,
                                                       std::chrono::microseconds spin = {});

// Where and how a call runs. The default: the CPU, on the default thread pool.
struct Context {
  // CUDA: the cudaStream_t to queue the work on; null is the legacy default stream. CUDA calls
  // return once the work is queued. CPU calls ignore it and return when the work is done.
  void* stream = nullptr;

  // CPU: the threads to use; null means default_thread_pool(). CUDA ignores it.
  ThreadPool* threads = nullptr;

  // The backend of a call without a plan (write_kv_cache, merge_states): "" picks as
  // AttentionConfig::backend does. A call with a plan, a layer's too, runs on the plan's backend
  // and throws Error if this names another. Read during the call only.
  std::string_view backend{};

  // Look at the *data* of index tensors and of scales in memory before running, and throw
  // quire::Error naming the first offending entry. Without it wild entries are harmless (see
  // PagedKvCache) but silent. Costs a pass over these tensors on the CPU, device-to-host copies and
  // stream synchronisations on CUDA: a debugging aid. Looked at are
  //   query_start_loc, kv_start_loc   ascending offsets, inside the key tensor
  //   seq_lens                        0 to what the block table can hold, the new tokens included
  //   block_table                     a block of the cache, where some row of the sequence sees a
  //                                   key of it; other entries (behind every window, past the
  //                                   sequence's end) may hold anything
  //   slot_mapping                    negative, or a slot of the cache that no other token has
  //   kv_offset, kv_stride, q_offset  positions of keys and rows from 0 to 2^31 - 1, strides from 1
  //   cu_prefix_query_lens, prefix_kv_lens, suffix_kv_lens  what AttentionMetadata says of them
  //   Scale::data                     finite and above 0
  bool check_indices = false;
};

// ---------------------------------------------------------------------------------------------
// Tensor views

inline constexpr int kMaxDims = 6;

// The sizes or strides of a view: a braced list, or any range of integers (std::vector, std::array,
// std::span, ...). Throws Error if there are more than kMaxDims.
class QUIRE_API Sizes {
 public:
  Sizes(std::initializer_list<std::int64_t> values)
      : Sizes(std::span(values.begin(), values.size())) {}

  // Not explicit: a shape is a list of sizes.
  template <std::ranges::input_range Range>
  requires std::integral<std::ranges::range_value_t<Range>>
  // NOLINTNEXTLINE(google-explicit-constructor)
  Sizes(const Range& range) {
    for (const auto value : range) append(static_cast<std::int64_t>(value));
    check_count();
  }

  int size() const { return count_ < kMaxDims ? count_ : kMaxDims; }
  std::int64_t operator[](int dim) const { return values_[dim]; }

 private:
  void append(std::int64_t value) {
    if (count_ < kMaxDims) values_[count_] = value;
    ++count_;
  }
  void check_count() const;

  int count_ = 0;
  std::array<std::int64_t, kMaxDims> values_{};
};

// A non-owning view of a strided tensor. Strides count elements, may be zero or negative, and are
// 64-bit; `data` points at element [0, ..., 0]. A default-constructed view means "absent".
//
// TensorView is of memory that may be written, ConstTensorView of memory that is only read; the
// first converts to the second. Arguments say by their type what a call does: ConstTensorView is
// read, TensorView may be written.
template <class Data>
struct QUIRE_API BasicTensorView {
  static_assert(std::is_void_v<Data>, "use TensorView or ConstTensorView");

  Data* data = nullptr;
  DType dtype = DType::kNone;
  Device device;
  int ndim = 0;
  std::array<std::int64_t, kMaxDims> shape{};
  std::array<std::int64_t, kMaxDims> strides{};

  BasicTensorView() = default;

  // A contiguous (row-major) view.
  BasicTensorView(Data* data_, DType dtype_, const Sizes& shape_, Device device_ = {});

  // A view with strides in elements. Throws Error if the two lists differ in length.
  BasicTensorView(Data* data_, DType dtype_, const Sizes& shape_, const Sizes& strides_,
                  Device device_ = {});

  // From a view of memory that may be written to one of memory that is read.
  template <class Other>
  requires(std::is_const_v<Data>&& std::is_same_v<const Other, Data> &&
           !std::is_same_v<Other, Data>)
      BasicTensorView(const BasicTensorView<Other>& view)  // NOLINT(google-explicit-constructor)
      : data(view.data),
        dtype(view.dtype),
        device(view.device),
        ndim(view.ndim),
        shape(view.shape),
        strides(view.strides) {}

  explicit operator bool() const { return dtype != DType::kNone; }
  std::int64_t num_elements() const;
  bool is_contiguous() const;

  // The view at index `i` of dimension `dim`, with that dimension removed.
  BasicTensorView select(int dim, std::int64_t i) const;
  // The view of [begin, end) of dimension `dim`.
  BasicTensorView slice(int dim, std::int64_t begin, std::int64_t end) const;
  // The same elements with two dimensions exchanged.
  BasicTensorView transpose(int dim_a, int dim_b) const;

  // "bfloat16 [3, 8, 128] strides [1024, 128, 1] on cpu"
  std::string to_string() const;
};

using TensorView = BasicTensorView<void>;
using ConstTensorView = BasicTensorView<const void>;
extern template struct BasicTensorView<void>;
extern template struct BasicTensorView<const void>;

// ---------------------------------------------------------------------------------------------
// DLPack (https://dmlc.github.io/dlpack). The caller includes its own dlpack.h and passes its
// DLTensor: Quire needs no header and takes no ownership.

namespace detail {
// These throw Error on a type or device that the other side does not know.
QUIRE_API DType dtype_from_dlpack(int code, int bits, int lanes);
QUIRE_API std::pair<int, int> dtype_to_dlpack(DType dtype);  // code, bits
QUIRE_API Device device_from_dlpack(int type, int index);
constexpr int device_type_to_dlpack(DeviceType type) { return type == DeviceType::kCuda ? 2 : 1; }
}  // namespace detail

// A view of a DLTensor's memory; missing strides mean row-major, byte_offset is applied. A DLTensor
// does not say whether its memory may be written: where the DLManagedTensorVersioned around it is
// flagged DLPACK_FLAG_BITMASK_READ_ONLY, keep the result as a ConstTensorView.
template <class DlTensor>
TensorView from_dlpack(const DlTensor& tensor) {
  if (tensor.ndim < 0 || tensor.ndim > kMaxDims) {
    throw Error("tensor", "at most 6 dimensions", std::to_string(tensor.ndim));
  }
  TensorView view;
  view.dtype = detail::dtype_from_dlpack(tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes);
  view.device = detail::device_from_dlpack(static_cast<int>(tensor.device.device_type),
                                           static_cast<int>(tensor.device.device_id));
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.ndim = tensor.ndim;
  std::int64_t stride = 1;
  for (int d = tensor.ndim - 1; d >= 0; --d) {
    view.shape[d] = tensor.shape[d];
    view.strides[d] = tensor.strides != nullptr ? tensor.strides[d] : stride;
    stride *= tensor.shape[d];
  }
  return view;
}

// Fills `out` as a DLTensor over the same memory. `out->shape` and `out->strides` point into
// `view`, which must outlive it.
template <class DlTensor>
void to_dlpack(const TensorView& view, DlTensor* out) {
  const auto [code, bits] = detail::dtype_to_dlpack(view.dtype);
  out->data = view.data;
  out->byte_offset = 0;
  out->device.device_type = static_cast<decltype(out->device.device_type)>(
      detail::device_type_to_dlpack(view.device.type));
  out->device.device_id = view.device.index;
  out->dtype.code = static_cast<decltype(out->dtype.code)>(code);
  out->dtype.bits = static_cast<decltype(out->dtype.bits)>(bits);
  out->dtype.lanes = 1;
  out->ndim = view.ndim;
  out->shape = const_cast<std::int64_t*>(view.shape.data());
  out->strides = const_cast<std::int64_t*>(view.strides.data());
}

}  // namespace quire
