# `make demo` and `make test` set everything up by themselves on Debian with Python 3.11 and pip, root or not.
PYTHON ?= python3
UV_VERSION := 0.13.9
UV := .cache/uv/bin/uv
EXPORT := --quiet --frozen --no-emit-project --format requirements.txt
BIN := .venv/bin

# uv brings certificates of its own; with the system's, it trusts a proxy of the house as pip does.
ifneq ($(wildcard /etc/ssl/certs/ca-certificates.crt),)
export UV_SYSTEM_CERTS ?= true
endif

# Containers often set it: then each start of a program compiles hundreds of modules, which is half of what it costs.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install tools demo test as-oneself as-another test-all lint compiled lock vendor servers screenshots clean
.DELETE_ON_ERROR:

# What the product needs to run, all types of target.
install: .venv/.installed

# What tests, benchmarks and the checks of `make lint` need besides.
tools: .venv/.tools

# pip into a folder works without python3-venv, and where Debian manages the environment.
$(UV):
	$(PYTHON) -m pip install --quiet --quiet --disable-pip-version-check --root-user-action=ignore --upgrade --target .cache/uv uv==$(UV_VERSION)

# The lock names versions and hashes but no package index, so that a hospital's own mirror serves as well: uv
# exports it, and installs from the index that is configured here, refusing what doesn't match its hash.
.venv/.installed: pyproject.toml uv.lock | $(UV)
	test -x $(BIN)/python || $(UV) venv --quiet --python $(PYTHON) .venv
	$(UV) export $(EXPORT) --no-dev --all-extras --no-extra testing --output-file .cache/product.txt
	$(UV) export $(EXPORT) --only-group build --no-hashes --output-file .cache/build.txt
	$(UV) pip install --quiet --python $(BIN)/python --require-hashes --requirements .cache/product.txt
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --build-constraints .cache/build.txt --editable .
	@du -sm .venv | sed 's/\t.*/ MB in .venv/'
	@touch $@

.venv/.tools: .venv/.installed
	$(UV) export $(EXPORT) --all-extras --output-file .cache/tools.txt
	$(UV) pip install --quiet --python $(BIN)/python --require-hashes --requirements .cache/tools.txt
	@touch $@

lock: | $(UV)
	$(UV) lock --upgrade
	sed -i -E 's#https://[^/"]*/simple#https://index.invalid/simple#g; s#https://[^/"]*/packages/#https://index.invalid/packages/#g' uv.lock

# What pages load that others wrote; tests compare it with vendor.toml.
VENDOR := talaria/front/static/vendor
vendor:
	cd $(VENDOR) && npm pack --silent "htmx.org@$$(sed -n 's/^version = "\(.*\)"/\1/p' vendor.toml)" >/dev/null
	cd $(VENDOR) && tar -xzf htmx.org-*.tgz --strip-components=2 package/dist/htmx.min.js && rm htmx.org-*.tgz

# Pictures of every page, for docs/pages.md: light, and some dark and as wide as a phone. To look at each page in each
# form: python -m tests.front.screenshots FOLDER --every
screenshots: tools servers
	$(BIN)/python -m tests.front.screenshots docs/pages

demo: install
	$(BIN)/talaria demo

# The real servers that tests talk to.
servers:
	sh tests/servers/install.sh

lint: tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# Tests wait for servers more than they compute: eight at a time, on two cores. What fails is run once more, and listed
# ("RERUN", and what went wrong) where it passes then: a test that is not steady, or a race in the product, for somebody
# to look into. What fails twice is run alone, in a process of its own.
PROCESSES := 8
PARALLEL := --numprocesses $(PROCESSES) --dist loadscope --reruns 1 --rerun-show-tracebacks
PYTEST := $(BIN)/python -m pytest
THOROUGH := --timeout 1800 --hypothesis-profile default
ALONE := --numprocesses 0 --last-failed --last-failed-no-failures none

# What tests import is compiled once, beside the check of types, which takes one core: else four processes compile all
# of it, each for itself.
compiled: tools
	@$(PYTEST) --collect-only -qq >.cache/collected.txt || { cat .cache/collected.txt; exit 1; }

# Where root runs this, an ordinary user's run goes beside it, which waits more than it computes, too; what it says is
# shown at the end. An ordinary user has run all of it himself. What fails twice waits until nobody else is at work.
test: tools servers
	@$(MAKE) --no-print-directory --jobs 2 lint compiled
	@$(MAKE) --no-print-directory --jobs 2 --keep-going as-oneself as-another; ended=$$?; cat .cache/as-another.txt; exit $$ended

as-oneself:
	@exec 9>.cache/at-work && flock 9 && \
	{ $(PYTEST) $(PARALLEL) -m "not slow" || { test $$? = 1 && $(PYTEST) $(PARALLEL) $(ALONE) -m "not slow"; }; }

# Two processes: what a further one takes to collect its tests would be most of it.
as-another:
	@sh tests/as_another_user.sh $(PARALLEL) --numprocesses 2 -m "as_user and not slow" >.cache/as-another.txt 2>&1

test-all: tools servers lint
	$(PYTEST) $(PARALLEL) $(THOROUGH)
	@sh tests/as_another_user.sh $(PARALLEL) $(THOROUGH)

clean:
	rm -rf .venv .cache build *.egg-info
