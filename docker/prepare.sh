#!/usr/bin/env bash
# Makes the runtime directory that containers share: in memory, for one group. Run as root, once after a boot.
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
    echo "prepare.sh: $folder is on $kind and not in memory; the ledger works there, with more wear" >&2
fi
chgrp "$group" "$folder"
chmod 2770 "$folder"
echo "$folder is ready for group $group"
