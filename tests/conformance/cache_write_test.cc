// write_kv_cache(): bit-exact against the suite's own quantiser (random layouts and dtypes run in
// the random cases as well).
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "conformance/int4.h"
#include "conformance/number_format.h"
#include "conformance/random.h"
#include "tests/conformance/fixture.h"

namespace quire::conformance {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr std::int64_t kSlots = 8;  // two blocks of four

// One head of `row.size()` elements, written to slot 5 of a poisoned cache.
class Written {
 public:
  Written(DeviceType device, KvCacheDType kind, const std::vector<float>& row, float scale,
          DType model, const std::vector<std::int64_t>& slots)
      : size_(static_cast<std::int64_t>(row.size())), buffers_(&memory_of(device)) {
    const DType storage = storage_dtype(kind, model);
    const auto rows = static_cast<std::int64_t>(slots.size());
    source_ = make_tensor(model, {rows, 1, size_});
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t d = 0; d < size_; ++d) source_.set({r, 0, d}, row[d]);
    }
    Tensor slot_mapping = make_tensor(DType::kInt64, {rows});
    for (std::int64_t r = 0; r < rows; ++r) slot_mapping.set_int64(r, slots[r]);
    stored_size_ = stored_head_size(kind, size_);
    key_ = make_tensor(storage, {2, 4, 1, stored_size_});
    value_ = make_tensor(storage, {2, 4, 1, stored_size_});
    PagedKvCache cache;
    cache.dtype = kind;
    cache.key = buffers_.view(key_);
    cache.value = buffers_.view(value_);
    cache.k_scale = scale;
    cache.v_scale = scale;
    if (is_per_token_head(kind)) {
      k_scales_ = make_tensor(DType::kFloat32, {2, 4, 1});
      v_scales_ = make_tensor(DType::kFloat32, {2, 4, 1});
      cache.k_scale_cache = buffers_.view(k_scales_);
      cache.v_scale_cache = buffers_.view(v_scales_);
    }
    write_kv_cache(buffers_.view(source_), buffers_.view(source_), cache,
                   buffers_.view(slot_mapping));
    EXPECT_EQ(buffers_.damage({&key_, &value_, &k_scales_, &v_scales_}), "");
    for (Tensor* tensor : {&key_, &value_, &k_scales_, &v_scales_}) {
      if (*tensor) after_.push_back(buffers_.download(*tensor));
    }
  }

  // Elements of K at a slot, as stored (not multiplied by any scale). int4: bytes.
  std::vector<double> key(std::int64_t slot) const {
    std::vector<double> row(stored_size_);
    decode_row(key_.dtype, &after_[0][slot * stored_size_ * size_of(key_.dtype)], stored_size_,
               row.data());
    return row;
  }
  // K of an int4 cache, read back.
  std::vector<double> int4_key(std::int64_t slot) const {
    std::vector<double> row(size_);
    const std::byte* bytes = &after_[0][slot * stored_size_];
    read_int4_row(reinterpret_cast<const std::uint8_t*>(bytes), key_scale(slot), size_, row.data());
    return row;
  }
  float key_scale(std::int64_t slot) const {
    return static_cast<float>(decode(DType::kFloat32, &after_[2][slot * 4]));
  }
  // Nothing but the given slots changed, in any of the tensors.
  bool only_changed(const std::vector<std::int64_t>& slots) const {
    const Tensor* tensors[] = {&key_, &value_, &k_scales_, &v_scales_};
    for (std::size_t t = 0; t < after_.size(); ++t) {
      const std::vector<std::byte>& before = tensors[t]->buffer->bytes;
      const std::size_t row = before.size() / kSlots;
      for (std::int64_t slot = 0; slot < kSlots; ++slot) {
        const bool written = std::find(slots.begin(), slots.end(), slot) != slots.end();
        const bool same = std::memcmp(&before[slot * row], &after_[t][slot * row], row) == 0;
        if (same == written) return false;
      }
    }
    return true;
  }

 private:
  std::int64_t size_;
  std::int64_t stored_size_ = 0;
  DeviceBuffers buffers_;
  Tensor source_, key_, value_, k_scales_, v_scales_;
  std::vector<std::vector<std::byte>> after_;
};

class CacheWrite : public testing::TestWithParam<const AttentionBackend*> {
 protected:
  static Written written(KvCacheDType kind, const std::vector<float>& row, float scale = 1.0F,
                         DType model = DType::kFloat32,
                         const std::vector<std::int64_t>& slots = {5}) {
    return Written(GetParam()->device_type(), kind, row, scale, model, slots);
  }
};

