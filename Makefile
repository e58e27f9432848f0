# make serve, make test: each sets up what it needs once, and again when a requirements file changes.
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
# The benchmarks measure a server's memory, so their environment has only a server's packages.
BENCH_VENV := .venv-bench
CHATTERBOX_VENV := .venv-chatterbox
STAND_IN := .data/chatterbox-stand-in
# Clients of OpenAI's protocol. Some cannot share an environment.
CLIENTS_VENV := .venv-clients
OPENAI2_VENV := .venv-openai2
LM_EVAL_VENV := .venv-lm-eval
RAY_VENV := .venv-ray
CLIENTS := tests/clients
NODE_MODULES := $(CLIENTS)/node/node_modules
# Another build of llama.cpp for `make bench-real`.
NODE_LLAMA := .data/node-llama-cpp
NODE_LLAMA_VERSION := 3.22.1

.PHONY: .env serve serve-ray serve-smollm2 test-unit test test-long test-scale test-chatterbox test-clients test-lm-eval mutants lint docs bench bench-real train evaluate clean
.DELETE_ON_ERROR:

# A .gguf file needs llama.cpp: its wheel, unless a llama-server is there.
GGUF_FILE := $(findstring .gguf,$(MICRO_LLM_MODEL_PATH) $(HERMES_MODEL_PATH))
LLAMA := $(LLAMA_SERVER)$(shell command -v llama-server 2>/dev/null)

DEMO = SIDECAR_DEMO=$${SIDECAR_DEMO:-true} PRELOAD_MODELS=$${PRELOAD_MODELS:-true} \
	PHI3_ADAPTER_DIR=$${PHI3_ADAPTER_DIR:-.data/adapters} \
	REDIS_URL=$${REDIS_URL:-memory://} LANCEDB_URI=$${LANCEDB_URI:-.data/lancedb} \
	ALLOWED_HOSTS=$${ALLOWED_HOSTS-localhost,127.0.0.1,[::1],$(HOST)}

serve: $(VENV)/.$(if $(LLAMA),serve,$(if $(GGUF_FILE),gguf,serve))
	$(DEMO) exec $(BIN)/python -m osiris --host $(HOST) --port $(PORT)

# On loopback only. RAY_OPTIONS="--phi3-min 2", or --help.
serve-ray: $(RAY_VENV)/.installed
	$(DEMO) exec $(RAY_VENV)/bin/python -m osiris.ray_serve --port $(PORT) $(RAY_OPTIONS)

# A real language model as Hermes, in a GGUF file of 98 MB; Phi-3 is the demo model.
serve-smollm2: $(VENV)/.gguf
	weights=$$($(BIN)/python -m tests.real_weights) && HERMES_MODEL_PATH=$$weights $(MAKE) serve

# The secrets of docker-compose's Redis and object store, in a file that git and Docker ignore. The
# file keeps its other lines.
.env:
	@if grep -Eqs '^REDIS_(PASSWORD|URL)=' $@; then echo "$@ already names a Redis"; else \
	  umask 077; secret() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }; password=$$(secret); \
	  printf '\nREDIS_PASSWORD=%s\nREDIS_URL=redis://:%s@redis:6379/0\nSTORE_SECRET=%s\n' \
	    $$password $$password $$(secret) >> $@; fi

# One module over fakes, in seconds: two processes need half the time of one.
test-unit: $(VENV)/.test
	$(BIN)/python -m pytest tests/unit -n 2 --dist loadfile

# All tests in minutes. Files are run in the order of tests/conftest.py. A process that dies is not
# replaced: pytest-xdist 3.8 would wait for its replacement for ever.
test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0

# Tests that take too long for every change. In one process, because some measure time.
test-long: $(VENV)/.test
	$(BIN)/python -m pytest tests/long -v -s -o faulthandler_timeout=3000

# Several machines, as far as one can be several. Gigabytes and minutes: Ray has an environment of its
# own. The tests of a running server run again, against two sidecars and against Ray.
test-scale: $(VENV)/.test $(RAY_VENV)/.installed
	LIVE_TARGET=two $(BIN)/python -m pytest tests/live
	LIVE_TARGET=ray $(BIN)/python -m pytest tests/live
	$(BIN)/python -m pytest tests/scale -v -s -o faulthandler_timeout=1200

# Gigabytes and minutes: the real package with random weights, as a worker in its own environment.
test-chatterbox: $(VENV)/.test $(CHATTERBOX_VENV)/.installed $(STAND_IN)/conds.pt
	CHATTERBOX_PYTHON=$(CURDIR)/$(CHATTERBOX_VENV)/bin/python CHATTERBOX_STAND_IN=$(CURDIR)/$(STAND_IN) \
	$(BIN)/python -m pytest tests/chatterbox -v -o faulthandler_timeout=1200 -o log_cli=true -o log_cli_level=INFO

