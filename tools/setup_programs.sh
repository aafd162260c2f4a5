#!/usr/bin/env bash
# Downloads programs that tests run and pip does not have (tmux, Prometheus with promtool) from Debian's or
# Ubuntu's archive into build/programs. Needs no root, installs nothing on the system, starts no service. If a
# program is missing, its tests are skipped and the test report says so: this script never fails a build.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly FOLDER=$PWD/build/programs BOUND=120
readonly APT=$FOLDER/apt
declare -rA PACKAGE_OF=([tmux]=tmux [prometheus]=prometheus [promtool]=prometheus)

missing() { # print the programs that are neither in PATH nor in the folder
    local name
    for name in "${!PACKAGE_OF[@]}"; do
        command -v "$name" >/dev/null || [[ -x $FOLDER/bin/$name ]] || echo "$name"
    done
}

apt() { # apt COMMAND...: run apt-get with its lists and cache in build/programs
    timeout "$BOUND" apt-get -qq -o Dir::State::Lists="$APT/lists" -o Dir::Cache="$APT/cache" \
        -o APT::Sandbox::User="$(id -un)" -o Acquire::Retries=1 "$@"
}

packages() { # packages NAME...: print the Debian packages of these programs; for tmux also missing libraries
    local name
    for name in "$@"; do
        if [[ ${PACKAGE_OF[$name]} == tmux ]]; then
            echo tmux # then the libraries of tmux that the system lacks
            apt install --print-uris --no-install-recommends tmux | sed -E 's/^[^ ]+ ([^_]+)_.*/\1/'
        else
            echo "${PACKAGE_OF[$name]}"
        fi
    done | sort -u
}

wrap() { # wrap NAME: write a script that starts the program with its libraries
    local root=$FOLDER/root libraries
    [[ -x $root/usr/bin/$1 ]]
    libraries=$(compgen -G "$root/usr/lib/*-linux-*" | tr '\n' ':') || true
    ! LD_LIBRARY_PATH=$libraries ldd "$root/usr/bin/$1" | grep 'not found' || return 1
    printf '#!/bin/sh\nLD_LIBRARY_PATH=%q exec %q "$@"\n' "$libraries" "$root/usr/bin/$1" >"$FOLDER/bin/$1"
    chmod +x "$FOLDER/bin/$1"
}

fetch() { # fetch NAME...: download, unpack and wrap these programs; fail if one fails
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
    set +e # not `if (...)`: inside a condition, bash ignores -e in `fetch` too
    (set -e; fetch "${wanted[@]}") >"$FOLDER/setup.log" 2>&1
    status=$?
    set -e
    if ((status != 0)); then
        echo "setup: not fetched (see build/programs/setup.log): tests that need ${wanted[*]} are skipped" >&2
    fi
fi
