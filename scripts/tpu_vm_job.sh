#!/usr/bin/env bash
# A worker of a batch job on a TPU VM of its own, again and again until the job is done; docs/clusters.md explains it.
#
#   scripts/tpu_vm_job.sh --name bagel-0 --zone us-east5-b --accelerator-type v6e-8 --version v2-alpha-tpuv6e \
#       [--spot] [--setup COMMAND] -- JOB --output DIR --model DIR ...
#
# What stands behind -- is what python -m bagel_jax.batch is given on the VM. --setup runs there before it, to mount a
# share or fetch a model. The exit code is the worker's. The VM is deleted at the end, whatever happens.
set -euo pipefail

name='' zone='' type='' version='' setup=true spot=()
while (($#)); do
    case $1 in
        --name) name=$2 && shift 2 ;;
        --zone) zone=$2 && shift 2 ;;
        --accelerator-type) type=$2 && shift 2 ;;
        --version) version=$2 && shift 2 ;;
        --setup) setup=$2 && shift 2 ;;
        --spot) spot=(--spot) && shift ;;
        --) shift && break ;;
        *) echo "error: $1 is no option; there are --name, --zone, --accelerator-type, --version, --setup, --spot, --" >&2 && exit 2 ;;
    esac
done
if [[ -z $name || -z $zone || -z $type || -z $version || $# == 0 ]]; then
    echo "error: --name, --zone, --accelerator-type, --version and a job behind -- must be given" >&2
    exit 2
fi

poll=${POLL_SECONDS:-30} # between looks at a VM that is not there yet
most=5                   # times that something may fail in a row on a VM that was not taken away
scratch=$(mktemp -d)
queue=(gcloud compute tpus queued-resources)

remove() {
    "${queue[@]}" delete "$name" --zone "$zone" --force --quiet || true
}
trap 'remove; rm -rf "$scratch"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

on_vm() {
    # With a terminal there, so that what runs ends when the connection does, and does not keep the TPU.
    gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --ssh-flag=-tt --command "$1"
}

install() {
    # What is committed of the package; the VM needs no more.
    git -C "$(dirname "$0")/.." archive --output "$scratch/bagel_jax.tar" HEAD bagel_jax pyproject.toml README.md LICENSE
    gcloud compute tpus tpu-vm scp "$scratch/bagel_jax.tar" "$name:" --zone "$zone" --worker=all
    on_vm "mkdir -p bagel_jax && tar xf bagel_jax.tar -C bagel_jax && cd bagel_jax \
&& curl -LsSf https://astral.sh/uv/install.sh | sh && ~/.local/bin/uv venv --clear --python 3.12 .venv \
&& ~/.local/bin/uv pip install -e '.[tpu]' && $setup"
}

work() {
    # The worker's own exit code: gcloud's says little where there are several hosts, or the connection broke.
    on_vm "cd bagel_jax; .venv/bin/python -m bagel_jax.batch$(printf ' %q' "$@"); echo worker ended with \$?" |
        tee "$scratch/log" || true
    tr -d '\r' <"$scratch/log" | sed -n 's/^worker ended with \([0-9]*\)$/\1/p' | sort -n | tail -1 >"$scratch/code"
}

state() { # nothing if there is none; fails if nobody answers
    "${queue[@]}" list --zone "$zone" --filter "name~(^|/)$name\$" --format 'value(state.state)'
}

failed=0 installed=
while true; do
    case $(state || echo UNKNOWN) in
        '')
            installed=
            "${queue[@]}" create "$name" --node-id "$name" --zone "$zone" --accelerator-type "$type" \
                --runtime-version "$version" ${spot[@]+"${spot[@]}"} || failed=$((failed + 1))
            ;;
        SUSPENDING | SUSPENDED | PREEMPTED) # taken away: into the queue once more
            echo "$name was taken away" >&2
            failed=0
            remove
            ;;
        FAILED)
            echo "error: $name cannot be had; its description said why:" >&2
            "${queue[@]}" describe "$name" --zone "$zone" >&2 || true
            exit 1
            ;;
        ACTIVE)
            if [[ -z $installed ]]; then
                install && installed=1 || failed=$((failed + 1))
            else
                work "$@"
                code=$(cat "$scratch/code")
                case $code in
                    0 | 2 | 3) exit "$code" ;; # done, refused, or done with errors under --strict
                esac
                failed=$((failed + 1))
            fi
            ;;
    esac
    if ((failed > most)); then
        echo "error: $name failed $failed times in a row" >&2
        exit 1
    fi
    sleep "$poll"
done
