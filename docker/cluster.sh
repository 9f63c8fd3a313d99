#!/usr/bin/env bash
# The cluster of docker/compose.yml. Its Makefile targets are cluster-up, cluster-wait, cluster-status and cluster-down.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: docker/cluster.sh images | up | wait | status [FLAGS] | down [--volumes]

  images    builds sfl-fed, sfl-edge and sfl-device; from docker/wheelhouse, if docker/wheelhouse.sh has filled it
  up        starts the cluster in the background, or goes on with one that is down; with WATCH=1 Prometheus and Grafana, too
  wait      until all devices are done, then copies the adapters to out/cluster/adapters; at most WAIT_S seconds (default 3600)
  status    `sfl status` as the operator; flags are passed on
  down      ends the cluster; states and certificates stay in volumes unless --volumes is given

  SFL_DATA   a folder with device-1/flows.log to device-4/flows.log (default: out/cluster/data, where logs are made up)
  SFL_MODEL  a folder with the pretrained model (default: the one of `sfl demo`)
  SFL_STEPS  steps of each device (default: 60)
TEXT
}

cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
files=(-f docker/compose.yml)
[ -z "${WATCH:-}" ] || files+=(-f docker/watching.yml)
export COMPOSE_IGNORE_ORPHANS=1 # the watchers, where WATCH is not set
devices=(device-1 device-2 device-3 device-4)
export COMPOSE_PROJECT_NAME=${COMPOSE_PROJECT_NAME:-sfl}

compose() {
    if docker compose version >/dev/null 2>&1; then
        docker compose "${files[@]}" "$@"
    else
        docker-compose "${files[@]}" "$@"
    fi
}

images() {
    local role
    for role in fed edge device; do
        docker build -q -f docker/Dockerfile --build-arg "ROLE=$role" ${TORCH_INDEX+--build-arg "TORCH_INDEX=$TORCH_INDEX"} \
            -t "sfl-$role:${SFL_TAG:-latest}" .
    done
    docker image ls --filter 'reference=sfl-*' --format '{{.Repository}}:{{.Tag}} {{.Size}}'
}

# What is mounted, made where it is not given.
mounts() {
    if [ -z "${SFL_MODEL:-}" ]; then
        SFL_MODEL=$("$python" -c 'from sfl.model.default import default_model; print(default_model("classification"))')
    fi
    if [ -z "${SFL_DATA:-}" ]; then
        SFL_DATA=$PWD/out/cluster/data
        local profiles=(camera hub lock camera) number
        for number in 1 2 3 4; do
            mkdir -p "$SFL_DATA/device-$number"
            [ -e "$SFL_DATA/device-$number/flows.log" ] || "$python" -m sfl.cli.main generate --flows 600 --seed "$number" \
                --profile "${profiles[number - 1]}" --out "$SFL_DATA/device-$number/flows.log"
        done
    fi
    SFL_MODEL=$(realpath "$SFL_MODEL") SFL_DATA=$(realpath "$SFL_DATA")
    export SFL_MODEL SFL_DATA
}

wait_for_devices() {
    local end=$((SECONDS + ${WAIT_S:-3600})) name state left
    while :; do
        left=()
        for name in "${devices[@]}"; do
            state=$(docker inspect -f '{{.State.Status}} {{.State.ExitCode}}' "$(compose ps -aq "$name")")
            [ "$state" = 'exited 0' ] || left+=("$name ($state)")
        done
        [ ${#left[@]} -gt 0 ] || break
        if [ $SECONDS -gt $end ]; then
            echo "error: not done: ${left[*]}; docker logs of these containers say why" >&2
            return 1
        fi
        sleep 5
    done
    mkdir -p out/cluster
    rm -rf out/cluster/adapters
    docker cp "$(compose ps -q fed)":/var/lib/sfl/adapters out/cluster/adapters
    echo "done; the newest adapter is $(find out/cluster/adapters -name 'v*' -maxdepth 1 | sort -V | tail -1)"
}

verb=${1:-}
[ $# -eq 0 ] || shift
case $verb in
images) images ;;
up)
    mounts
    compose up -d
    ;;
wait | status | down)
    export SFL_MODEL=${SFL_MODEL:-/} SFL_DATA=${SFL_DATA:-/} # of no use here, but compose wants them
    case $verb in
    wait) wait_for_devices ;;
    status) compose run --rm status "$@" ;;
    down)
        files=(-f docker/compose.yml -f docker/watching.yml)
        compose down "$@"
        ;;
    esac
    ;;
-h | --help) usage ;;
*)
    usage >&2
    exit 2
    ;;
esac
