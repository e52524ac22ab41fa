#!/bin/sh
# Prints the Python that fomoe can be built with, or the one apt line that installs what is missing.
#
# Runs with nothing installed, so it is POSIX sh. Variables: PYTHON and CXX name the interpreter and
# the compiler to use instead of the first that fits.
set -u

fits() { # the interpreter runs and has a version that fomoe knows
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

has_venv() {
  "$1" -c 'import ensurepip, venv' 2>/dev/null
}

has_header() {
  [ -f "$("$1" -c 'import sysconfig; print(sysconfig.get_path("include"))' 2>/dev/null)/Python.h" ]
}

compiles() { # unquoted: CXX may be "ccache g++"; without the standard headers it does not count
  printf '#include <vector>\n' | $1 -x c++ -std=c++17 -fsyntax-only - 2>/dev/null
}

packages=
missing=
need() { # PACKAGES, what they bring
  packages="$packages $1"
  missing="$missing
  - $2"
}

[ "$(uname -s)" = Linux ] || {
  echo "fomoe runs on Linux; this is $(uname -s)" >&2
  exit 1
}

# The first complete interpreter wins; else the first of a fitting version, to name what it lacks.
if [ -n "${PYTHON:-}" ]; then
  set -- "$PYTHON"
else
  set -- python3 python3.13 python3.12 python3.11 python3.10
fi
python=
for candidate in "$@"; do
  fits "$candidate" || continue
  [ -n "$python" ] || python=$candidate
  if has_venv "$candidate" && has_header "$candidate"; then
    python=$candidate
    break
  fi
done

if [ -n "$python" ]; then
  # Debian names packages after the command: python3 -> python3-venv, python3.12 -> python3.12-venv.
  name=$(basename "$python")
  [ "$name" != python ] || name=python3
  has_venv "$python" || need "$name-venv" "the modules venv and ensurepip of $python"
  has_header "$python" || need "$name-dev" "Python.h of $python"
elif [ -z "${PYTHON:-}" ] && version=$(python3 -c 'import sys; print(sys.version[:4])' 2>/dev/null); then
  need "python3.13 python3.13-venv python3.13-dev" "Python 3.10 to 3.13 (python3 is $version)"
else
  need "python3 python3-venv python3-dev" "Python 3.10 to 3.13${PYTHON:+ (PYTHON is $PYTHON)}"
fi

if [ -n "${CXX:-}" ]; then
  set -- "$CXX"
else
  set -- c++ g++ clang++
fi
compiler=
for candidate in "$@"; do
  compiles "$candidate" && compiler=$candidate && break
done
[ -n "$compiler" ] || need g++ "a C++17 compiler${CXX:+ (CXX is $CXX)}"

if [ -n "$packages" ]; then
  sudo='sudo '
  [ "$(id -u)" -ne 0 ] || sudo=
  {
    printf 'fomoe needs what this machine does not have:%s\nInstall it with:\n' "$missing"
    printf '  %sapt-get update && %sapt-get install -y%s\n' "$sudo" "$sudo" "$packages"
  } >&2
  exit 1
fi
echo "$python"
