#!/usr/bin/env bash
# Make the runtime directory that containers of one group share, in memory. Run it as root after each boot.
#   docker/prepare.sh [FOLDER] [GROUP-ID]      default: /run/kvcached 1000
set -euo pipefail

folder=${1:-${KVCACHED_RUNTIME_DIR:-/run/kvcached}}
group=${2:-${KVCACHED_GID:-1000}}
if [[ ! $group =~ ^[0-9]+$ ]]; then
    echo "prepare.sh: the group is a number, not '$group'" >&2
    exit 2
fi
mkdir -p "$folder"
kind=$(stat -f -c %T "$folder")
if [[ $kind != tmpfs && $kind != ramfs ]]; then
    echo "prepare.sh: $folder is on $kind, not in memory: the ledger works there, but writes to the disk all the time" >&2
fi
chgrp "$group" "$folder"
chmod 2770 "$folder"
echo "$folder is ready for group $group"
