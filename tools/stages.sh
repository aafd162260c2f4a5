# shellcheck shell=bash disable=SC2034 # variables that those scripts use
# Sourced by the scripts that make virtual environments. They set VENV, WHEELS, LOG and TOTAL.
# A finished stage leaves a stamp file that names its inputs. So an interrupted run goes on where it stopped, a
# second run does nothing, and a changed version redoes its stage and all later stages.
readonly STAMPS=$VENV/.stamps
number=0 redo=no

newest_python() { # the first interpreter of version 3.11 or newer
    local name
    for name in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if command -v "$name" >/dev/null &&
            "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    echo "setup: no Python 3.11 or newer with venv found; install one or set PYTHON=/path/to/python3" >&2
    return 1
}

progress() { # copy all output to the log, and one line to the terminal every 10 seconds
    local line last=$SECONDS start=$SECONDS
    while IFS= read -r line; do
        printf '%s\n' "$line" >>"$LOG"
        if ((SECONDS - last >= 10)) || [[ $line == "Installing collected packages"* ]]; then
            last=$SECONDS
            printf '%s   %4d s  %.90s\n' "$VENV" $((SECONDS - start)) "$line"
        fi
    done
}

stage() { # stage NAME KEY TEXT: run the function NAME, unless its stamp holds KEY already
    local name=$1 key=$2 text=$3 begun=$SECONDS
    number=$((number + 1))
    if [[ $redo == no && -f $STAMPS/$name && $(<"$STAMPS/$name") == "$key" ]]; then
        return
    fi
    if [[ $redo == no ]]; then : >"$LOG"; fi
    redo=yes
    rm -f "$STAMPS/$name"
    echo "$VENV [$number/$TOTAL] $text" # both environments may be made at the same time
    set +e # not `if (...)`: inside a condition, bash ignores -e in the stage too
    (set -e; "$name") 2>&1 | progress
    local status=${PIPESTATUS[0]}
    set -e
    if ((status != 0)); then
        echo "setup: stage '$name' failed; the end of $LOG:" >&2
        tail -n 20 "$LOG" >&2
        echo "setup: run the same command again to go on from this stage" >&2
        exit 1
    fi
    mkdir -p "$STAMPS"
    printf '%s\n' "$key" >"$STAMPS/.new"
    mv "$STAMPS/.new" "$STAMPS/$name" # only a finished stage has a stamp
    echo "$VENV [$number/$TOTAL] done in $((SECONDS - begun)) s"
}

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@" --progress-bar off; }

fetch() { # fetch REQUIREMENT: download its wheel into $WHEELS unless it is there; never leave a part of it
    local name=${1%%==*} version=${1##*==} part
    compgen -G "$WHEELS/${name//-/_}-$version-*.whl" >/dev/null && return
    mkdir -p "$WHEELS"
    part=$(mktemp -d "$WHEELS/.part.XXXXXX")
    # shellcheck disable=SC2064 # expand $part now: the trap runs after this function, when $part is gone
    trap "rm -rf '$part'" EXIT
    pip download --no-deps --only-binary :all: --dest "$part" "$1"
    mv "$part"/*.whl "$WHEELS/"
}

environment() { # the first stage of each script
    rm -rf "$VENV"
    "$python" -m venv "$VENV"
}

editable() { # editable FOLDER...: install our own projects, without their requirements
    local where arguments=()
    for where in "$@"; do arguments+=(-e "$where"); done
    pip install --no-deps --no-build-isolation "${arguments[@]}"
}

metadata_of() { # hash the part of each pyproject.toml that an installation reads: all before the tools' settings
    local where
    for where in "$@"; do sed '/^\[tool\.ruff/,$d' "$where/pyproject.toml"; done | sha256sum
}

begin() { # only one run at a time: a second one waits, and then finds everything done
    mkdir -p build
    exec 9>"build/.setup.${VENV#.}.lock"
    flock 9
    trap 'exit 130' INT
    python=$(newest_python)
    versions=$("$python" -c 'import sys; print(sys.version_info[:2], sys.prefix)')
}
