"""The compiled part of the package: python/src/binding.cc, a function each."""

import os

import tvm_ffi

# Kinds of errors that tvm_ffi turns into Python's exceptions by name: this one it does not know.
tvm_ffi.register_error("NotImplementedError", NotImplementedError)

library = tvm_ffi.load_module(os.path.join(os.path.dirname(__file__), "_quire.so"))

plan_create = library.plan_create
plan_update = library.plan_update
plan_to_string = library.plan_to_string
plan_workspace_bytes = library.plan_workspace_bytes
plan_backend_name = library.plan_backend_name
attention = library.attention
write_kv_cache = library.write_kv_cache
merge_states = library.merge_states
kv_cache_dtype = library.kv_cache_dtype
capabilities = library.capabilities
use_openmp_threads = library.use_openmp_threads
instruction_set = library.instruction_set
validate_head_size = library.validate_head_size
kv_cache_shape = library.kv_cache_shape
version = library.version
info = library.info
kernels = library.kernels
