# Everything starts from a bare checkout: Python >= 3.11 and make are enough.
#   make demo ARGS="--data mnist --data-dir DIR"     make test PYTHON=python3.13 VENV=.venv-newest
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=
AOT ?= .venv-aot
RUNTIMES ?= .venv-runtimes
H100 := $(wildcard ../shared/aot/h100.txtpb)
BIN := $(VENV)/bin

.PHONY: demo notebook test slow runtimes lint types docs dist mutants bench aot clean

demo: $(VENV)/.examples
	$(BIN)/python examples/digits.py $(ARGS)

notebook: $(VENV)/.test
	$(BIN)/python tests/test_notebook.py

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

slow: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow $(ARGS)

# The runtimes that read the files are large, and pin versions of their own: they stay out of the other environment.
runtimes:
	$(MAKE) --no-print-directory VENV=$(RUNTIMES) $(RUNTIMES)/.runtimes
	$(RUNTIMES)/bin/python -m pytest -n $(JOBS) --dist worksteal tests/exports $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

# The site, into out/site; a link that leads nowhere fails. MkDocs' plugins advertise others in its place.
docs: $(VENV)/.docs
	DISABLE_MKDOCS_2_WARNING=true NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# What would be published, into out/dist: built, its description checked, installed where nothing else is, and run there.
dist: $(VENV)/.dist
	rm -rf out/dist
	$(BIN)/python -m build --outdir out/dist
	$(BIN)/python -m twine check --strict out/dist/*
	$(PYTHON) -m venv out/dist/venv
	out/dist/venv/bin/python -m pip install -q --disable-pip-version-check out/dist/*.whl
	cd out/dist && venv/bin/python -I -m clipjax --version && venv/bin/python -I -c '$(FIRST)'
FIRST := import clipjax, jax.numpy as p; print(clipjax.hold_once(clipjax.prune_mask(0.5), {"kernel": p.arange(4.0)[None]})[0])

mutants: $(VENV)/.test
	$(BIN)/python tests/mutants.py $(ARGS)

# What trains for hours prints its saved runs. `make bench DATA=DIR`, the folder of MNIST's files, trains what out/ lacks;
# TEXT=FILE is what the transformers read.
TRAINED := lenet lenet_grids headline claims spikes text_bytes
# Those of real/ need models and files that other packages ship, and say in their headers where from.
PARTS := $(addsuffix .py,%_arms %_cases %_chains %_figures %_training) benchmarks/real/%
TIMED := $(filter-out $(addprefix %/,$(addsuffix .py,$(TRAINED) aot compiled)) $(PARTS),$(wildcard benchmarks/*/*.py))
RUNS := $(if $(DATA),--data-dir $(DATA),--table)
READ := $(if $(TEXT),--text $(TEXT))
bench: $(VENV)/.bench
	set -e; for script in $(TIMED); do echo "== $$script"; $(BIN)/python $$script; done
	$(BIN)/python benchmarks/weights/lenet.py $(RUNS)
	$(BIN)/python benchmarks/weights/lenet.py --network LeNet-5 --seeds 1 $(RUNS)
	$(BIN)/python benchmarks/weights/lenet_grids.py $(RUNS)
	$(BIN)/python benchmarks/weights/headline.py $(RUNS) $(if $(DATA),--out out/headline.jsonl)
	$(BIN)/python benchmarks/weights/claims.py $(RUNS) $(READ)
	$(BIN)/python benchmarks/gradients/spikes.py $(READ)

# Compiles for TPUs and GPUs that are not here; their plugins stay out of the other environment, which they would slow.
aot:
	$(MAKE) --no-print-directory VENV=$(AOT) $(AOT)/.aot
	$(AOT)/bin/python benchmarks/programs/aot.py $(if $(H100),--gpu-config $(H100)) $(ARGS)

clean:
	rm -rf $(VENV) $(AOT) $(RUNTIMES) out .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis

# One stamp for each extra: installed again whenever pyproject.toml changes.
$(VENV)/.%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[$*]'
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'clipjax needs Python >= 3.11: try `make PYTHON=python3.11 ...`.'; exit 1; }
	$(PYTHON) -m venv $(VENV)
