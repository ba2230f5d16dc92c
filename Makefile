# One virtual environment in .venv; pinned by constraints.txt. Override PYTHON to choose the interpreter.
PYTHON ?= python3
# groups of pyproject.toml to install for the tests; EXTRAS=dev,onnx tests the ONNX export too
EXTRAS ?= dev
TESTED = .venv/test-$(EXTRAS)
PIP = .venv/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt
DEMO_STATES = "a landscape covered in thick snow, bare trees" "the snow melts, patches of brown grass" \
	"green shoots and small buds" "flowers bloom, trees adorned with fresh leaves" "a lush green meadow in full spring"

.PHONY: demo test test-slow check clean

demo: .venv/demo
	.venv/bin/vstar-engine generate --model mini --states $(DEMO_STATES) --frames 64 --guidance 6 --out out/demo.mp4 --gif --sheet --force

test: $(TESTED) check
	.venv/bin/python -m pytest -q -m "not slow"

test-slow: $(TESTED)
	.venv/bin/python -m pytest -q -m slow

check: $(TESTED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

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

clean:
	rm -rf .venv out build
