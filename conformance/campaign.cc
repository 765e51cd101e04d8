#include "conformance/campaign.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <limits>
#include <stdexcept>
#include <thread>

#include "conformance/runner.h"
#include "conformance/sampled.h"
#include "conformance/subset.h"

namespace quire::conformance {
namespace {

// What goes wrong is thrown from wherever it is found.
void expect(const std::string& problem, const std::string& where = {}) {
  if (problem.empty()) return;
  throw std::runtime_error(where.empty() ? problem : where + ": " + problem);
}

bool is_gpu(const AttentionBackend& backend) { return backend.device_type() == DeviceType::kCuda; }

// On CUDA a warp writes a token's row of one head, K and V apart: in which order is nobody's
// promise.
SharedSlot promise_of(const AttentionBackend& backend) {
  return is_gpu(backend) ? SharedSlot::kAnything : SharedSlot::kLastWins;
}

// The step's cache write on the device, and the case's own cache as it is afterwards.
void write_and_adopt(Case* c, DeviceCase* on_device, const AttentionBackend& backend, Rng* rng) {
  DeviceBuffers& buffers = on_device->buffers();
  write_kv_cache(buffers.view(c->key), buffers.view(c->value), on_device->cache(),
                 buffers.view(c->slot_mapping), on_device->context());
  memory_of(backend.device_type()).synchronize();
  std::vector<std::vector<std::byte>> after;
  for (const Tensor* view : cache_buffers(*c)) after.push_back(buffers.download(*view));
  expect(adopt_written(c, after, promise_of(backend), rng));
  expect(buffers.damage({}), "write_kv_cache");
}

// Runs the plan again `repeats` times: equal bits.
void expect_repeats(DeviceCase* on_device, const Plan& plan, const Context& ctx,
                    const Actual& wanted, int repeats) {
  for (int i = 0; i < repeats; ++i) {
    on_device->poison_outputs();
    attention(plan, on_device->args(), ctx);
    if (on_device->outputs() != wanted) expect("the same call gave other bits the next time");
  }
}

// Write, attention, samples, scan, repeats. Leaves the case's cache as the write made it.
Actual expect_right(Case* c, const AttentionBackend& backend, int repeats, Rng* rng) {
  DeviceCase on_device(*c, backend);
  if (c->spec.has_cache() && c->spec.write) write_and_adopt(c, &on_device, backend, rng);
  const Actual actual = on_device.attend();
  expect(on_device.damage(), "attention");
  expect(check_sampled(*c, actual, rng));
  if (repeats > 0) {
    Plan plan(on_device.config());
    plan.update(on_device.batch(), c->spec.announced_prefix_len, on_device.context());
    expect_repeats(&on_device, plan, on_device.context(), actual, repeats);
  }
  return actual;
}

int repeats_of(const AttentionBackend& backend, const CaseSpec& spec) {
  return is_gpu(backend) ? 2 : (spec.repeat ? 1 : 0);
}

// A value that no batch holds, or one that is only a little wrong.
template <class T>
T garbage(std::int64_t about, Rng* rng) {
  constexpr T kMin = std::numeric_limits<T>::min();
  constexpr T kMax = std::numeric_limits<T>::max();
  switch (rng->uniform(0, 3)) {
    case 0: return rng->pick<T>({kMin, kMax, -1, 0, kMin / 2, kMax / 2, kMin + 1, kMax - 1});
    case 1: return static_cast<T>(rng->next());
    default: return static_cast<T>(about + rng->uniform(-9, 9));
  }
}

void scatter_garbage(const Tensor& tensor, Rng* rng) {
  if (!tensor || tensor.dtype != DType::kInt32) return;
  Sizes offsets;
  if (tensor.num_elements() == 0) return;
  const double share = rng->pick({0.02, 0.2, 1.0});
  std::byte* bytes = tensor.buffer->bytes.data();
  tensor.for_each_element([&](std::int64_t offset) {
    if (!rng->chance(share)) return;
    std::int32_t value = 0;
    std::memcpy(&value, bytes + offset, sizeof value);
    value = garbage<std::int32_t>(value, rng);
    std::memcpy(bytes + offset, &value, sizeof value);
  });
}

std::string first_values(const char* name, const Tensor& tensor) {
  if (!tensor) return {};
  std::string text = std::string(" ") + name + "=[";
  for (std::int64_t i = 0; i < std::min<std::int64_t>(tensor.shape[0], 12); ++i) {
    text += (i > 0 ? " " : "") + std::to_string(static_cast<std::int64_t>(tensor.get({i})));
  }
  return text + "]";
}

void run_plain(Case* c, const AttentionBackend& backend, Rng* rng) {
  expect_right(c, backend, repeats_of(backend, c->spec), rng);
}

// Some sequences alone, in other company, at other places, with padding.
void run_invariant(Case* c, const AttentionBackend& backend, Rng* rng) {
  const Actual together = expect_right(c, backend, repeats_of(backend, c->spec), rng);
  const auto count = static_cast<std::int64_t>(c->spec.sequences.size());
  if (count == 0) return;
  for (int round = 0; round < 2; ++round) {
    std::vector<std::int64_t> chosen{round == 0 ? count - 1 : rng->uniform(0, count - 1)};
    const std::int64_t others = round == 0 ? 0 : rng->uniform(0, std::min<std::int64_t>(count, 9));
    for (std::int64_t i = 0; i < others; ++i) {
      const std::int64_t other = rng->uniform(0, count - 1);
      if (std::find(chosen.begin(), chosen.end(), other) == chosen.end()) chosen.push_back(other);
    }
    rng->shuffle(&chosen);
    SubsetPadding padding;
    padding.sequences = rng->uniform(0, 3);
    padding.rows = rng->uniform(0, 5);
    padding.counted_rows = rng->uniform(0, padding.rows);
    padding.leading_rows = rng->chance(0.2) ? rng->uniform(1, 4) : 0;
    Case subset = subset_of(*c, chosen, padding);
    subset.spec.threads = rng->pick({0, 1, 2, 3});
    DeviceCase on_device(subset, backend);
    expect(same_rows(*c, together, subset, on_device.attend(), chosen), "in other company");
    expect(on_device.damage(), "attention");
  }
}

// Shared prefixes read once, against float64, and against plain attention in every element.
void run_cascade(Case* c, const AttentionBackend& backend, Rng* rng) {
  const Actual shared = expect_right(c, backend, repeats_of(backend, c->spec), rng);
  Case plain = *c;
  plain.spec.announced_prefix_len = 0;
  plain.spec.config.auto_cascade = false;
  DeviceCase on_device(plain, backend);
  expect(compare_elements(*c, shared, on_device.attend()), "with and without cascade");
}

// A graph, or where there is none the plan, serves other compositions of the batch too.
void run_graph(Case* c, const AttentionBackend& backend, Rng* rng) {
  DeviceMemory& memory = memory_of(backend.device_type());
  DeviceCase on_device(*c, backend);
  if (c->spec.write) write_and_adopt(c, &on_device, backend, rng);
  Plan plan(on_device.config());
  const auto work = [&](const Context& ctx) {
    plan.update(on_device.batch(), 0, ctx);
    attention(plan, on_device.args(), ctx);
  };
  on_device.poison_outputs();
  const std::function<void()> graph = memory.record(work);
  for (int round = 0; round < 3; ++round) {
    Case now = round == 0 ? *c : shuffled(*c, rng);
    now.spec.announced_prefix_len = 0;
    for (const auto& [to, from] : batch_tensors(*c, now)) {
      on_device.buffers().view(*to);
      on_device.buffers().store(*to, from->buffer->bytes);
    }
    on_device.poison_outputs();
    if (graph) {
      graph();
    } else {
      work(on_device.context());
    }
    expect(check_sampled(now, on_device.outputs(), rng), "batch " + std::to_string(round));
  }
  for (const auto& [to, from] : batch_tensors(*c, *c)) on_device.buffers().restore(*to);
  expect(on_device.damage(), "attention");
}

// A case with a plan, a stream and a thread pool of its own.
struct Job {
  Job(Case* c, const AttentionBackend& backend)
      : memory(memory_of(backend.device_type())), on_device(*c, backend), plan(on_device.config()) {
    ctx = on_device.context();
    ctx.stream = memory.make_stream();
    announced = c->spec.announced_prefix_len;
  }
  ~Job() { memory.release_stream(ctx.stream); }
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  void launch() {
    plan.update(on_device.batch(), announced, ctx);
    attention(plan, on_device.args(), ctx);
  }

