# Set-up, run and tests in one command each: `make run`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
SAMPLE ?= 5

.PHONY: run test batteries sabotage avx2 lint deep mutation bench py312 py313 lowest spec schemas format clean

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once; torch comes as constraints.txt says)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,clients]"
	@touch $(STAMP)

run: $(STAMP)  ## train the showcase to its target
	$(BIN)/forge run pipelines/bitnet_grokfast.yaml

# compiled code is kept whatever the user's shell says: hundreds of processes would compile it anew
test: $(STAMP)  ## the tests, without the deep batteries
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 FORGE_CLIENTS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not deep" $(if $(ORDER),--order $(ORDER))

batteries: $(STAMP)  ## kills, power loss, damage, signals, hostile files: their short sizes
	OMP_NUM_THREADS=1 WORKERS=$(WORKERS) $(BIN)/python tests/batteries

sabotage: $(STAMP)  ## guards taken away one at a time: do their batteries turn red?
	OMP_NUM_THREADS=1 WORKERS=$(WORKERS) $(BIN)/python tests/sabotage.py

# torch's cache of compiled code does not ask for the instruction set: it has a folder of its own
avx2: $(STAMP)  ## the tests as on a processor with AVX2 alone
	OMP_NUM_THREADS=1 TORCHINDUCTOR_CACHE_DIR=$(abspath $(VENV))/inductor-avx2 FORGE_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \
		$(BIN)/python -m pytest -n $(WORKERS) -m "not deep"

deep: $(STAMP)  ## the long batteries
	OMP_NUM_THREADS=1 FORGE_CLIENTS=1 $(BIN)/python -m pytest -n $(WORKERS) -m deep
	OMP_NUM_THREADS=1 WORKERS=$(WORKERS) $(BIN)/python tests/batteries --size deep
	$(MAKE) sabotage
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutation.py --parts --sample 40 --at-least 85
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "hypothesis and not deep" --hypothesis-profile=search
	$(MAKE) py312 py313 lowest

py312 py313: py3%: $(STAMP)  ## what needs no torch, and the types, on another Python where there is one
	$(BIN)/python tests/other_environments.py without-torch 3.$*

lowest: $(STAMP)  ## the lowest stated versions of all but torch
	$(BIN)/python tests/other_environments.py lowest

mutation: $(STAMP)  ## faults planted one at a time: which do the tests miss?
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutation.py --sample $(SAMPLE)

lint: $(STAMP)  ## style, types, layers, schemas
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/forge schema --check
	$(BIN)/forge pot10 forge_kernel plugins

spec: $(STAMP)  ## which test claims which row of the specification
	$(BIN)/python tests/spec_table.py --write

schemas: $(STAMP)  ## write schemas/ anew
	$(BIN)/forge schema --write schemas

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/forge bench

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
