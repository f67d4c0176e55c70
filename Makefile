# Each target sets up .venv itself; nothing has to be run before it.
PYTHON ?= python3
VENV := .venv
BIN := $(abspath $(VENV))/bin
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py
CXX_SOURCES := $(shell find csrc benchmarks/gpu tests/kernels -name '*.h' -o -name '*.cpp' -o -name '*.cu')
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
export PATH := $(BIN):$(PATH)
# Idle OpenMP threads sleep instead of spinning, so tests do not slow down on a busy machine.
TEST_ENV := OMP_WAIT_POLICY=passive

# A process for each core, each taking tests from the others when it has done its own.
PYTEST := pytest -n auto --dist worksteal
SMOKE := $(addprefix tests/test_,steps.py layouts.py clipping.py amp.py plan.py loading.py torch_parity.py bad_input.py \
	wrappers.py constructors.py builder.py registry.py schedulers.py averaging.py config.py package.py)

# What `make test-torch` adds: what of torch changes most from release to release.
CORE := $(SMOKE) $(addprefix tests/test_,compile.py dcp.py sharded.py distributed.py next_step.py unfuse.py \
	schedulers_torch.py reading.py portable.py engine_runner.py engine_resume.py cli.py)
VERSIONS ?= build/versions

# Where the benchmarks' figures go.
BENCH_OUT ?= work_dirs/bench
BENCH := pytest benchmarks --benchmark-enable --benchmark-quiet -q --benchmark-json=$(BENCH_OUT)/bench.json
REPORT := python -m benchmarks.report $(BENCH_OUT)/bench.json --out $(BENCH_OUT)
# What README.md and docs/ are written from.
MEASURED := benchmarks/results/epyc-2core
DEMO := python -m fusedopt compare configs/digits_vit.py --epochs 8

# What of a trainer's tests cannot be beside the rest: a fork with another package's name, and torchvision, which PyPI has
# for another build of torch.
ONEDL := $(VENV)/onedl
TORCHVISION := $(VENV)/torchvision
TRAINER_ENV := FUSEDOPT_ONEDL=$(abspath $(ONEDL)) FUSEDOPT_TORCHVISION=$(abspath $(TORCHVISION))

.PHONY: setup demo test test-trainers test-torch smoke test-full test-ptx lint format bench bench-full bench-gate measure results sanitize wheel clean

setup: $(VENV)/.built

$(VENV)/.installed: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, this is " + sys.version.split()[0])'
	@echo "Setting up $(VENV) (torch and tools; a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) 'setuptools>=77' wheel 'cmake>=3.18' ninja torch
	@$(PIP) scikit-learn matplotlib rich tensorboard PyYAML safetensors pytest pytest-xdist pytest-benchmark hypothesis numpy 'tomli; python_version < "3.11"' ruff mypy clang-format 'triton>=3.6'
	@$(PIP) mmengine && $(PIP) --force-reinstall --no-deps opencv-python-headless
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	@echo "Building fusedopt._C"
	@FUSEDOPT_EMULATOR=1 FUSEDOPT_BUILD_DIR=build/cmake $(PIP) --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.trainers: $(VENV)/.installed
	@echo "Installing Lightning, accelerate, transformers, timm and onedl-mmengine"
	@$(PIP) lightning pytorch-lightning accelerate transformers
	@$(PIP) --no-deps timm
	@rm -rf $(ONEDL) $(TORCHVISION)
	@$(PIP) --no-deps --target $(ONEDL) onedl-mmengine
	@$(PIP) --no-deps --target $(TORCHVISION) torchvision
	@touch $@

demo: setup
	$(DEMO)

# Of products of three parameters or more, as many cases as it takes for every two values to meet: tests/sampling.py.
test: setup
	$(TEST_ENV) $(PYTEST) --ignore=tests/trainers

# Under Lightning, Fabric, accelerate, the transformers Trainer, timm and onedl-mmengine, which it installs.
test-trainers: setup $(VENV)/.trainers
	$(TEST_ENV) $(TRAINER_ENV) $(PYTEST) tests/trainers

# The core tests under another torch: make test-torch TORCH=2.11 PYTHON=python3.12. docs/versions.md.
test-torch:
	@test -n "$(TORCH)" || { echo "Which torch? For example: make test-torch TORCH=2.11 PYTHON=python3.12"; exit 2; }
	@$(PYTHON) .ci/test_torch.py --torch $(TORCH) --python $(PYTHON) --folder $(VERSIONS) \
		-n auto --dist worksteal -q -m 'not slow' --cover values $(CORE)

# A minute's look: each value once, and nothing slow.
smoke: setup
	$(TEST_ENV) $(PYTEST) -q -m 'not slow' --cover values $(SMOKE)