TEST_P(CacheWrite, NegativeSlotsAreSkipped) {
  constexpr std::int64_t kMin = std::numeric_limits<std::int64_t>::min();
  for (const KvCacheDType kind : {KvCacheDType::kAuto, KvCacheDType::kInt8PerTokenHead}) {
    EXPECT_TRUE(written(kind, {1, 2, 3, 4}, 1, DType::kFloat32, {-1, 5, kMin}).only_changed({5}));
    EXPECT_TRUE(written(kind, {1, 2, 3, 4}, 1, DType::kFloat32, {-1}).only_changed({}));
  }
}

TEST_P(CacheWrite, SlotsOutOfRangeAreSkipped) {
  constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();
  for (const std::int64_t slot : {kSlots, kSlots + 1, std::int64_t{1} << 32, kMax}) {
    EXPECT_TRUE(
        written(KvCacheDType::kAuto, {1, 2}, 1, DType::kFloat32, {slot, 0}).only_changed({0}));
  }
}

TEST_P(CacheWrite, NoSlotsWriteNothing) {
  EXPECT_TRUE(written(KvCacheDType::kAuto, {1, 2}, 1, DType::kFloat32, {}).only_changed({}));
}

TEST_P(CacheWrite, PlainCachesConvertToNearestEven) {
  const float tie_down = 1.0F + 0x1p-8F;  // between 1 and 1 + 2^-7 in bf16
  const float tie_up = 1.0F + 0x1p-7F + 0x1p-8F;
  const Written brain =
      written(KvCacheDType::kBFloat16, {tie_down, tie_up, kNan, kInfinity, -3.0F});
  const std::vector<double> row = brain.key(5);
  EXPECT_EQ(row[0], 1.0);
  EXPECT_EQ(row[1], 1.0 + 0x1p-6);
  EXPECT_TRUE(std::isnan(row[2]));
  EXPECT_EQ(row[3], kInfinity);
  EXPECT_EQ(row[4], -3.0);
  const Written half =
      written(KvCacheDType::kFloat16, {1.0F + 0x1p-11F, 0x1p-25F, 0x1.8p-24F, 65504.0F});
  EXPECT_EQ(half.key(5), (std::vector<double>{1.0, 0.0, 0x1p-23, 65504.0}));
}

TEST_P(CacheWrite, Fp8SaturatesAndKeepsNan) {
  const std::vector<float> row{448, 449, 1e30F, kInfinity, -kInfinity, kNan, 1e-30F, -500};
  const std::vector<double> e4m3 = written(KvCacheDType::kFp8E4M3, row).key(5);
  const double wanted[] = {448, 448, 448, 448, -448, 0, 0, -448};
  for (int i = 0; i < 8; ++i) {
    if (i == 5) {
      EXPECT_TRUE(std::isnan(e4m3[i]));
    } else {
      EXPECT_EQ(e4m3[i], wanted[i]) << i;
    }
  }
  const std::vector<double> e5m2 =
      written(KvCacheDType::kFp8E5M2, {57344, 60000, 1e30F, kInfinity, -kInfinity, kNan}).key(5);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(e5m2[i], 57344.0) << i;
  EXPECT_EQ(e5m2[4], -57344.0);
  EXPECT_TRUE(std::isnan(e5m2[5]));
}

TEST_P(CacheWrite, Fp8DividesByItsScale) {
  const Written result = written(KvCacheDType::kFp8E4M3, {1.0F, -0.5F, 0.3F, 7.0F}, 0.25F);
  EXPECT_EQ(result.key(5), (std::vector<double>{4.0, -2.0, 1.25, 28.0}));
}

// Every value halfway between two neighbours goes to the even one, every other to the nearest.
TEST_P(CacheWrite, Fp8RoundsEveryValueToNearestEven) {
  for (const KvCacheDType kind : {KvCacheDType::kFp8E4M3, KvCacheDType::kFp8E5M2}) {
    const DType storage = storage_dtype(kind, DType::kFloat32);
    const int highest = storage == DType::kFloat8E4M3 ? 0x7E : 0x7B;
    std::vector<float> row;
    std::vector<double> wanted;
    for (int code = 0; code < highest; ++code) {
      const auto low = static_cast<std::uint8_t>(code);
      const auto high = static_cast<std::uint8_t>(code + 1);
      const double a = decode(storage, &low);
      const double b = decode(storage, &high);
      const auto middle = static_cast<float>((a + b) / 2);
      for (const float x : {static_cast<float>(a), std::nextafter(middle, 0.0F), middle,
                            std::nextafter(middle, kInfinity)}) {
        const double nearest = x < middle ? a : (x > middle ? b : (code % 2 == 0 ? a : b));
        row.push_back(x);
        wanted.push_back(nearest);
        row.push_back(-x);
        wanted.push_back(-nearest);
      }
    }
    EXPECT_EQ(written(kind, row).key(5), wanted) << to_string(kind);
  }
}

