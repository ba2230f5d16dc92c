# One virtual environment in .venv; pinned by constraints.txt. Override PYTHON to choose the interpreter.
PYTHON ?= python3
# groups of pyproject.toml to install for the tests
EXTRAS ?= dev,serve,onnx
TESTED = .venv/test-$(EXTRAS)
# processes that tests run in: one more than two cores, since tests of the server wait more than they compute
JOBS ?= 3
INSTALL = .venv/bin/python -m pip install --disable-pip-version-check -q
PIP = $(INSTALL) -c constraints.txt
DEMO_STATES = "a landscape covered in thick snow, bare trees" "the snow melts, patches of brown grass" \
	"green shoots and small buds" "flowers bloom, trees adorned with fresh leaves" "a lush green meadow in full spring"

BENCH = out/bench
NAME ?= cpu-2core-avx512
KILLS ?= 1000
SOAK ?= 30
MEASURE = .venv/bin/vstar-engine bench

.PHONY: demo test test-core test-interpreter test-slow test-reliability openai-clients check docs bench bench-builds bench-publish clean

demo: .venv/demo
	.venv/bin/vstar-engine generate --model mini --states $(DEMO_STATES) --frames 64 --guidance 6 --out out/demo.mp4 --gif --sheet --force

# what is slow by nature (full matrices, kills, disks, clocks, Ray, browsers) has targets of its own
QUICK = not slow and not reliability
# the kernels' tests in Triton's interpreter, which reads its variable where a kernel is defined: a process of their own
INTERPRETED = tests/kernels/test_ops.py $(wildcard tests/kernels/test_*_triton.py)
INTERPRETER = TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n $(JOBS) --dist worksteal

# mypy has a core's work alone, which the interpreter's tests share; what each says comes when it is done
test: $(TESTED)
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target check test-interpreter
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "$(QUICK)"

# the rooms that a change of the method touches: about three minutes on two quiet cores
test-core: $(TESTED)
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n $(JOBS) --dist loadfile -m "$(QUICK)" \
		$(addprefix tests/,config prompting networks sampling weights kernels engine)

test-interpreter: $(TESTED)
	$(INTERPRETER) -m "not slow" $(INTERPRETED)

# VSTAR_RTX=1 adds those of TensorRT for RTX, whose proprietary wheels they install into a scratch folder
test-slow: $(TESTED)
	.venv/bin/python -m pytest -q -m slow
	$(INTERPRETER) -m slow $(INTERPRETED)

# the client of another generation, which sends JSON where the newest sends forms; for tests alone
openai-clients: build/openai-2.24.0

build/openai-2.24.0: .venv/torch
	$(INSTALL) --no-deps --target $@ openai==2.24.0 distro==1.9.0 jiter==0.19.0 sniffio==1.3.1

# the long form of the server's reliability matrix: hours; KILLS and SOAK (minutes) scale it, TIMED=1 holds it to its figures,
# on a machine that does nothing else. Rows that need Debian's gcc, strace, postgresql, chromium and chromium-driver are skipped
# where these are missing
test-reliability: .venv/reliability build/openai-2.24.0
	.venv/bin/python -m pytest -q -s -rs tests/serving --kills $(KILLS) --soak $(SOAK) $(if $(TIMED),--timed)

