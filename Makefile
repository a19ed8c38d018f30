# make demo   train on the embedded tasks, print the table, draw the pictures, save the adapter (no download)
# make test   the tests that run without a GPU, but for those marked slow: five minutes on two cores
# make test-slow  those: kills, full disks, several processes, compilers, the benchmarks at toy size
# make test-gpu  the tests that need an NVIDIA GPU
# make fuzz   the random tests of tests/hardening/properties, on twenty times as many cases and new ones each time: a quarter of an hour;
#             benchmarks/results/fuzz.json
# make check  lint, format and types
# make bench  every benchmark that runs on a CPU, briefly: benchmarks/results/, charts and docs/results/performance.md
# make mutants  which planted faults the fast tests notice, one fault at a time: benchmarks/results/mutants.json
# make audit  known vulnerabilities of what is installed; needs the network, so it is no part of the gate
# make soak   thousands of training steps, kills and adapter switches, and training curves in every dtype; ten minutes
# make tune   candidate tile sizes on the GPU at hand; writes runs/tiles.json, which MOSLD_TILES can name
# Each makes .venv first when it is missing.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
EXTRAS := .venv/extras

.PHONY: demo test test-slow test-gpu fuzz check bench mutants soak tune audit

demo: $(READY)
	$(BIN)/mosld train

# A process for each core; tests/conftest.py puts the long files first, so that none is left over for one core at the end.
PYTEST := $(BIN)/python -m pytest tests benchmarks --benchmark-disable --numprocesses auto --dist loadfile --no-loadscope-reorder

test: $(EXTRAS)
	$(PYTEST) -m "not slow"

test-slow: $(EXTRAS)
	$(PYTEST) -m slow

test-gpu: $(READY)
	$(BIN)/python -m pytest tests/gpu

fuzz: $(READY)
	MOSLD_FUZZ=1 MOSLD_FUZZ_REPORT=benchmarks/results/fuzz.json $(BIN)/python -m pytest tests/hardening/properties

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(READY)
	$(BIN)/python -m benchmarks bench

mutants: $(READY)
	$(BIN)/python -m tests.hardening.mutants

audit: $(READY)
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip list --format freeze --exclude-editable | sed 's/+.*//' > .venv/audit/installed.txt
	.venv/audit/bin/pip-audit --requirement .venv/audit/installed.txt --no-deps --disable-pip

soak: $(READY)
	$(BIN)/python -m benchmarks soak
	$(BIN)/python -m benchmarks curves

tune: $(READY)
	$(BIN)/python -m benchmarks tune --out runs/tiles.json

$(READY): pyproject.toml constraints.txt
	@echo "installing into .venv: a minute where packages are at hand, several where torch is downloaded"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# What the tests can do without: those of lm-evaluation-harness, TRL and the other frameworks skip where it does not install.
$(EXTRAS): $(READY)
	@echo "installing lm-evaluation-harness, TRL and other frameworks into .venv: another minute"
	@for extra in eval trl interop; do \
		$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$$extra]" \
			|| echo "the extra $$extra does not install here: its tests will be skipped"; \
	done
	touch $@