# Third-party clients against a sidecar of .venv. node and npm come with a Python package.
test-clients: $(VENV)/.serve $(CLIENTS_VENV)/.installed $(OPENAI2_VENV)/.installed $(NODE_MODULES)/.installed
	$(OPENAI2_VENV)/bin/python -m pytest -c $(CLIENTS)/pytest.ini $(CLIENTS)/test_instructor.py \
	  $(CLIENTS)/test_openai.py $(CLIENTS)/test_openai_trouble.py
	PATH=$(CURDIR)/$(CLIENTS_VENV)/bin:$$PATH $(CLIENTS_VENV)/bin/python -m pytest -c $(CLIENTS)/pytest.ini \
	  --ignore=$(CLIENTS)/test_instructor.py --ignore=$(CLIENTS)/test_lm_eval.py $(CLIENTS)

# Downloads SmolLM2; compares its log likelihoods in an evaluation harness with the engine's own.
test-lm-eval: $(VENV)/.gguf $(LM_EVAL_VENV)/.installed
	$(LM_EVAL_VENV)/bin/python -m pytest -c $(CLIENTS)/pytest.ini -v $(CLIENTS)/test_lm_eval.py

# Mutation tests. They take half an hour on two cores, so CI does not run them.
mutants: $(VENV)/.mutants
	nice $(BIN)/python -m tests.mutants

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site of docs/, in site/, with its generated tables up to date. A broken link is an error.
docs: $(VENV)/.docs
	$(BIN)/python -m tests.docs_tables
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(BENCH_VENV)/.installed
	$(BENCH_VENV)/bin/python -m benchmarks.inference

# SmolLM2 on our engines and on llama.cpp. node-llama-cpp takes part where npm is installed.
bench-real: $(BENCH_VENV)/.installed
	@if command -v npm >/dev/null; then $(MAKE) --no-print-directory $(NODE_LLAMA)/$(NODE_LLAMA_VERSION); else \
	  echo "npm is not installed, so node-llama-cpp does not take part"; fi
	$(BENCH_VENV)/bin/python -m benchmarks.real

# The builds of llama.cpp are npm packages of their own, and only the one for CPUs is needed. The
# install script does not run, because it would look for another build on the Internet.
$(NODE_LLAMA)/$(NODE_LLAMA_VERSION):
	rm -rf $(NODE_LLAMA)
	mkdir -p $(NODE_LLAMA)
	echo '{"private": true}' > $(NODE_LLAMA)/package.json
	npm install --silent --no-audit --no-fund --ignore-scripts --omit=optional --prefix $(NODE_LLAMA) \
	  node-llama-cpp@$(NODE_LLAMA_VERSION) @node-llama-cpp/linux-$$(node -p process.arch)@$(NODE_LLAMA_VERSION)
	touch $@

train: $(VENV)/.serve
	$(BIN)/python -m training.demo_models

evaluate: $(VENV)/.serve
	$(BIN)/python -m llm_sidecar.demo evaluate

clean:
	rm -rf $(VENV) $(BENCH_VENV) $(CHATTERBOX_VENV) $(CLIENTS_VENV) $(OPENAI2_VENV) $(LM_EVAL_VENV) $(RAY_VENV) $(NODE_MODULES)
	rm -rf .data .pytest_cache .mypy_cache .ruff_cache
	rm -rf .schemathesis .hypothesis .import_linter_cache mutants .coverage .coverage.* htmlcov build dist site *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.gguf: requirements.txt requirements-gguf.txt $(VENV)/.serve
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-gguf.txt
	touch $@

# Without --no-compile, pip compiles thousands of modules, of which the tests import a few.
$(VENV)/.test: requirements-tests.txt requirements-gguf.txt $(VENV)/.serve
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt -r requirements-gguf.txt -r requirements-tests.txt
	touch $@

$(VENV)/.docs: requirements-docs.txt $(VENV)/.serve
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements-docs.txt
	touch $@

$(VENV)/.mutants: requirements-mutants.txt $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements-mutants.txt
	touch $@

$(BENCH_VENV)/.installed: requirements.txt requirements-gguf.txt requirements-bench.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-bench.txt
	touch $@

$(RAY_VENV)/.installed: requirements.txt requirements-ray.txt
	$(PYTHON) -m venv $(RAY_VENV)
	$(RAY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-ray.txt
	touch $@

$(CHATTERBOX_VENV)/.installed: requirements-chatterbox.txt
	$(PYTHON) -m venv $(CHATTERBOX_VENV)
	$(CHATTERBOX_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-chatterbox.txt
	touch $@

$(CLIENTS_VENV)/.installed: requirements-clients.txt
$(OPENAI2_VENV)/.installed: requirements-openai2.txt
$(LM_EVAL_VENV)/.installed: requirements-lm-eval.txt
$(CLIENTS_VENV)/.installed $(OPENAI2_VENV)/.installed $(LM_EVAL_VENV)/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r $<
	touch $@

$(NODE_MODULES)/.installed: $(CLIENTS)/node/package-lock.json $(CLIENTS_VENV)/.installed
	PATH=$(CURDIR)/$(CLIENTS_VENV)/bin:$$PATH npm ci --silent --no-audit --no-fund --ignore-scripts \
	  --prefix $(CLIENTS)/node
	touch $@

$(STAND_IN)/conds.pt: tests/chatterbox/stand_in.py | $(CHATTERBOX_VENV)/.installed
	$(CHATTERBOX_VENV)/bin/python -m tests.chatterbox.stand_in $(STAND_IN)
