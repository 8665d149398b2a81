#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Makes sure that what the build takes from the system is there: installs it on Debian and Ubuntu as root, and otherwise
# says exactly what is missing. Installs nothing that is there already.
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
echo "Installing:$missing"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086  # a list of words
apt-get install -y -qq --no-install-recommends $missing >/dev/null