TEST_P(CacheWrite, Int8RowsHaveTheirOwnScale) {
  const Written result = written(KvCacheDType::kInt8PerTokenHead, {127, -254, 1, 3, 5, -1});
  EXPECT_EQ(result.key_scale(5), 2.0F);
  // 0.5, 1.5 and 2.5 to even
  EXPECT_EQ(result.key(5), (std::vector<double>{64, -127, 0, 2, 2, 0}));
}

TEST_P(CacheWrite, Fp8RowsHaveTheirOwnScale) {
  const Written result = written(KvCacheDType::kFp8E4M3PerTokenHead, {-896, 2, 0, 17});
  EXPECT_EQ(result.key_scale(5), 2.0F);
  EXPECT_EQ(result.key(5), (std::vector<double>{-448, 1, 0, 8}));
}

TEST_P(CacheWrite, ScaleOfARowHasALowerBound) {
  for (const KvCacheDType kind :
       {KvCacheDType::kInt8PerTokenHead, KvCacheDType::kFp8E4M3PerTokenHead}) {
    EXPECT_EQ(written(kind, {0, 0, 0, 0}).key_scale(5), 1e-6F);
    EXPECT_EQ(written(kind, {1e-9F, 0, 0, 0}).key_scale(5), 1e-6F);
    EXPECT_EQ(written(kind, {0, 0}).key(5), (std::vector<double>{0, 0}));
  }
}

TEST_P(CacheWrite, NanStaysNanInRowsOfFp8) {
  const Written result = written(KvCacheDType::kFp8E4M3PerTokenHead, {kNan, 448, 1});
  EXPECT_EQ(result.key_scale(5), 1.0F);
  EXPECT_TRUE(std::isnan(result.key(5)[0]));
  EXPECT_EQ(result.key(5)[1], 448.0);
}

// Two elements are one block: (a, b) becomes (a - b, a + b).
TEST_P(CacheWrite, Int4RowsAreRotatedAndHaveAZeroPoint) {
  const Written above = written(KvCacheDType::kInt4PerTokenHead, {8, 7});  // (1, 15)
  EXPECT_EQ(above.key(5), (std::vector<double>{1 + 16 * 15}));
  EXPECT_EQ(above.key_scale(5), 1.0F);
  const Written around = written(KvCacheDType::kInt4PerTokenHead, {-4, 11});  // (-15, 7)
  EXPECT_EQ(around.key(5), (std::vector<double>{0 + 16 * 15}));
  EXPECT_EQ(parts_of_int4_scale(around.key_scale(5)).zero, 10);
  EXPECT_NEAR(around.key_scale(5), 22.0 / 15.0, 1e-5);
  const Written below = written(KvCacheDType::kInt4PerTokenHead, {-8, 7});  // (-15, -1)
  EXPECT_EQ(below.key(5), (std::vector<double>{0 + 16 * 14}));
  EXPECT_EQ(parts_of_int4_scale(below.key_scale(5)).zero, 15);
}

TEST_P(CacheWrite, Int4RowsReadBackAsWhatTheyWere) {
  Rng rng(3);
  for (const std::int64_t size : {8, 64, 80, 96, 128, 256, 512, 576}) {
    for (const DType model : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
      std::vector<float> row(size);
      for (float& x : row) x = static_cast<float>(3 + 2 * rng.normal());
      const std::vector<double> now =
          written(KvCacheDType::kInt4PerTokenHead, row, 1.0F, model).int4_key(5);
      double error = 0;
      double norm = 0;
      for (std::int64_t d = 0; d < size; ++d) {
        error += (now[d] - row[d]) * (now[d] - row[d]);
        norm += double{row[d]} * row[d];
      }
      EXPECT_LT(std::sqrt(error / norm), 0.2) << size << " " << to_string(model);
    }
  }
}

TEST_P(CacheWrite, Int4RowsThatAreNotFiniteAreNan) {
  std::vector<float> row(96, 1.0F);
  for (const float bad : {kNan, kInfinity, -kInfinity}) {
    row[50] = bad;
    for (const double x : written(KvCacheDType::kInt4PerTokenHead, row).int4_key(5)) {
      EXPECT_TRUE(std::isnan(x));
    }
  }
  const std::vector<float> zeros(96);
  EXPECT_EQ(written(KvCacheDType::kInt4PerTokenHead, zeros).int4_key(5),
            std::vector<double>(96, 0.0));
}

