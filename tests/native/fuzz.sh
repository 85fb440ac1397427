#!/usr/bin/env bash
# Coverage-guided fuzzing (libFuzzer) of the native core, under AddressSanitizer and UBSan: operations on a tree, against
# a model, and the bytes of event batches. build/fuzz keeps what they learn, and the input of a finding, which
# `build/fuzz/tree FILE` repeats. Wants clang with its runtimes, and libstdc++.
# Usage: fuzz.sh PYTHON SECONDS, of each
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$1 seconds=$2 build=build/fuzz
flags=(-std=c++20 -O2 -g -fno-omit-frame-pointer -Wall -Wextra -I. -DRADIX_SHRINK=512
    -fsanitize=address,undefined -fno-sanitize-recover=all)
followed=(-fsanitize=fuzzer-no-link -fno-sanitize-coverage=trace-cmp)  # hashes are compared: that guides nowhere

compile() {  # SOURCE, further flags
    clang++ "${flags[@]}" "${@:2}" -c "$1" -o "$build/$(basename "$1" .cpp).o"
}
fuzz() {  # NAME, SEEDS (a line of hex each), the longest input, objects
    local name=$1 learned=$build/$1-learned objects=("${@:4}")
    clang++ "${flags[@]}" -fsanitize=fuzzer "${objects[@]/#/$build/}" -o "$build/$name"
    mkdir -p "$learned"
    "$python" - "$2" "$learned" <<'PYTHON'
import pathlib, sys
for i, line in enumerate(pathlib.Path(sys.argv[1]).read_text().splitlines()):
    (pathlib.Path(sys.argv[2]) / f"seed-{i:03}").write_bytes(bytes.fromhex(line))
PYTHON
    echo "Fuzzing of $name for $seconds s:"
    ASAN_OPTIONS=malloc_context_size=5 "$build/$name" -max_total_time="$seconds" -max_len="$3" -use_cmp=0 -timeout=60 \
        -print_funcs=0 -print_final_stats=1 -artifact_prefix="$build/$name-" "$learned" >"$build/$name.log" 2>&1 ||
        { tail -n 100 "$build/$name.log"; exit 1; }
    grep -a DONE "$build/$name.log"
}

mkdir -p "$build"
compile radix/native/tree.cpp "${followed[@]}"
compile radix/native/match.cpp "${followed[@]}"
compile tests/native/fuzz_tree.cpp
compile tests/native/fuzz_batch.cpp -fsanitize=fuzzer-no-link
fuzz tree tests/native/streams.txt 512 fuzz_tree.o tree.o match.o
fuzz batch tests/native/batches.txt 2048 fuzz_batch.o tree.o match.o
