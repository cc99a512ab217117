#!/usr/bin/env bash
# Make .kit/ in the checkout: what the GPU machine needs besides the checkout. Needs pip and its
# index, xz, 1 GB of disk and two to five minutes; what was downloaded and packed stays in
# .cache/offline_gpu, so that a second run only looks again whether the parts fit. See README.md.
#   KIT_WHEEL=FILE     vLLM's wheel, where it lies already (tools/overlay_033.py keeps it in .cache)
#   KIT_LIMIT_MIB=64   what one load may hold
set -euo pipefail

version=0.33.0
kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$(git rev-parse --show-toplevel)"
work=.cache/offline_gpu
mib=$((1024 * 1024))
limit=$((${KIT_LIMIT_MIB:-64} * mib))
spare=$mib # for what a load weighs besides its files

fetch() {
    local tags=()
    for tag in manylinux_2_{31,28,27,26,24,17,5}_x86_64 manylinux2014_x86_64 manylinux1_x86_64; do
        tags+=(--platform "$tag")
    done
    python3 -m pip download -qq --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version 3.12 "${tags[@]}" "$@"
}

find_wheel() {
    find .cache -name "vllm-$version-*.whl" -print -quit
}

mkdir -p "$work"
if [[ ! -e $work/packed ]]; then
    rm -rf "$work"/{wheels,site,native,flash}
    wheel=${KIT_WHEEL:-$(find_wheel)}
    if [[ -z $wheel ]]; then
        echo "downloading vllm $version (336 MB)"
        fetch -d "$work" "vllm==$version"
        wheel=$(find_wheel)
    fi
    fetch -d "$work/wheels" -r "$kit/requirements.txt"
    echo "unpacking and stripping"
    python3 "$kit/collect.py" "$wheel" "$work/wheels" "$work"
    library=vllm/_C_stable_libtorch.abi3.so flash=vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so
    python3 "$kit/slim.py" "$work/native/$library" "$work/site/$library"
    python3 "$kit/slim.py" "$work/native/$flash" "$work/flash/$flash"
    echo "packing"
    tar c -C "$work/site" . | xz -T0 -6 >"$work/main.tar.xz"
    tar c -C "$work/flash" . | xz -T0 -3 >"$work/flash.tar.xz"
    touch "$work/packed"
fi

# What git knows or does not ignore travels as it is; the kit's first part takes the room left.
checkout=$(git ls-files -z --cached --others --exclude-standard | xargs -0 stat -c %s 2>/dev/null |
    awk '{ sum += $1 } END { print sum + 0 }' || true)
room=$((limit - spare - checkout))
if ((room < 4 * mib)); then
    echo "error: the checkout takes $((checkout / mib)) of $((limit / mib)) MiB and leaves too" \
        "little for the kit: remove large files that git does not ignore" >&2
    exit 2
fi
rm -rf .kit
mkdir -p .kit/flash
split -b "$room" -d -a 1 "$work/main.tar.xz" .kit/main.
parts=0
for piece in .kit/main.?; do
    mkdir ".kit/part$parts"
    mv "$piece" ".kit/part$parts/main.$parts"
    parts=$((parts + 1))
done
for folder in .kit/part?; do
    echo "$parts" >"$folder/parts"
    (cd "$work" && sha256sum main.tar.xz) >"$folder/main.sha256"
done
cp "$work/flash.tar.xz" .kit/flash/
(cd "$work" && sha256sum flash.tar.xz) >.kit/flash/flash.sha256

show() { awk -v name="$1" -v bytes="$2" 'BEGIN { printf "%-14s%6.1f MiB\n", name, bytes / 1048576 }'; }
show "the checkout" "$checkout"
for folder in .kit/*; do
    show "$folder" "$(du -sb --apparent-size "$folder" | cut -f1)"
done
if ((parts > 1)); then
    echo "note: the main part needs $parts loads; see README.md, 'More than one load'"
fi
