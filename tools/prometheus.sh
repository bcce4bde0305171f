#!/usr/bin/env bash
# Prints the path of a Prometheus server: the one on PATH, else Debian's, unpacked into .cache/prometheus.
# Nothing is installed and no root is needed; apt itself checks the package's signature.
set -euo pipefail
cache="$(cd "$(dirname "$0")/.." && pwd)/.cache/prometheus"
binary="$cache/root/usr/bin/prometheus"

if found=$(command -v prometheus); then
    echo "$found"
    exit
fi
if [ -x "$binary" ]; then
    echo "$binary"
    exit
fi
for tool in apt-get dpkg; do
    if ! command -v "$tool" >/dev/null 2>&1; then
        echo "prometheus is not on PATH, and it cannot be fetched: there is no \`$tool\` (this is no Debian or Ubuntu);" \
            "install Prometheus and try again" >&2
        exit 1
    fi
done

# Two callers at once: each works in a folder of its own, and the finished tree is moved into place.
mkdir -p "$cache"
work=$(mktemp -d "$cache/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
cd "$work"
apt=(apt-get --quiet --quiet -o APT::Sandbox::User=)
if ! "${apt[@]}" download prometheus >apt.log 2>&1; then
    # The machine's package lists are missing or old (a fresh container's are): read them into a folder of our own.
    mkdir -p state/lists/partial cache/archives/partial
    apt+=(-o "Dir::State=$work/state" -o "Dir::State::status=/var/lib/dpkg/status" -o "Dir::Cache=$work/cache")
    if ! { "${apt[@]}" update && "${apt[@]}" download prometheus; } >>apt.log 2>&1; then
        echo "prometheus could not be fetched with apt-get:" >&2
        cat apt.log >&2
        exit 1
    fi
fi
dpkg -x prometheus_*.deb root
[ -e "$cache/root" ] || mv root "$cache/root" 2>/dev/null || [ -x "$binary" ]
echo "$binary"
