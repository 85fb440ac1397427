#!/usr/bin/env bash
# The tests of the native core under AddressSanitizer and UBSan, then under ThreadSanitizer. The first finding ends it.
# Wants GCC, whose runtimes can be loaded into a Python that was built without them, and cmake and ninja on the path.
# Usage: sanitize.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$1
tests=(
    tests/contract/test_{prefix_tree*,wire_streams}.py
    tests/unit/radix/test_{digest,held,hashing,snapshot,native_stub}.py
    tests/unit/kv_events/test_{columns,wire}.py
    tests/unit/worker/transfer/test_memory.py
)
# ThreadSanitizer cannot run where addresses are randomized more than it knows.
fixed=()
if setarch -R true 2>/dev/null; then fixed=(setarch -R); fi

under() {  # SANITIZERS, a symbol of their runtime, the libraries that are the runtime
    local sanitizers=$1 symbol=$2 build="build/sanitize-${1%%,*}" library runtime=()
    shift 2
    for library in "$@" libstdc++.so; do runtime+=("$(g++ -print-file-name="$library")"); done
    echo "The native core with -fsanitize=$sanitizers:"
    cmake -S radix/native -B "$build" -G Ninja --log-level=WARNING -DPython_EXECUTABLE="$(realpath -s "$python")" \
        -DCMAKE_CXX_COMPILER=g++ -DCMAKE_CXX_FLAGS=-fno-var-tracking -DRADIX_SANITIZE="$sanitizers" >/dev/null
    cmake --build "$build" -- --quiet
    # Python keeps memory to its end: no leaks are looked for. With malloc for its own objects it hides no misuse.
    env RHIZOME_RADIX=native RADIX_SANITIZED="$(ls "$build"/_native*.so)" RADIX_SANITIZER_SYMBOL="$symbol" \
        PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
        TSAN_OPTIONS=halt_on_error=1:history_size=7:suppressions=tests/native/tsan.supp \
        LD_PRELOAD="${runtime[*]}" "${fixed[@]}" \
        "$python" -m pytest -p tests.native.sanitized -p no:cacheprovider --capture=sys --timeout=600 "${tests[@]}"
}

under address,undefined __asan_init libasan.so libubsan.so
under thread __tsan_init libtsan.so