check: $(TESTED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# the site of docs/ in build/site; fails on a dead link or anchor and on a page that is not in the navigation
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

# FULL=1 adds the step and the stages of VideoCrafter2
bench: .venv/bench
	rm -rf $(BENCH) && mkdir -p $(BENCH)
	.venv/bin/python -m pytest -q tests/bench/benchmarks.py --benchmark-only --benchmark-json $(BENCH)/regression.json
	$(MEASURE) kernels --frames 16 32 64 --limit 6 --out $(BENCH)/rows.jsonl
	$(MEASURE) kernels --frames 96 128 --rounds 3 --providers ours 'SDPA without TAR' 'SDPA, dense bias' --out $(BENCH)/rows.jsonl
	$(MEASURE) kernels --frames 256 --rounds 3 --providers ours --out $(BENCH)/rows.jsonl
	$(MEASURE) kernels --levels 1 2 --frames 16 64 --limit 4 --providers ours 'clean eager' 'SDPA without TAR' \
		--out $(BENCH)/rows.jsonl
	$(MEASURE) kernels --batch 2 --frames 16 --dtype float32 bfloat16 --layout fused split --limit 2 \
		--providers ours 'clean eager' 'SDPA without TAR' --out $(BENCH)/rows.jsonl
	$(MEASURE) kernels --op temporal_transformer --levels 0 1 2 --frames 16 --rounds 3 --providers ours 'clean passes' \
		--out $(BENCH)/rows.jsonl
	$(MEASURE) kernels --op groupnorm_silu geglu feed_forward linear spatial_attention temporal_convolution --levels 0 1 2 \
		--frames 16 --rounds 5 --limit 4 --providers ours "PyTorch's operators" '3-D convolution' 'three products' --out $(BENCH)/rows.jsonl
	$(MEASURE) pipeline --frames 16 --no-compile --limit 8 --out $(BENCH)/rows.jsonl
	$(MEASURE) pipeline --frames 64 --parts headline stages ladder --no-compile --limit 8 --out $(BENCH)/rows.jsonl
	$(MEASURE) pipeline --frames 64 --parts videos --rounds 3 --limit 600 --out $(BENCH)/rows.jsonl
	$(MEASURE) roofline --measure --model mini --frames 16 64 --limit 15 --out $(BENCH)/rows.jsonl
	$(MEASURE) engine --out $(BENCH)/rows.jsonl
	$(if $(FULL),$(MEASURE) pipeline --full --frames 16 --parts headline stages --no-compile --rounds 3 --out $(BENCH)/rows.jsonl)
	$(MEASURE) report $(BENCH)/rows.jsonl --plots $(BENCH)

# what building an engine takes, which is minutes, and its step beside eager; after `bench`, for bench-publish
bench-builds: .venv/builds
	rm -f $(BENCH)/builds.jsonl
	$(MEASURE) engine --no-starts --builds onnxruntime inductor --out $(BENCH)/builds.jsonl

# takes the last `make bench` and `bench-builds` over: their rows, the plots and the tables of the documents; and computes the map's counts
bench-publish: .venv/bench
	cp $(BENCH)/rows.jsonl bench/results/$(NAME).jsonl
	if [ -f $(BENCH)/builds.jsonl ]; then cp $(BENCH)/builds.jsonl bench/results/$(NAME)-builds.jsonl; fi
	rm -f bench/results/computed.jsonl
	$(MEASURE) roofline --out bench/results/computed.jsonl
	$(MEASURE) kernels --computed --device cpu --out bench/results/computed.jsonl
	rm -f docs/performance/plots/*.svg
	$(MEASURE) report --tables engine --plots docs/performance/plots
	$(MEASURE) report --documents README.md docs/performance/*.md

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch by its exact version first: a looser request would bring another build of it
.venv/torch: .venv/bin/python constraints.txt
	$(PIP) "$$(grep '^torch==' constraints.txt)" "$$(grep '^numpy==' constraints.txt)"
	touch $@

.venv/demo: .venv/torch pyproject.toml
	$(PIP) -e .
	mkdir -p out
	touch $@

$(TESTED): .venv/torch pyproject.toml
	$(PIP) -e ".[$(EXTRAS)]"
	mkdir -p out
	touch $@ .venv/demo

.venv/bench: .venv/torch pyproject.toml
	$(PIP) -e ".[bench]"
	mkdir -p out
	touch $@ .venv/demo

.venv/docs: .venv/bin/python constraints.txt pyproject.toml
	$(PIP) $$(.venv/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	touch $@

.venv/builds: .venv/torch pyproject.toml
	$(PIP) -e ".[bench,onnx]"
	mkdir -p out
	touch $@ .venv/bench .venv/demo

.venv/reliability: .venv/torch pyproject.toml
	$(PIP) -e ".[dev,serve,scale]"
	touch $@

clean:
	rm -rf .venv out build
