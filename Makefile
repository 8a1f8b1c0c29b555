# Two commands matter: `make demo` and `make test`. Each is complete on a machine that has only Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The oldest transformers that pyproject.toml allows, in an environment of its own that borrows all else from the first.
OLDEST_TRANSFORMERS := 5.17
OLDEST_VENV ?= .venv-oldest
# The newest of everything that pyproject.toml allows, in an environment of its own.
NEWEST_VENV ?= .venv-newest
WHEEL_VENV ?= .venv-wheel
# A real model, small enough for a CPU.
SMOLLM2 := models/smollm2-135m-instruct
SITE_PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))

# The versions that are installed with this Python, an existing environment's before another; `make lock` writes them.
PYTHON_VERSION := $(shell for python in $(BIN)/python $(PYTHON); do \
	$$python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null && break; done)
LOCK := $(wildcard pqkv_cli/constraints/python$(PYTHON_VERSION).txt)
# The second name is what pip reads from 25.3 on for the packages that it builds with; older ones read the first for them, too.
LOCKED := $(if $(LOCK),PIP_CONSTRAINT=$(LOCK) PIP_BUILD_CONSTRAINT=$(LOCK) )
# Tests on all cores, a file on one of them, each with one thread: several times as fast as one after another.
SIDE_BY_SIDE := -n logical --maxprocesses 8 --dist loadfile
PYTEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest $(SIDE_BY_SIDE)
LOCK_PYTHONS ?= python3.11 python3.12 python3.13
UNLOCKED = @$(if $(LOCK),:,echo "no versions are locked for Python $(PYTHON_VERSION): the newest that pyproject.toml allows come")

.PHONY: help demo smollm2 test test-oldest test-newest lock test-wheel crash-study mutation-study coverage docs check format clean

help:
	@echo "make demo    install into $(VENV), then run the whole chain on the embedded reference model"
	@echo "make smollm2 fetch SmolLM2-135M-Instruct (90 MB) into $(SMOLLM2), then run the whole chain on it"
	@echo "make test    install into $(VENV), then ruff, mypy and pytest"
	@echo "make test-oldest  the tests of hf, models, cache and runtime with transformers $(OLDEST_TRANSFORMERS), in $(OLDEST_VENV)"
	@echo "make test-newest  the tests of hf, models, cache, runtime and one chain with the newest of all libraries, in $(NEWEST_VENV)"
	@echo "make lock    write anew which versions demo and test install, for each of $(LOCK_PYTHONS) that is here"
	@echo "make crash-study     kill pqkv run at 50 seeded points and go on; writes a record to notes/"
	@echo "make mutation-study  open 10,000 cut or changed artifacts and run files; writes a record to notes/"
	@echo "make test-wheel  build sdist and wheel, install the wheel into $(WHEEL_VENV), run the chain with it (BORROW=1: without downloads)"
	@echo "make coverage  all tests, and which lines they never ran"
	@echo "make docs    write the pages that repeat what the code says"
	@echo "make check   ruff and mypy only"
	@echo "make format  let ruff rewrite the sources"
	@echo "make clean   remove $(VENV) and caches"

demo: $(VENV)/.installed
	$(BIN)/pqkv run demo

# Once fetched, the model stays. Only its recipe's --model differs from `pqkv run smollm2-135m`, which takes it from the hub.
smollm2: $(VENV)/.installed-gguf
	@test -f $(SMOLLM2)/config.json || $(BIN)/python .ci/smollm2.py $(SMOLLM2)
	$(BIN)/pqkv run smollm2-135m --model $(SMOLLM2)
	$(BIN)/pqkv eval runs/smollm2-135m --task perplexity --mode all --limit 2 --peers kivi:4,kvquant:4,kvarn:4,higgs:4
	$(BIN)/pqkv report runs/smollm2-135m

test: check
	$(call PYTEST,$(VENV))

# Where that version cannot be had, this says so and passes: the newest has been tested, and nothing else failed.
test-oldest: $(VENV)/.installed-dev
	@if $(MAKE) --no-print-directory $(OLDEST_VENV)/.installed; then \
		$(call PYTEST,$(OLDEST_VENV)) tests/hf tests/models tests/cache tests/runtime; \
	else \
		echo "NOT TESTED with transformers $(OLDEST_TRANSFORMERS): it could not be installed into $(OLDEST_VENV) (see above)" >&2; \
	fi

