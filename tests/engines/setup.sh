#!/bin/bash
# Installs real llama.cpp servers, real clients and two tiny models into DIR (default: target/engines of this repository).
#
#   usage: setup.sh [DIR]
#
# Nothing outside DIR is changed, apart from the package cache of uv. A second run with the same versions does nothing.
# DIR then holds venv/, tiny.gguf (some 4,000 tokens/s), slow.gguf (some 170 tokens/s) and their shared tokenizer tiny/.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=${1:-$here/../../target/engines}
mkdir -p "$dir"
cd "$dir"

# Two tests that start together must not install over each other.
exec 9> setup.lock
flock 9 2> /dev/null || true

stamp=$(cat "$here/requirements.txt" "$here/models.py" "$here/setup.sh" | cksum; pwd -P)
if [ -f stamp ] && [ "$(cat stamp)" = "$stamp" ]; then
    echo "engines: already installed in $PWD"
    exit 0
fi

if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then
    echo "engines: python3 >= 3.10 is needed: apt-get install python3 python3-venv" >&2
    exit 1
fi
if ! python3 -c 'import venv, ensurepip' 2> /dev/null; then
    echo "engines: python3 cannot make a virtual environment: apt-get install python3-venv" >&2
    exit 1
fi

rm -rf stamp venv tiny tiny.gguf slow.gguf
python3 -m venv venv
echo "engines: installing into $PWD (about 1 GB)"
# uv takes seconds where pip takes minutes; pip knows mirrors that only pip.conf names.
venv/bin/pip install -q uv
venv/bin/uv pip install -q --python venv/bin/python -r "$here/requirements.txt" ||
    venv/bin/pip install -q -r "$here/requirements.txt"
venv/bin/python "$here/models.py" .
echo "$stamp" > stamp
echo "engines: ready in $PWD"
