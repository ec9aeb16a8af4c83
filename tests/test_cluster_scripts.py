"""Scripts that start batch workers elsewhere, against stand-ins for what they call."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bagel_jax.batch.__main__ import parser

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
TPU_JOB, SLURM_JOB = SCRIPTS / "tpu_vm_job.sh", SCRIPTS / "slurm_job.sbatch"
JOB = ["my jobs.jsonl", "--output", "/share/it's out", "--steps", "30"]

# Writes down what it is asked, has the next state, and runs a worker's command here.
GCLOUD = r"""#!/usr/bin/env bash
echo "$3 $4" | sed 's/ --.*//; s/^tpu-vm //; s/ bagel-0$//' >>"$HOME/calls"
printf '%s\n' "$*" >>"$HOME/words"
next() { head -1 "$HOME/$1"; sed -i 1d "$HOME/$1"; }
case "$*" in
    *' list '*) next states ;;
    *bagel_jax.batch*) cd "$HOME" && bash -c "${@: -1}" ;;
    *' create '*) exit "$(cat "$HOME/create" 2>/dev/null || echo 0)" ;;
esac
"""
# What a VM has for Python; its exit code is the next one, or nothing, as when the connection broke.
PYTHON = r"""#!/usr/bin/env bash
printf '%s\n' "$@" >"$HOME/given"
code=$(head -1 "$HOME/codes"); sed -i 1d "$HOME/codes"
[[ $code == broken ]] && kill -KILL $PPID
exit "$code"
"""


def stand_in(path: Path, text: str) -> None:
    """A program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def on_tpu(home: Path, states: list[str], codes: list, *more: str, **files: str) -> tuple[int, list[str], str]:
    """The script with scripted states and exit codes of workers; its code, what it asked of gcloud, and stderr."""
    stand_in(home / "bin" / "gcloud", GCLOUD)
    stand_in(home / "bagel_jax" / ".venv" / "bin" / "python", PYTHON)
    for name, lines in {"states": states, "codes": codes}.items():
        (home / name).write_text("".join(f"{line}\n" for line in lines))
    for name, text in files.items():
        (home / name).write_text(text)
    environment = os.environ | {"HOME": str(home), "PATH": f"{home / 'bin'}:{os.environ['PATH']}", "POLL_SECONDS": "0"}
    args = ["--name", "bagel-0", "--zone", "z", "--accelerator-type", "v6e-8", "--version", "v2", *more]
    ran = subprocess.run(
        [str(TPU_JOB), *args, "--", *JOB], env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    calls = (home / "calls").read_text().splitlines()
    return ran.returncode, [call for call in calls if not call.endswith(" list")], ran.stderr


@pytest.mark.skipif(shutil.which("git") is None, reason="the script packs the repository with git")
class TestTpuVm:
    """`scripts/tpu_vm_job.sh`."""

    @pytest.mark.parametrize("state", ["PREEMPTED", "SUSPENDED"])
    def test_a_vm_that_is_taken_away(self, tmp_path, state):
        """Nobody asks for another VM, or the new one has no worker, or the last one is never deleted."""
        states = ["", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE", state, "", "PROVISIONING", *["ACTIVE"] * 2]
        code, calls, err = on_tpu(tmp_path, states, ["broken", 0], "--spot", "--setup", "mount it")
        assert code == 0, err
        whole = ["queued-resources create", "scp", "ssh", "ssh", "queued-resources delete"]
        assert [call.split(" /")[0] for call in calls] == whole * 2
        words = (tmp_path / "words").read_text()
        assert words.count("--accelerator-type v6e-8 --runtime-version v2 --spot\n") == 2
        assert words.count("&& mount it\n") == 2
        assert (tmp_path / "given").read_text().splitlines() == ["-m", "bagel_jax.batch", *JOB]

    @pytest.mark.parametrize("code", [0, 2, 3])
    def test_a_worker_that_has_ended(self, tmp_path, code):
        """A refused job is tried for ever, at the price of a TPU, or a done one."""
        ended, calls, _ = on_tpu(tmp_path, ["ACTIVE", "ACTIVE"], [code])
        assert ended == code
        assert calls[-1] == "queued-resources delete"

    def test_a_worker_that_fails_again_and_again(self, tmp_path):
        """A full disk costs a TPU for ever."""
        code, calls, err = on_tpu(tmp_path, ["ACTIVE"] * 20, [1] * 20)
        assert code == 1
        assert err.endswith("error: bagel-0 failed 6 times in a row\n")
        assert calls.count("ssh") == 7
        assert calls[-1] == "queued-resources delete"

    def test_a_vm_that_cannot_be_had(self, tmp_path):
        """The script waits for ever for a type that there is not."""
        code, calls, err = on_tpu(tmp_path, ["", "FAILED"], [])
        assert code == 1
        assert "error: bagel-0 cannot be had" in err
        assert calls == ["queued-resources create", "queued-resources describe", "queued-resources delete"]
        (tmp_path / "calls").unlink()
        code, _, err = on_tpu(tmp_path, [""] * 9, [], create="1")
        assert (code, err) == (1, "error: bagel-0 failed 6 times in a row\n")

    def test_flags_that_are_missing(self, tmp_path):
        """A VM is created without a job for it."""
        ran = subprocess.run([str(TPU_JOB), "--name", "a"], capture_output=True, text=True, timeout=30, check=False)
        assert ran.returncode == 2
        assert ran.stderr.startswith("error: --name, --zone, ")


SRUN = r"""#!/usr/bin/env bash
printf '%s\n' "$@" >"$HOME/given"
trap 'sleep 0.3; echo told >>"$HOME/given"; exit 143' TERM
touch "$HOME/started"
for _ in $(seq 300); do [[ -e $HOME/end ]] && exit "$(cat "$HOME/end")"; sleep 0.05; done
"""


@pytest.mark.parametrize("how", ["signal", "done", "error"])
def test_slurm(tmp_path, how):
    """The worker is not told that the time is over, or killed while it publishes, or nothing is queued again."""
    stand_in(tmp_path / "bin" / "srun", SRUN)
    stand_in(tmp_path / "bin" / "scontrol", '#!/usr/bin/env bash\necho "$*" >>"$HOME/queue"\n')
    slurm = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "2", "PYTHON": sys.executable}
    environment = os.environ | slurm | {"HOME": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    with subprocess.Popen(["bash", str(SLURM_JOB), *JOB], env=environment) as script:
        until = time.monotonic() + 20
        while not (tmp_path / "started").exists():
            assert time.monotonic() < until
            time.sleep(0.02)
        if how == "signal":
            script.send_signal(signal.SIGTERM)
        else:
            (tmp_path / "end").write_text("0" if how == "done" else "1")
        assert script.wait(timeout=20) == {"signal": 143, "done": 0, "error": 1}[how]
    given = (tmp_path / "given").read_text().splitlines()
    wanted = [sys.executable, "-m", "bagel_jax.batch", "--progress", "log", *JOB]
    assert given == wanted + ["told"] * (how == "signal")
    queue = tmp_path / "queue"
    assert (queue.read_text() if queue.exists() else "") == ("requeue 10_2\n" if how == "signal" else "")


def test_gke():
    """The manifest's command is refused, or a preempted pod ends the job."""
    yaml = pytest.importorskip("yaml")
    spec = yaml.safe_load((SCRIPTS / "gke_job.yaml").read_text())["spec"]
    pod = spec["template"]["spec"]
    (worker,) = pod["containers"]
    args = parser().parse_args(worker["command"][3:])
    assert worker["command"][:3] == ["python", "-m", "bagel_jax.batch"]
    assert args.grace < pod["terminationGracePeriodSeconds"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    assert pod["restartPolicy"] == "Never"  # which a podFailurePolicy needs
    ignore, fail = spec["podFailurePolicy"]["rules"]
    assert (ignore["action"], ignore["onPodConditions"]) == ("Ignore", [{"type": "DisruptionTarget"}])
    assert (fail["action"], fail["onExitCodes"]["containerName"]) == ("FailJob", worker["name"])
    assert worker["resources"]["requests"] == worker["resources"]["limits"] == {"google.com/tpu": 8}
    assert worker["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]


def test_shellcheck():
    """A script that only works until a path has a space in it."""
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck is not None
    scripts = sorted(p for p in SCRIPTS.iterdir() if p.suffix in (".sh", ".sbatch"))
    done = subprocess.run([shellcheck, "--shell=bash", *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