# Every case, and the tests marked full. atheris, with which some of them fuzz, is not made for every machine.
test-full: setup
	-@$(PIP) atheris
	$(TEST_ENV) $(PYTEST) --cover all --ignore=tests/trainers

# The kernels' PTX, nvcc's and Triton's, in the interpreter: all tests of a backend. docs/ptx.md.
test-ptx: setup
	$(TEST_ENV) FUSEDOPT_PTX=nvcc $(PYTEST) -q -m ptx --cover all
	$(TEST_ENV) FUSEDOPT_PTX=triton $(PYTEST) -q -m ptx --cover all

lint: setup
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run -Werror $(CXX_SOURCES)

format: setup
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_SOURCES)

# The site, into build/site; any link that leads nowhere is an error. MkDocs has a .venv of its own, and needs no torch:
# once it is installed, nothing is fetched.
DOCS := $(VENV)/docs
.PHONY: docs

$(DOCS)/.installed: docs/_site/requirements.txt
	@echo "Installing MkDocs"
	@test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	@$(DOCS)/bin/python -m pip --disable-pip-version-check install --quiet -r $<
	@touch $@

docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 PATH=$(abspath $(DOCS))/bin:$$PATH mkdocs build --strict
	@echo "The site is in build/site: open build/site/index.html"

bench: setup
	@mkdir -p $(BENCH_OUT)
	$(BENCH) -m quick
	$(REPORT)

bench-full: setup
	@mkdir -p $(BENCH_OUT)
	$(BENCH)
	$(REPORT)

bench-gate: setup
	python -m benchmarks.gate

# All figures of README.md and docs/, as JSON; about 25 minutes on a machine that does nothing else, and the trainings
# in each precision. docs/benchmarks.md.
# The demonstration is the one training run of these pages, so the suite leaves its own out.
measure: setup $(VENV)/.trainers
	pytest benchmarks --benchmark-enable --benchmark-quiet -q -m quick --deselect benchmarks/test_training.py \
		--benchmark-json=$(MEASURED).json
	$(DEMO) --device cpu --out $(BENCH_OUT)/demo
	python -m benchmarks.record $(BENCH_OUT)/demo/comparison.json $(MEASURED)-demo.json
	python -m benchmarks.averaging --json $(MEASURED)-averaging.json
	python -m benchmarks.host --json $(MEASURED)-host.json
	python -m benchmarks.dry --json $(MEASURED)-dry.json
	python -m benchmarks.precision --out $(MEASURED)-precision.json
	python -m benchmarks.fewer_bytes --instructions --out $(MEASURED)-bytes.json
	python -m benchmarks.sharded --json $(MEASURED)-sharded.json
	$(TRAINER_ENV) python -m benchmarks.trainers --json $(MEASURED)-trainers.json
	python -m benchmarks.gate --keep-going --json $(MEASURED)-gates.json

# Writes README.md, docs/ and benchmarks/results/ from these files; measures nothing.
results: setup
	python -m benchmarks.pages

# The native tests under AddressSanitizer and UndefinedBehaviorSanitizer, in a build of their own.
sanitize: setup
	FUSEDOPT_BUILD_DIR=build/sanitize/cmake FUSEDOPT_SANITIZE=address,undefined FUSEDOPT_CUDA=0 FUSEDOPT_EMULATOR=1 \
		python setup.py --quiet build_py --build-lib build/sanitize/lib build_ext --build-lib build/sanitize/lib
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		PYTHONPATH=build/sanitize/lib $(TEST_ENV) pytest -q -m 'not slow' -k 'not triton or dtypes_whatever' \
		tests/test_steps.py tests/test_halves.py tests/test_plan*.py tests/test_layouts.py tests/test_clipping.py tests/test_amp.py \
		tests/test_fuzz.py tests/test_bad_input.py tests/test_cuda*.py tests/test_triton.py tests/test_triton_tuning.py

# One wheel in dist/ for this Python and several torches, which are named by release or by folder. Needs no torch.
wheel:
	@test -n "$(TORCHES)" || { echo 'Name the torches that the wheel is to serve: make wheel TORCHES="2.13 2.14"'; exit 2; }
	@test -x build/wheel/venv/bin/python || $(PYTHON) -m venv build/wheel/venv
	@build/wheel/venv/bin/python -m pip --disable-pip-version-check install --quiet 'setuptools>=77' 'cmake>=3.18' ninja
	FUSEDOPT_TORCHES="$(TORCHES)" FUSEDOPT_BUILD_DIR=build/wheel/cmake \
		build/wheel/venv/bin/python -m pip --disable-pip-version-check wheel --no-build-isolation --no-deps -w dist .
	@build/wheel/venv/bin/python csrc/sizes.py dist

clean:
	rm -rf build dist *.egg-info fusedopt/*.so $(VENV)/.built .pytest_cache .mypy_cache .ruff_cache .hypothesis work_dirs
