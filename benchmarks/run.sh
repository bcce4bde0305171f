#!/usr/bin/env bash
# StreamFlow beside its peers on one real broker (`make bench`). Prints a table; benchmarks/README.md says what is measured.
#
#   benchmarks/run.sh [PEER...]        all peers by default; `benchmarks/run.sh --help` lists them
#
# Settings, from the environment:
#   MEASURE=compare    compare (throughput and latency of one process) | rebalance (workers come and go; MODE=table-eos
#                  and RATE=4000 unless set otherwise) | processes (`--processes 1` and `2`; MODE and N)
#   MODE=map       map | table | table-eos
#   N=500000       records a peer has to work through (a peer too slow for so many stops at its own number)
#   SKIP=0.1       part of the run left out as warm-up; for a warm JVM: SKIP=0.5 N=3000000
#   KEYS=100000    distinct keys
#   ROUNDS=1       how often every peer is run, in turn; the table shows medians
#   RATE=1000      records/s of the latency run; 0 leaves it out
#   LATENCY_S=10   its length in seconds
#   LIMIT_S=150    what one run may take at most
#   STANDBYS=0     warm copies of each table partition, for rebalance (StreamFlow, Kafka Streams)
#   BOOTSTRAP=     a broker that runs already; by default one is started on loopback and stopped at the end
#   BENCH_HOME=~/.cache/streamflow-bench    environments of the peers, scratch data, results
#   STREAMFLOW=    the streamflow command (default: the one of .venv)
set -euo pipefail
cd "$(dirname "$0")/.."
export BENCH_HOME=${BENCH_HOME:-$HOME/.cache/streamflow-bench}
.venv/bin/python -m benchmarks.environments tools
exec "$BENCH_HOME/tools/bin/python" -m "benchmarks.${MEASURE:-compare}" "$@"
