# `make demo` and `make test` do everything on a fresh clone: they make .venv and install into it.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
MERGEKIT := .venv-mergekit/.installed
FUSIONBENCH := .venv-fusionbench/.installed
SITE := -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'

# Processes that tests run in. All of them, and those that they start, import the same modules, so byte code is kept.
JOBS ?= logical
PARALLEL := -n $(JOBS) --dist worksteal
test test-all: export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-all faults soak mergekit fusionbench docs families lint install clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/ecotone run experiments/recipes/digits-specialists.yaml

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow and not gpu" $(PARALLEL)

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -m "not gpu" --timeout 1200 $(PARALLEL)

faults: $(INSTALLED)
	$(BIN)/python benchmarks/faults.py

soak: $(INSTALLED)
	$(BIN)/python benchmarks/soak.py

# mergekit does not start on today's transformers, so it has an environment of its own, with the project's torch.
$(MERGEKIT): $(INSTALLED)
	$(PYTHON) -m venv .venv-mergekit
	$(BIN)/python $(SITE) > $$(.venv-mergekit/bin/python $(SITE))/project.pth
	.venv-mergekit/bin/pip install -q --no-deps mergekit==0.1.4 immutables==0.21 pydantic==2.10.6 \
	  pydantic-core==2.27.2 transformers==4.57.3 tokenizers==0.22.2 huggingface_hub==0.36.2
	touch $@

mergekit: $(MERGEKIT)
	ECOTONE_MERGEKIT=.venv-mergekit/bin/python $(BIN)/python -m pytest tests/test_mergekit_program.py tests/test_starts_mergekit.py

# FusionBench wants many packages, of which the modules that are tried import these and the project's own.
$(FUSIONBENCH): $(INSTALLED)
	$(PYTHON) -m venv .venv-fusionbench
	$(BIN)/python $(SITE) > $$(.venv-fusionbench/bin/python $(SITE))/project.pth
	.venv-fusionbench/bin/pip install -q --no-deps fusion-bench==0.2.33 lightning==2.6.6 lightning-utilities==0.15.3 \
	  torchmetrics==1.9.0 hydra-core==1.3.8 omegaconf==2.3.0 antlr4-python3-runtime==4.9.3 bidict==0.24.1
	touch $@

fusionbench: $(FUSIONBENCH)
	ECOTONE_FUSIONBENCH=.venv-fusionbench/bin/python $(BIN)/python -m pytest tests/test_fusionbench_program.py

# Every field of a recipe on one page, from the declarations themselves.
docs: $(INSTALLED)
	$(BIN)/python -m ecotone.experiments.fields docs/fields.md

# The families of transformers, each tried with tiny models: half an hour.
families: $(INSTALLED)
	PYTHONPATH=tests $(BIN)/python tests/families_table.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	PATH=$(CURDIR)/$(BIN):$$PATH PYTHONPATH=$(CURDIR) $(BIN)/pyright --verifytypes ecotone --ignoreexternal

clean:
	rm -rf .venv .venv-mergekit .venv-fusionbench .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build *.egg-info
