#!/bin/bash
# A SLURM of two nodes on this one machine, for tests/slurm/test_slurm.py.
#
#   tests/slurm/setup.sh [start] [FOLDER]   installs Debian's slurm-wlm and munge when they are
#                                           missing (needs root), starts munged, slurmctld and two
#                                           slurmd, and waits until a job runs; does nothing twice
#   tests/slurm/setup.sh stop [FOLDER]      ends what this script started there
#
# Everything runs as the calling user, without systemd and cgroups; configuration, key, state and
# logs lie in FOLDER (default: equifeat-slurm-UID in the folder for temporary files). start prints
# the command that lets a shell use this SLURM: eval "$(tests/slurm/setup.sh)".
set -euo pipefail

action=start
case "${1:-}" in
    start | stop)
        action=$1
        shift
        ;;
    -*)
        echo "usage: setup.sh [start|stop] [FOLDER]" >&2
        exit 2
        ;;
esac
folder=${1:-${TMPDIR:-/tmp}/equifeat-slurm-$(id -u)}
export PATH="$PATH:/usr/sbin:/sbin"
export SLURM_CONF="$folder/slurm.conf"
daemons=(slurmd-a slurmd-b slurmctld munged)

alive() { # NAME: is the daemon that wrote this pid file of ours still running?
    local file="$folder/$1.pid"
    [[ -s $file && $(cat "/proc/$(<"$file")/comm" 2>/dev/null) == "${1%-*}" ]]
}

if [[ $action == stop ]]; then
    for name in "${daemons[@]}"; do
        if alive "$name"; then
            kill "$(<"$folder/$name.pid")"
        fi
    done
    exit 0
fi

if ! command -v slurmctld slurmd munged srun >/dev/null; then
    if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
        echo "setup.sh: slurmctld, slurmd, srun and munged are missing; as root on Debian:" \
            "apt-get install slurm-wlm munge" >&2
        exit 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >&2
    apt-get install -y -qq --no-install-recommends slurm-wlm munge >&2
fi

mkdir -p "$folder"/{state,spool-a,spool-b}
chmod 755 "$folder" # munged refuses a socket in a folder that others may write to
if [[ ! -s $folder/munge.key ]]; then
    (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
fi
if ! alive munged; then
    munged --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
        --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" \
        --seed-file="$folder/munge.seed" --num-threads=2
fi

user=$(id -un)
host=$(hostname -s)
cat >"$SLURM_CONF.new" <<CONF
ClusterName=equifeat
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$user
SlurmdUser=$user
SlurmctldPort=26817
# A requeued job waits until its old credentials have expired, 120 s by default.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=15
SchedulerParameters=sched_interval=5,bf_interval=5
GresTypes=gpu
NodeName=a,b NodeHostname=$host NodeAddr=127.0.0.1 Port=[26818-26819] CPUs=4 RealMemory=2000 \
Gres=gpu:2
PartitionName=main Nodes=a,b Default=YES MaxTime=60 State=UP
CONF
mv "$SLURM_CONF.new" "$SLURM_CONF"
# Devices that stand for GPUs: SLURM deals them out, nobody opens them.
ln -sf /dev/null "$folder/gpu0"
ln -sf /dev/null "$folder/gpu1"
echo "NodeName=a,b Name=gpu File=$folder/gpu[0-1]" >"$folder/gres.conf"

alive slurmctld || slurmctld
for node in a b; do
    alive "slurmd-$node" || slurmd -N "$node"
done

for _ in {1..60}; do
    if [[ $(sinfo --noheader --Node --states=idle,mixed,allocated 2>/dev/null | wc -l) == 2 ]]; then
        echo "export SLURM_CONF=$SLURM_CONF"
        exit 0
    fi
    sleep 0.5
done
echo "setup.sh: the nodes did not come up; see the logs in $folder" >&2
sinfo --Node --long >&2 || true
exit 1
