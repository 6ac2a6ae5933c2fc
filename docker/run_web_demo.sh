#!/usr/bin/env bash
# The web demo in a container, on this machine only unless --host says otherwise:
#     docker/run_web_demo.sh -c CHECKPOINT [--port 8881]
set -euo pipefail

image=qwenvl:qwen3vl-cu128 name=qwenvl-web-demo host=127.0.0.1 port=8881 checkpoint='' replace=no
inside=7860

usage() {
    cat <<USAGE
usage: $(basename "$0") -c CHECKPOINT [-p PORT] [-i IMAGE] [-n NAME] [--host ADDRESS] [--replace] [-- DEMO'S FLAGS]

  -c, --checkpoint PATH      checkpoint folder (with config.json); the container reads it and can't write it
  -p, --port PORT            where the page is on this machine (default: $port)
      --host ADDRESS         of this machine that the page listens on (default: $host, this machine only)
  -i, --image, --image-tag   image (default: $image)
  -n, --name, --container-name
                             the container's name (default: $name)
      --replace              remove a container of that name first
USAGE
}

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

value_of() { # OPTION REST...: the value behind an option
    if [ -z "${2-}" ]; then fail "$1 needs a value; see --help"; fi
    echo "$2"
}

while [ $# -gt 0 ]; do
    case $1 in
    -c | --checkpoint) checkpoint=$(value_of "$@"); shift 2 ;;
    -p | --port) port=$(value_of "$@"); shift 2 ;;
    --host) host=$(value_of "$@"); shift 2 ;;
    -i | --image | --image-tag) image=$(value_of "$@"); shift 2 ;;
    -n | --name | --container-name) name=$(value_of "$@"); shift 2 ;;
    --replace) replace=yes; shift ;;
    -h | --help) usage; exit ;;
    --) shift; break ;;
    *) fail "unknown option $1 (the demo's own flags follow --); see --help" ;;
    esac
done

[ -n "$checkpoint" ] || fail "-c CHECKPOINT is missing; see --help"
[ -d "$checkpoint" ] || fail "$checkpoint: no such folder"
[ -f "$checkpoint/config.json" ] || fail "$checkpoint: no config.json in it, so it is no checkpoint folder"
checkpoint=$(cd "$checkpoint" && pwd -P)
case $checkpoint in *[,\"]*) fail "$checkpoint: docker can't mount a path with , or \" in it; rename it" ;; esac
for file in "$checkpoint"/*; do
    case $(readlink -f "$file") in
    "$checkpoint"/*) ;;
    # As in a model hub's cache: the mounted folder would hold links to nowhere.
    *) fail "$file is a link out of the folder; make a copy with: cp -rL $checkpoint FOLDER" ;;
    esac
done
closed=$(find "$checkpoint" \( -type f ! -perm -o=r -o -type d ! -perm -o=rx \) -print -quit)
[ -z "$closed" ] || fail "$closed: the container's user can't read it; run: chmod -R o+rX $checkpoint"
if ! [[ $port =~ ^[1-9][0-9]{0,4}$ ]] || [ "$port" -gt 65535 ]; then
    fail "--port: a number from 1 to 65535, not $port"
fi
command -v docker >/dev/null || fail "docker is not installed"
docker version >/dev/null 2>&1 || fail "the docker engine does not answer; what it says: docker version"
if [ "$image" = qwenvl:qwen3vl-cu128 ] && ! docker image inspect "$image" >/dev/null 2>&1; then
    fail "there is no image $image yet; in the repository run:
    docker build -f docker/Dockerfile-qwen3vl-cu128 -t $image ."
fi
if docker container inspect "$name" >/dev/null 2>&1; then
    [ "$replace" = yes ] || fail "a container $name is there already; add --replace, or take another name with -n"
    docker rm --force "$name" >/dev/null
fi

gpus=()
if [[ $(nvidia-smi -L 2>/dev/null) == *GPU* ]]; then
    gpus=(--gpus all)
else
    echo "no GPU found (nvidia-smi -L): the demo runs on the CPU, slowly" >&2
fi

docker run --detach --name "$name" --restart on-failure:3 \
    ${gpus[@]+"${gpus[@]}"} --shm-size 8g \
    --read-only --tmpfs /tmp:exec,mode=1777 --tmpfs /home/qwenvl:exec,uid=10001,gid=10001 \
    --cap-drop ALL --security-opt no-new-privileges --pids-limit 4096 \
    --env HF_HUB_OFFLINE=1 \
    --mount "type=bind,source=$checkpoint,target=/checkpoint,readonly" \
    --publish "$host:$port:$inside" \
    "$image" \
    python3 /opt/qwenvl/web_demo_mm.py --checkpoint-path /checkpoint \
    --server-name 0.0.0.0 --server-port $inside "$@" >/dev/null

echo "starting: http://$host:$port"
echo "watch it: docker logs --follow $name      end it: docker rm --force $name"
case $host in
127.* | localhost) ;;
*) echo "whoever reaches $host can use the page: it asks for no password by itself" >&2 ;;
esac