  DeviceMemory& memory;
  DeviceCase on_device;
  Plan plan;
  Context ctx;
  std::int64_t announced = 0;
};

// Two plans at the same time: on two streams of one thread, or from two threads.
void run_streams(Case* c, Case* other, const AttentionBackend& backend, Rng* rng) {
  expect_right(c, backend, 0, rng);
  try {
    expect_right(other, backend, 0, rng);
  } catch (const std::exception& error) {
    expect(error.what(), "the other batch, " + describe(other->spec));
  }
  Job a(c, backend);
  Job b(other, backend);
  std::vector<Actual> alone;
  for (Job* job : {&a, &b}) {
    job->on_device.poison_outputs();
    job->memory.synchronize();
    job->launch();
    alone.push_back(job->on_device.outputs());
    job->on_device.poison_outputs();
  }
  a.memory.synchronize();
  const auto rounds = [](Job* job) {
    for (int i = 0; i < 3; ++i) job->launch();
  };
  if (is_gpu(backend) && rng->chance(0.5)) {
    for (int i = 0; i < 3; ++i) {
      a.launch();
      b.launch();
    }
  } else {
    std::thread thread([&] { rounds(&b); });
    rounds(&a);
    thread.join();
  }
  if (a.on_device.outputs() != alone[0]) expect("beside another plan: other bits than alone");
  if (b.on_device.outputs() != alone[1]) expect("beside another plan: other bits than alone");
  expect(a.on_device.damage(), "attention");
  expect(b.on_device.damage(), "attention");
}

// As many tokens as there are rows, at random slots, a few of them twice or nowhere.
void run_write(Case* c, const AttentionBackend& backend, Rng* rng) {
  if (!c->spec.write) return run_plain(c, backend, rng);
  const std::int64_t slots = c->key_cache.shape[0] * c->spec.config.block_size;
  std::vector<std::int64_t> order(slots);
  for (std::int64_t slot = 0; slot < slots; ++slot) order[slot] = slot;
  rng->shuffle(&order);
  // Some slots of few: nearly every token has company.
  const std::int64_t few = rng->chance(0.2) ? rng->uniform(1, std::min<std::int64_t>(slots, 9)) : 0;
  const double twice = rng->pick({0.0, 0.0, 0.1});
  const std::int64_t rows = c->slot_mapping.shape[0];
  const std::int64_t real = rows - c->spec.padded_rows;  // others hold poison
  for (std::int64_t row = 0; row < rows; ++row) {
    std::int64_t slot = row < slots ? order[row] : -1;
    if (row > 0 && rng->chance(twice)) slot = order[rng->uniform(0, std::min(row, slots) - 1)];
    if (few > 0) slot = order[rng->uniform(0, few - 1)];
    if (row < c->spec.leading_rows || row >= real) slot = -1;
    if (rng->chance(0.05))
      slot = rng->pick<std::int64_t>({-1, slots, slots + 1, INT64_MIN, INT64_MAX});
    c->slot_mapping.set_int64(row, slot);
  }
  DeviceCase on_device(*c, backend);
  write_and_adopt(c, &on_device, backend, rng);
}

// Garbage in every index tensor: no crash, and nothing outside the rows of the output. The CPU
// takes it as the reference does (docs/design/0003), so small cases are compared too; on CUDA two
// sequences that claim one row both write it.
void run_wild(Case* c, const AttentionBackend& backend, Size size, Rng* rng) {
  for (const Tensor* tensor :
       {&c->block_table, &c->query_start_loc, &c->seq_lens, &c->kv_start_loc, &c->mm_prefix_range,
        &c->visible_prefix_lens, &c->kv_offset, &c->kv_stride, &c->q_offset}) {
    if (rng->chance(0.6)) scatter_garbage(*tensor, rng);
  }
  const std::int64_t announced = rng->chance(0.3) ? rng->uniform(0, 5000) : 0;
  c->spec.announced_prefix_len = c->spec.has_cache() ? announced : 0;  // without one it is refused
  c->spec.replan = false;
  DeviceCase on_device(*c, backend);
  const Actual actual = on_device.attend();
  expect(on_device.damage(), "attention");
  std::vector<bool> may_be_written(c->spec.num_rows(), false);
  for (std::int64_t row = 0; row < c->spec.num_actual_tokens(); ++row) may_be_written[row] = true;
  expect(compare_untouched(*c, actual, may_be_written));
  if (size == Size::kLarge || std::string(backend.name()) != "cpu") return;
  DeviceCase by_reference(*c, attention_backend("reference"));
  expect(compare_elements(*c, actual, by_reference.attend()),
         "here and by reference, with" + first_values("query_start_loc", c->query_start_loc) +
             first_values("seq_lens", c->seq_lens) + first_values("kv_start_loc", c->kv_start_loc));
}

void run_mode(const CampaignCase& which, Case* c, const AttentionBackend& backend, Rng* rng) {
  switch (which.mode) {
    case Mode::kPlain: return run_plain(c, backend, rng);
    case Mode::kInvariant: return run_invariant(c, backend, rng);
    case Mode::kCascade: return run_cascade(c, backend, rng);
    case Mode::kGraph: return run_graph(c, backend, rng);
    case Mode::kStreams: {
      CampaignCase second = which;
      second.seed ^= 0x5EC04DU;
      Case other = build_case(campaign_spec(second, backend));
      return run_streams(c, &other, backend, rng);
    }
    case Mode::kWrite: return run_write(c, backend, rng);
    case Mode::kWild: return run_wild(c, backend, which.size, rng);
  }
}

}  // namespace

const char* to_string(Mode mode) {
  const char* const names[] = {"plain",   "invariant", "cascade", "graph",
                               "streams", "write",     "wild"};
  return names[static_cast<int>(mode)];
}

const char* to_string(Size size) { return size == Size::kSmall ? "small" : "large"; }

CampaignCase draw_campaign_case(std::uint64_t seed, std::int64_t index, int large_share) {
  Rng rng(seed ^ 0xCA3FA16AU, static_cast<std::uint64_t>(index));
  CampaignCase drawn;
  drawn.seed = seed;
  drawn.index = index;
  if (rng.uniform(0, 99) < large_share) {
    drawn.size = Size::kLarge;
    drawn.mode = rng.pick({Mode::kPlain, Mode::kPlain, Mode::kPlain, Mode::kInvariant,
                           Mode::kInvariant, Mode::kCascade, Mode::kCascade, Mode::kGraph,
                           Mode::kStreams, Mode::kWrite, Mode::kWild});
  } else if (rng.chance(0.1)) {
    drawn.mode = rng.pick({Mode::kInvariant, Mode::kCascade, Mode::kGraph, Mode::kStreams,
                           Mode::kWrite, Mode::kWild});
  }
  return drawn;
}

std::string run_campaign_case(const CampaignCase& which, const AttentionBackend& backend) {
  CaseSpec spec;
  std::string problem;
  try {
    spec = campaign_spec(which, backend);
    if (which.mode == Mode::kPlain && which.size == Size::kSmall) {
      problem = run_case(build_case(spec), backend);
    } else {
      Case c = build_case(spec);
      Rng rng(which.seed ^ 0x0DDC0DEU, static_cast<std::uint64_t>(which.index));
      run_mode(which, &c, backend, &rng);
    }
  } catch (const std::exception& error) {
    problem = error.what();
  }
  if (problem.empty()) return {};
  return problem + "\n  " + describe(spec) + "\n  quire verify --device " + backend.name() +
         (is_gpu(backend) ? "" : " --isa " + backend.instruction_set()) + " --mode " +
         to_string(which.mode) + " --size " + to_string(which.size) + " --seed " +
         std::to_string(which.seed) + " --case " + std::to_string(which.index);
}

std::string run_sampled(Case c, const AttentionBackend& backend, int repeats) {
  try {
    Rng rng(c.spec.seed);
    expect_right(&c, backend, repeats, &rng);
    return {};
  } catch (const std::exception& error) {
    return error.what();
  }
}

}  // namespace quire::conformance
