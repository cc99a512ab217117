# Source it on the GPU machine, in the checkout's root: . tools/offline_gpu/unpack.sh
# The first time it unpacks .kit/ into $KIT (default /tmp/kit) and installs vllm-msd from the
# checkout; every time it sets what vLLM needs in the environment. With KIT_NO_C=1 vLLM's own
# library is left out (no_c.py stands in its place).
_tools=tools/offline_gpu
export KIT=${KIT:-/tmp/kit} KIT_NO_C=${KIT_NO_C:-0}
mkdir -p "$KIT/in"
cp .kit/part*/* .kit/flash/* "$KIT/in/" 2>/dev/null

_pieces() { find "$KIT/in" -name 'main.[0-9]' | wc -l; }

_unpack() { # NAME: check NAME.tar.xz against its sum and unpack it into the site, once
    [ -e "$KIT/$1.done" ] && return
    (cd "$KIT/in" && sha256sum -c --quiet "$1.sha256") || return 1
    python3 -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' \
        "$KIT/in/$1.tar.xz" "$KIT/site" && touch "$KIT/$1.done"
}

_wanted=$(cat "$KIT/in/parts" 2>/dev/null || echo 1)
if [ ! -e "$KIT/main.done" ] && [ "$(_pieces)" = "$_wanted" ]; then
    cat "$KIT"/in/main.[0-9] >"$KIT/in/main.tar.xz" && _unpack main
fi
[ -e "$KIT/main.done" ] || echo "kit: not complete, $(_pieces) of $_wanted parts are there"
[ -e "$KIT/in/flash.tar.xz" ] && _unpack flash

if [ -d "$KIT/site/vllm" ]; then
    cp $_tools/kit_shims.py "$KIT/site/"
    _library=_C_stable_libtorch
    if [ "$KIT_NO_C" = 1 ]; then
        [ -e "$KIT/site/vllm/$_library.abi3.so" ] && mv "$KIT/site/vllm/$_library.abi3.so" "$KIT/"
        cp $_tools/no_c.py "$KIT/site/vllm/$_library.py"
    elif [ -e "$KIT/$_library.abi3.so" ]; then
        mv "$KIT/$_library.abi3.so" "$KIT/site/vllm/" && rm -f "$KIT/site/vllm/$_library.py"
    fi
fi

export PYTHONPATH=$KIT/site
if [ ! -e "$KIT/installed" ]; then
    python3 -m pip install -q --no-index --no-deps --no-build-isolation \
        --disable-pip-version-check -e . && touch "$KIT/installed"
fi

export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=WARNING
export VLLM_USE_FLASHINFER_SAMPLER=0 # FlashInfer is not brought
export VLLM_USE_V2_MODEL_RUNNER=1 VLLM_ENABLE_V1_MULTIPROCESSING=0
export VLLM_HOST_IP=127.0.0.1 GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo # there is no network
export TRITON_F32_DEFAULT=ieee          # fp32 means fp32 in vLLM's own attention kernel too
export TVM_FFI_DISABLE_TORCH_C_DLPACK=1 # compiles an extension at import otherwise
export TRITON_CACHE_DIR=$KIT/triton VLLM_CACHE_ROOT=$KIT/vllm TORCHINDUCTOR_CACHE_DIR=$KIT/inductor
export MSD_CACHE_DIR=$KIT/widened
