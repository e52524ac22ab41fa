#!/bin/sh
# Starts Prometheus and Grafana on this machine: http://127.0.0.1:3000 shows fomoe's dashboard.
#
# Needs docker with its compose plugin. API_KEY_FILE names the server's key where it has one;
# RAY_TEMP is Ray's directory where it is not /tmp/ray. `up.sh down` stops both again.
set -eu
cd "$(dirname "$0")"
docker compose version >/dev/null 2>&1 || {
  echo "docker with its compose plugin is needed and is not here" >&2
  exit 1
}
UID_OF_RAY=$(id -u)
export UID_OF_RAY
if [ "${1:-up}" = down ]; then
  exec docker compose down
fi
# Where it is missing, docker would make it for root and Ray could not write there.
mkdir -p "${RAY_TEMP:-/tmp/ray}"
docker compose up --detach
cat <<'TEXT'
Grafana     http://127.0.0.1:3000
Prometheus  http://127.0.0.1:9090
To see the charts in Ray's dashboard too, start Ray with
  RAY_PROMETHEUS_HOST=http://127.0.0.1:9090 RAY_GRAFANA_HOST=http://127.0.0.1:3000
TEXT