# Every time the newest that there is: this finds what libraries have changed since `make lock`.
test-newest:
	test -x $(NEWEST_VENV)/bin/python || $(PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager -e ".[test]"
	$(NEWEST_VENV)/bin/python -m pip list --disable-pip-version-check
	$(call PYTEST,$(NEWEST_VENV)) tests/hf tests/models tests/cache tests/runtime tests/cli/test_chain.py

lock:
	@for python in $(LOCK_PYTHONS); do \
		if $$python -c '' 2>/dev/null; then $$python .ci/lock.py || exit 1; \
		else echo "no $$python here: its versions stay as they are"; fi; \
	done

# sdist and wheel as they would be published, and the wheel in an environment that has nothing else of ours. With BORROW=1 it
# takes all other packages from the first environment, so that nothing is downloaded.
test-wheel: $(VENV)/.installed-dev
	rm -rf build dist $(WHEEL_VENV)
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(BORROW),--no-deps) dist/*.whl
	$(if $(BORROW),$(BIN)/python -c '$(SITE_PACKAGES)' > "$$($(WHEEL_VENV)/bin/python -c '$(SITE_PACKAGES)')/first_environment.pth")
	cd $(WHEEL_VENV) && bin/python -c 'import pqkv_cli, sys; assert pqkv_cli.__file__.startswith(sys.prefix), pqkv_cli.__file__'
	cd $(WHEEL_VENV) && bin/pqkv --version && bin/pqkv recipes --quiet && bin/pqkv inspect demo --quiet
	cd $(WHEEL_VENV) && bin/pqkv calibrate demo --samples 8 --seq-len 256 -o run
	cd $(WHEEL_VENV) && bin/pqkv fit-codebooks run --bits 4 --iterations 2 && bin/pqkv export run && bin/pqkv verify run --against demo
	cd $(WHEEL_VENV) && bin/pqkv generate run "Return a new" --max-new-tokens 8

coverage: $(VENV)/.installed-dev
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

docs: $(VENV)/.installed-dev
	$(BIN)/python tools/generate_docs.py

# Studies of kills and damage; `make test` runs a small part of each (docs/robustness.md). One thread, because they fork.
# A record is a lab note: its name has the month.
MONTH := $(shell date +%Y-%m)
STUDY := OMP_NUM_THREADS=1 PYTHONPATH=tests:tests/artifact $(BIN)/python tests/studies

crash-study: $(VENV)/.installed-dev
	$(STUDY)/crash_study.py --points 50 --record notes/$(MONTH)-crash-study.md
	$(STUDY)/crash_study.py --points 12 --signals 2 --allocation measured

mutation-study: $(VENV)/.installed-dev
	$(STUDY)/mutation_study.py --examples 10000 --record notes/$(MONTH)-mutation-study.md

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST_VENV) $(NEWEST_VENV) $(WHEEL_VENV) build dist .coverage* .mypy_cache .pytest_cache .ruff_cache build *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; call make with PYTHON=/path/to/python3.11 or newer" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "error: $(PYTHON) -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

# A stamp is as old as the last installation: pip runs once, and again when pyproject.toml or the locked versions change.
$(VENV)/.installed: pyproject.toml $(LOCK) | $(BIN)/python
	@echo "installing pqkv into $(VENV) (a few minutes the first time)"
	$(UNLOCKED)
	$(LOCKED)$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-gguf: $(VENV)/.installed
	$(LOCKED)$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[gguf]"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(LOCK) | $(BIN)/python
	@echo "installing pqkv with its test tools into $(VENV) (a few minutes the first time)"
	$(UNLOCKED)
	$(LOCKED)$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test,dev]"
	@touch $@ $(VENV)/.installed

$(OLDEST_VENV)/.installed: $(VENV)/.installed-dev
	@echo "installing transformers $(OLDEST_TRANSFORMERS) into $(OLDEST_VENV)"
	rm -rf $(OLDEST_VENV)
	$(BIN)/python -m venv $(OLDEST_VENV)
	@printf 'import site; site.addsitedir("%s")\n' "$$($(BIN)/python -c '$(SITE_PACKAGES)')" \
		> "$$($(OLDEST_VENV)/bin/python -c '$(SITE_PACKAGES)')/first_environment.pth"
	$(OLDEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check "transformers==$(OLDEST_TRANSFORMERS).*"
	$(OLDEST_VENV)/bin/python -c 'import torch, pqkv_cli, transformers; assert transformers.__version__.startswith("$(OLDEST_TRANSFORMERS).")'
	@touch $@
