#!/usr/bin/env bash
# Puts what the tests drive and pip has not (tmux, Prometheus and its promtool) into build/programs, from Debian's
# or Ubuntu's archive. Needs no root, installs nothing, starts no service. Without one the tests that need it are
# skipped, and the test report says so: this script never fails a build.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly FOLDER=$PWD/build/programs BOUND=120
readonly APT=$FOLDER/apt
declare -rA PACKAGE_OF=([tmux]=tmux [prometheus]=prometheus [promtool]=prometheus)

missing() { # the programs that are neither in PATH nor in the folder
    local name
    for name in "${!PACKAGE_OF[@]}"; do
        command -v "$name" >/dev/null || [[ -x $FOLDER/bin/$name ]] || echo "$name"
    done
}

apt() { # apt COMMAND...: apt-get with lists and a cache of our own
    timeout "$BOUND" apt-get -qq -o Dir::State::Lists="$APT/lists" -o Dir::Cache="$APT/cache" \
        -o APT::Sandbox::User="$(id -un)" -o Acquire::Retries=1 "$@"
}

packages() { # what is to be fetched: Prometheus alone, which needs no other; tmux with its libraries
    local name
    for name in "$@"; do
        if [[ ${PACKAGE_OF[$name]} == tmux ]]; then
            echo tmux # and of its libraries those that are not there
            apt install --print-uris --no-install-recommends tmux | sed -E 's/^[^ ]+ ([^_]+)_.*/\1/'
        else
            echo "${PACKAGE_OF[$name]}"
        fi
    done | sort -u
}

wrap() { # wrap NAME: a script that starts it with its libraries
    local root=$FOLDER/root libraries
    [[ -x $root/usr/bin/$1 ]]
    libraries=$(compgen -G "$root/usr/lib/*-linux-*" | tr '\n' ':') || true
    ! LD_LIBRARY_PATH=$libraries ldd "$root/usr/bin/$1" | grep 'not found' || return 1
    printf '#!/bin/sh\nLD_LIBRARY_PATH=%q exec %q "$@"\n' "$libraries" "$root/usr/bin/$1" >"$FOLDER/bin/$1"
    chmod +x "$FOLDER/bin/$1"
}

fetch() { # fetch NAME...: everything or nothing
    local names each
    mkdir -p "$APT/lists/partial" "$APT/cache/archives/partial" "$FOLDER/bin"
    apt update
    mapfile -t names < <(packages "$@")
    (cd "$APT" && apt download "${names[@]}")
    for each in "$APT"/*.deb; do dpkg-deb -x "$each" "$FOLDER/root"; done
    for each in "$@"; do wrap "$each"; done
    rm -rf "$APT"
}

mapfile -t wanted < <(missing)
if ((${#wanted[@]} == 0)); then exit 0; fi
mkdir -p "$FOLDER"
echo "fetching ${wanted[*]} for the tests"
if ! command -v apt-get dpkg-deb >/dev/null; then
    echo "setup: no apt-get here: install ${wanted[*]} yourself, or tests are skipped" >&2
else
    set +e # a condition would switch -e off inside it too
    (set -e; fetch "${wanted[@]}") >"$FOLDER/setup.log" 2>&1
    status=$?
    set -e
    if ((status != 0)); then
        echo "setup: not fetched (see build/programs/setup.log): tests that need ${wanted[*]} are skipped" >&2
    fi
fi
