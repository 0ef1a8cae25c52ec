#!/bin/sh
# Makes a virtual environment with what one role needs; the steps of services/Dockerfile and of the tests.
#
#   services/install.sh ROLE VENV      ROLE: gateway, worker-cpu or worker-cuda
#
#   PYTHON       the interpreter of the environment, with pip (default: python3)
#   TORCH        what pip is asked for (default: the pin below)
#   TORCH_INDEX  package index with that build of torch (default: pip's own). On Linux x86-64 some registries deliver a CUDA
#                build for the plain pin: name an index of CPU builds for a small worker-cpu.
set -eu

ROLE=${1:?usage: services/install.sh ROLE VENV}
VENV=${2:?usage: services/install.sh ROLE VENV}
PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-torch==2.13.0}
TORCH_INDEX=${TORCH_INDEX:-}
ROOT=$(cd "$(dirname "$0")/.." && pwd)

case $ROLE in
gateway) EXTRA= ;;
worker-cpu) EXTRA= ;;
worker-cuda) EXTRA='[cuda]' ;;
*)
	echo "install.sh: unknown role $ROLE: expected gateway, worker-cpu or worker-cuda" >&2
	exit 2
	;;
esac

# Building writes into the source folder, so it gets a copy.
SOURCE=$(mktemp -d)
trap 'rm -rf "$SOURCE"' EXIT
for PART in pyproject.toml README.md LICENSE proto kernels kvtransfer load services; do
	cp -R "$ROOT/$PART" "$SOURCE/"
done

# The environment is filled from outside and has no pip of its own: what runs needs none.
"$PYTHON" -m venv --without-pip "$VENV"
install() {
	"$PYTHON" -m pip --quiet --disable-pip-version-check --python "$VENV/bin/python" install "$@"
}

if [ "$ROLE" = gateway ]; then
	# The gateway computes nothing: all dependencies but torch, which would be most of its image.
	"$VENV/bin/python" - "$SOURCE" >"$SOURCE/requirements.txt" <<'END'
import pathlib, re, sys, tomllib

project = tomllib.loads(pathlib.Path(sys.argv[1], "pyproject.toml").read_text())["project"]
names = {line: re.match(r"[\w.-]+", line)[0].lower() for line in project["dependencies"]}
print(*(line for line, name in names.items() if name != "torch"), sep="\n")
END
	install --requirement "$SOURCE/requirements.txt"
	install --no-deps "$SOURCE"
else
	install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"
	install "$SOURCE$EXTRA"
fi
