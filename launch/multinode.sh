#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One host's part of a run over several: start the same command on every host, in any order, from identical folders.
#
#     bash launch/multinode.sh --head 10.0.0.1 --hosts 2 pretrain --config configs/llama_1b_1m.yaml parallel.sp=16
#     bash launch/multinode.sh --head 10.0.0.1 --hosts 2 check
#
#   --head NAME|ADDRESS  the host where all of them meet; it must run this command too
#   --hosts N            how many hosts run it
#   --ranks N            ranks on this host; default: its CUDA devices, or 1
#   --port N             on the head, free and open to the others; default: 29400
#   --interface NAME     of this host, for Gloo and NCCL; default: for Gloo the one that leads to the head, NCCL chooses
#   --id NAME            tells runs on the same port apart; default: ring_hilbert
#   --restarts N         how often all ranks are restarted from the last checkpoint when one fails; default: 0
#
# On SIGTERM, SIGUSR1 and Ctrl-C the ranks write a checkpoint and exit; the status is then 75, and the same command resumes from it.
# The Python is that of RING_HILBERT_VENV (default .venv, made by `. launch/environment.sh train`), or else the one on PATH.
# More in docs/hosts.md.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '3,/^set/{/^#/s/^# \{0,1\}//p}' launch/multinode.sh >&2; echo "error: $1" >&2; exit 2; }

head='' hosts='' ranks='' port=29400 interface='' id=ring_hilbert restarts=0
while [ $# -gt 0 ]; do
    case $1 in
        --head | --hosts | --ranks | --port | --interface | --id | --restarts)
            [ $# -gt 1 ] || usage "$1 needs a value"
            declare "${1#--}=$2"
            shift 2
            ;;
        -*) usage "unknown option $1" ;;
        *) break ;;
    esac
done
[ -n "$head" ] && [ -n "$hosts" ] || usage "--head and --hosts are needed"
[ $# -gt 0 ] || usage "the command is missing: pretrain or check"

venv=${RING_HILBERT_VENV:-.venv}
[ ! -e "$venv/bin/activate" ] || . "$venv/bin/activate"
python=$(command -v python || command -v python3)
read -r address found is_head devices < <("$python" -m ring_hilbert.training.hosts "$head" "$port" ${interface:+"$interface"})
[ "$address" != None ] || usage "there is no route from this host to $head${interface:+, or no address of $interface}"
case $hosts:$address in
    1:*) ;;
    *:127.* | *:::1) usage "$head leads to the loopback of this host; give --head an address that the others reach, or --interface" ;;
esac
gloo=${interface:-${GLOO_SOCKET_IFNAME:-$found}}
[ "$gloo" = None ] || export GLOO_SOCKET_IFNAME=$gloo
[ -z "$interface" ] || export NCCL_SOCKET_IFNAME=$interface
ranks=${ranks:-$((devices > 0 ? devices : 1))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > ranks ? $(nproc) / ranks : 1))}

answers() { timeout 5 bash -c ': <>"/dev/tcp/$0/$1"' "$head" "$port" 2>/dev/null; }
if [ "$is_head" = 0 ]; then # torchrun would wait too, but then as long for every answer from a head that is gone
    until answers; do
        [ $((SECONDS % 30)) -ne 0 ] || echo "waiting for $head:$port" >&2
        [ "$SECONDS" -lt 1800 ] || usage "nothing answers at $head:$port; see that this command runs there, and that the port is open"
        sleep 1
    done
fi

# Every attempt gets a store of its own: torchrun's outlives a restart and would give the new ranks the addresses of the old.
[ "$restarts" = 0 ] || export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# In a session of its own, because schedulers signal whole process groups and torchrun should get a signal once. It passes SIGTERM on
# and gives the ranks this many seconds to exit.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
setsid "$python" -m torch.distributed.run --nnodes "$hosts" --nproc-per-node "$ranks" --max-restarts "$restarts" --local-addr "$address" \
    --rdzv-backend c10d --rdzv-endpoint "$head:$port" --rdzv-id "$id" --rdzv-conf "is_host=$is_head,read_timeout=20" \
    -m ring_hilbert.cli "$@" &
agent=$! told='' lost=''
trap 'told=yes; kill -TERM "$agent" 2>/dev/null || true' TERM USR1 INT

working() { # whether a rank is alive; ranks that have ended stay zombies until torchrun looks at them
    local child
    for child in $(cat "/proc/$agent/task/"*/children 2>/dev/null || echo "$agent"); do
        grep -q '^State:[[:space:]]*Z' "/proc/$child/status" 2>/dev/null || return 0
    done
    return 1
}

# Cut off from the head, torchrun waits for a single answer as long as TCP retries, a quarter of an hour or more, whatever its own time
# limits, and handles no signal meanwhile. Without ranks and without the head it has nothing left to wait for.
alone=$SECONDS
while kill -0 "$agent" 2>/dev/null; do
    sleep 1 || true
    if [ "$is_head" = 1 ] || working || answers; then
        alone=$SECONDS
    elif [ $((SECONDS - alone)) -gt 20 ]; then
        echo "multinode.sh: $head:$port has not answered for $((SECONDS - alone)) s, and no rank is left here: ending torchrun" >&2
        lost=yes
        kill -KILL "$agent" 2>/dev/null || true
    fi
done
status=0
wait "$agent" 2>/dev/null || status=$?
[ -z "$lost" ] || status=1
[ -z "$told" ] || status=75
exit "$status"
