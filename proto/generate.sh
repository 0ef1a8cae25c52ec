#!/usr/bin/env bash
# Generates proto/gen/ from proto/baton/. Usage: proto/generate.sh [OUTPUT_DIR]; PYTHON names the interpreter with grpcio-tools.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-../.venv/bin/python}
out=${1:-gen}
rm -rf "$out"
mkdir -p "$out"
find baton -name '*.proto' | sort | xargs "$python" -m grpc_tools.protoc -I . --python_out="$out" --pyi_out="$out" --grpc_python_out="$out"
# A file without services has no client or server code.
find "$out" -name '*_pb2_grpc.py' -exec sh -c 'grep -q "^class .*Stub" "$1" || rm "$1"' _ {} \;
# baton.api is a package inside the virtual namespace baton; nested virtual namespaces do not import, so each folder is a package.
find "$out/baton/api" -type d -exec touch {}/__init__.py \;
