// DLPack: views from and to a caller's DLTensor.
#include <gtest/gtest.h>

#include <cstdint>

#include "quire/types.h"
#include "tests/api/misuse.h"

namespace quire {
namespace {

// dlpack.h's structures (ABI version 1).
enum DLDeviceType : std::int32_t { kDLCPU = 1, kDLCUDA = 2, kDLROCM = 10 };
struct DLDevice {
  DLDeviceType device_type;
  std::int32_t device_id;
};
struct DLDataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

// kDLInt 0, kDLUInt 1, kDLFloat 2, kDLBfloat 4, kDLBool 6, kDLFloat8_e4m3fn 10, kDLFloat8_e5m2 12.
constexpr DLDataType kTypes[] = {{2, 32, 1}, {2, 16, 1}, {4, 16, 1}, {10, 8, 1}, {12, 8, 1},
                                 {0, 8, 1},  {1, 8, 1},  {0, 32, 1}, {0, 64, 1}, {6, 8, 1}};
constexpr DType kDTypes[] = {
    DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat8E4M3, DType::kFloat8E5M2,
    DType::kInt8,    DType::kUInt8,   DType::kInt32,    DType::kInt64,      DType::kBool};

struct Source {
  float data[64] = {};
  std::int64_t shape[6] = {2, 3, 4, 1, 1, 1};
  std::int64_t strides[6] = {20, 5, 1, 1, 1, 1};
  DLTensor tensor{data, {kDLCPU, 0}, 3, {2, 32, 1}, shape, strides, 0};
};

TEST(DlPack, StridesAndOffset) {
  Source source;
  source.tensor.byte_offset = 12;
  const TensorView view = from_dlpack(source.tensor);
  EXPECT_EQ(view.data, source.data + 3);
  EXPECT_EQ(view.dtype, DType::kFloat32);
  EXPECT_EQ(view.ndim, 3);
  EXPECT_EQ(view.shape[1], 3);
  EXPECT_EQ(view.strides[0], 20);
  EXPECT_EQ(view.device, (Device{DeviceType::kCpu, 0}));
}

TEST(DlPack, MissingStridesMeanRowMajor) {
  Source source;
  source.tensor.strides = nullptr;
  const TensorView view = from_dlpack(source.tensor);
  EXPECT_EQ(view.strides[0], 12);
  EXPECT_EQ(view.strides[1], 4);
  EXPECT_EQ(view.strides[2], 1);
  EXPECT_TRUE(view.is_contiguous());
}

TEST(DlPack, EveryTypeBothWays) {
  for (std::size_t i = 0; i < std::size(kTypes); ++i) {
    Source source;
    source.tensor.dtype = kTypes[i];
    const TensorView view = from_dlpack(source.tensor);
    EXPECT_EQ(view.dtype, kDTypes[i]) << i;
    DLTensor back{};
    to_dlpack(view, &back);
    EXPECT_EQ(back.dtype.code, kTypes[i].code);
    EXPECT_EQ(back.dtype.bits, kTypes[i].bits);
    EXPECT_EQ(back.dtype.lanes, 1);
  }
}

TEST(DlPack, RoundTrip) {
  Source source;
  source.tensor.device = {kDLCUDA, 3};
  source.tensor.byte_offset = 8;
  const TensorView view = from_dlpack(source.tensor);
  EXPECT_EQ(view.device, (Device{DeviceType::kCuda, 3}));
  DLTensor back{};
  to_dlpack(view, &back);
  EXPECT_EQ(back.data, source.data + 2);
  EXPECT_EQ(back.byte_offset, 0U);
  EXPECT_EQ(back.device.device_type, kDLCUDA);
  EXPECT_EQ(back.device.device_id, 3);
  EXPECT_EQ(back.ndim, 3);
  for (int d = 0; d < 3; ++d) {
    EXPECT_EQ(back.shape[d], source.shape[d]);
    EXPECT_EQ(back.strides[d], source.strides[d]);
  }
}

TEST(DlPack, WhatQuireDoesNotKnow) {
  const auto error_of = [](auto spoil) {
    Source source;
    spoil(source.tensor);
    return argument_named_by([&] { from_dlpack(source.tensor); });
  };
  EXPECT_EQ(error_of([](DLTensor& t) { t.dtype = {2, 64, 1}; }), "tensor");  // double
  EXPECT_EQ(error_of([](DLTensor& t) { t.dtype = {5, 64, 1}; }), "tensor");  // complex
  EXPECT_EQ(error_of([](DLTensor& t) { t.dtype = {2, 32, 4}; }), "tensor");  // vectors
  EXPECT_EQ(error_of([](DLTensor& t) { t.device = {kDLROCM, 0}; }), "tensor");
  EXPECT_EQ(error_of([](DLTensor& t) { t.ndim = 7; }), "tensor");
  EXPECT_EQ(error_of([](DLTensor& t) { t.ndim = -1; }), "tensor");
}

}  // namespace
}  // namespace quire
