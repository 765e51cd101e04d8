# The two commands a newcomer needs: `make run` and `make test`. Each installs what it needs,
# configures, builds and does its job. PRESET=dev|asan|tsan|shared|cuda picks another build
# (CMakePresets.json).

PRESET ?= release
JOBS ?= $(shell nproc)
BUILD_DIR := build/$(PRESET)
QUIRE := $(BUILD_DIR)/bin/quire
# What `make wheel` passes to scripts/build_wheel.sh: --cpu, --cuda
WHEEL ?=
# What `make run` and `make bench` pass on: make run ARGS='--prompt "Hello" --max-tokens 64'
ARGS ?=

.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
.PHONY: help bootstrap configure build run test test-hosts bench wheel format lint clean

help:
	@echo 'make run      build, fetch a small language model, answer several prompts at once'
	@echo 'make test     build and run the tests'
	@echo 'make test-hosts  vLLM and transformers with Quire as attention (ARGS are passed on; 14 GB)'
	@echo 'make build    install what is missing, configure, build everything'
	@echo 'make bench    build and measure the CPU backend (ARGS are passed on)'
	@echo 'make wheel    build the Python package (WHEEL=--cpu: without CUDA) into build/wheel'
	@echo 'make format   rewrite the sources with clang-format'
	@echo 'make lint     formatting, include rules, clang-tidy'
	@echo 'make clean    remove build/'
	@echo 'PRESET=release (default), dev, asan, tsan, shared or cuda picks the build; JOBS=N bounds its processes'

bootstrap:
	@scripts/bootstrap.sh build

configure: bootstrap
	@scripts/configure.sh $(PRESET)

build: configure
	@cmake --build $(BUILD_DIR) -j $(JOBS)

run: configure
	@scripts/fetch_model.sh > /dev/null
	@cmake --build $(BUILD_DIR) -j $(JOBS) --target quire_cli
	@$(QUIRE) generate $(ARGS)

# The tests of examples/llm compare the real model's tokens with an independent implementation's.
test: build
	@scripts/fetch_model.sh > /dev/null
	@ctest --preset $(PRESET) -j $(JOBS)

test-hosts: bootstrap
	@JOBS=$(JOBS) scripts/test_hosts.sh $(ARGS)

bench: configure
	@cmake --build $(BUILD_DIR) -j $(JOBS) --target quire_cli
	@mkdir -p build/bench
	@$(QUIRE) bench --device cpu --workload bench/cases/workloads.json \
	  --json build/bench/cpu.json $(ARGS)

wheel: bootstrap
	@JOBS=$(JOBS) scripts/build_wheel.sh $(WHEEL)

format:
	@scripts/bootstrap.sh lint
	@scripts/check_format.sh --fix
	@scripts/check_python.sh --fix

lint: configure
	@scripts/bootstrap.sh lint
	@scripts/check_format.sh
	@scripts/check_python.sh
	@python3 scripts/check_includes.py
	@scripts/run_tidy.sh $(BUILD_DIR)

clean:
	@rm -rf build