TEST_P(CacheWrite, EveryModelDTypeIntoEveryCache) {
  for (const DType model : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
    for (int kind = 0; kind <= static_cast<int>(KvCacheDType::kInt4PerTokenHead); ++kind) {
      const auto dtype = static_cast<KvCacheDType>(kind);
      const std::int64_t size = dtype == KvCacheDType::kInt4PerTokenHead ? 42 : 41;
      std::vector<float> row(size);
      for (std::size_t d = 0; d < row.size(); ++d) row[d] = 0.37F * static_cast<float>(d) - 7.0F;
      const Written result = written(dtype, row, 0.05F, model);
      const DType storage = storage_dtype(dtype, model);
      Tensor source = make_tensor(model, {size});
      for (std::int64_t d = 0; d < size; ++d) source.set({d}, row[d]);
      const std::int64_t stored = stored_head_size(dtype, size);
      const Tensor wanted = make_tensor(storage, {stored});
      float scale = 0;
      quantise_row(dtype, model, source.at({0}), size, 0.05F, storage, wanted.at({0}), &scale);
      std::vector<double> values(stored);
      decode_row(storage, wanted.at({0}), stored, values.data());
      EXPECT_EQ(result.key(5), values) << to_string(model) << " into " << to_string(dtype);
      EXPECT_TRUE(result.only_changed({5}));
    }
  }
}

// What short ways of dividing and rounding get wrong, among plain numbers and in rows of whole
// vectors: NaN, infinities, zeros of both signs, overflow, subnormals, and extreme scales.
TEST_P(CacheWrite, OddValuesAndScalesInRowsOfVectors) {
  const std::vector<float> odd{kNan,  kInfinity, -kInfinity, 0.0F,   -0.0F,    1e30F,   -3e38F,
                               -kNan, 1e-38F,    -1e-40F,    65504,  -57344,   448.5F,  1e-7F,
                               -1.5F, 0.875F,    2.125F,     -0.01F, 0x1p-17F, 0x1p-10F};
  for (const DType model : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
    for (int kind = 0; kind <= static_cast<int>(KvCacheDType::kInt4PerTokenHead); ++kind) {
      const auto dtype = static_cast<KvCacheDType>(kind);
      const DType storage = storage_dtype(dtype, model);
      for (const float scale : {1.0F, 0.37F, 3e20F, 0x1p-70F, 1e-39F}) {
        if (!is_per_tensor_fp8(dtype) && scale != 1.0F) break;
        // Rows with all of them, with one of them, and with none.
        for (std::size_t with = 0; with < odd.size() + 2; ++with) {
          std::vector<float> row(64);
          for (std::size_t d = 0; d < row.size(); ++d) {
            row[d] = 0.37F * static_cast<float>(d) - 7.0F;
            if (with == 0 && d % 3 == 0) row[d] = odd[d / 3 % odd.size()];
          }
          if (with > 1) row[11] = odd[with - 2];
          const Written result = written(dtype, row, scale, model);
          const Tensor source = make_tensor(model, {64});
          for (std::int64_t d = 0; d < 64; ++d) source.set({d}, row[d]);
          const std::int64_t stored = stored_head_size(dtype, 64);
          const Tensor wanted = make_tensor(storage, {stored});
          float own_scale = 0;
          quantise_row(dtype, model, source.at({0}), 64, scale, storage, wanted.at({0}),
                       &own_scale);
          const std::vector<double> values = result.key(5);
          for (std::int64_t d = 0; d < stored; ++d) {
            // int8 has no NaN: those, and all of a row whose scale is infinite, are 0.
            const double x = source.get({d});
            const bool zero = storage == DType::kInt8 && (std::isnan(x) || std::isinf(own_scale));
            const double want = zero ? 0.0 : wanted.get({d});
            const bool same = std::isnan(want) ? std::isnan(values[d])
                                               : values[d] == want &&
                                                     std::signbit(values[d]) == std::signbit(want);
            ASSERT_TRUE(same) << x << " as " << values[d] << ", not " << want << ": "
                              << to_string(model) << " into " << to_string(dtype) << ", scale "
                              << scale;
          }
          if (is_per_token_head(dtype)) {
            ASSERT_EQ(result.key_scale(5), own_scale);
          }
        }
      }
    }
  }
}

QUIRE_ON_EVERY_DEVICE(CacheWrite);

}  // namespace
}  // namespace quire::conformance
