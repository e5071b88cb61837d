PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed
WEB := tests/web/node_modules/.installed
export OMP_NUM_THREADS ?= 1
# glibc keeps what it was given back instead of asking the system anew for every tensor.
KEEP := MALLOC_TRIM_THRESHOLD_=2000000000 MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TOP_PAD_=268435456

.PHONY: venv demo test test-long lint bench bench-gpu clean

venv: $(STAMP)

$(STAMP): requirements.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' requirements-dev.txt)"
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

$(WEB): tests/web/package.json
	@if command -v npm >/dev/null && npm install --prefix tests/web --no-package-lock --no-audit --no-fund --silent; then touch $@; \
	else echo "NPM COULD NOT INSTALL VITEST: the tests of web/ will be skipped"; fi

demo: venv
	$(KEEP) $(BIN)/python -m demo
	$(BIN)/python -m tests.host.workflow_run

# The browser's tests measure frame times, so they run alone; the others share the cores, a file at a time.
test: venv $(WEB)
	@$(BIN)/python -m pytest -q $(FULL) -n 2 --dist loadfile tests --ignore=tests/host/test_browser.py; most=$$?; \
	$(BIN)/python -m pytest -q $(FULL) tests/host/test_browser.py; browser=$$?; \
	test $$most = 0 && test $$browser = 0

test-long: FULL = -m "" --hypothesis-profile=long
test-long: test

bench: venv
	$(KEEP) $(BIN)/python -m bench $(if $(QUICK),--quick --jobs 2)
	$(BIN)/python -m bench.kv $(if $(QUICK),--quick)

# Any Python with torch for CUDA will do: make bench-gpu GPU_PYTHON=python3. TOY=1 runs it at toy size on the CPU.
GPU_PYTHON ?= $(BIN)/python
bench-gpu:
	$(GPU_PYTHON) -m bench.gpu $(if $(TOY),--toy)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis demo/output
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
