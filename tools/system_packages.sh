#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Makes sure that what the build takes from the system is there: installs it on Debian and Ubuntu as root, and otherwise
# says exactly what is missing. Installs nothing that is there already.
# Arguments name programs that only some tests use, such as chromium: those are installed as root on Debian, and
# otherwise done without.
set -eu

packages="g++ cmake ninja-build git libhwy-dev libgtest-dev libbenchmark-dev python3-venv"

if ! command -v dpkg-query >/dev/null; then
  for tool in c++ cmake ninja git python3; do
    command -v "$tool" >/dev/null || missing="${missing-} $tool"
  done
  if [ -n "${missing-}" ]; then
    echo "sparline needs these programs, and this system lacks:$missing." >&2
    echo "Install them, with Highway (libhwy) and GoogleTest, through your package manager, then run make again." >&2
    exit 1
  fi
  exit 0
fi

install() {
  echo "Installing: $*"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

for program in "$@"; do
  command -v "$program" >/dev/null && continue
  if [ "$(id -u)" -ne 0 ] || ! install "$program"; then
    echo "Without $program, the tests that need it are skipped. On Debian: sudo apt-get install $program" >&2
  fi
done

missing=""
for package in $packages; do
  status=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true)
  [ "$status" = "install ok installed" ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" -ne 0 ]; then
  echo "sparline needs packages that are not installed:$missing." >&2
  echo "Run: sudo apt-get install$missing" >&2
  exit 1
fi
# shellcheck disable=SC2086  # a list of words
install $missing
