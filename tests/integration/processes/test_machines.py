"""Two machines, as network namespaces with a cable between them: DDP and FSDP2 over torchrun give one machine's
adapter, and a machine that is lost in the middle is an error on the other one, from which both resume.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.processes.case import RATE, alone, trained
from tests.integration.processes.launch import ALONE, ROOT, assert_same, both

pytestmark = pytest.mark.slow
FILE = "adapter_model.safetensors"
ADDRESSES = ("10.213.77.1", "10.213.77.2")


class Host(NamedTuple):
    """A machine: its network namespace, its end of the cable, its address."""

    name: str
    cable: str
    address: str


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _connected() -> tuple[Host, Host]:
    number = os.getpid() % 100_000
    hosts = (
        Host(f"mosld-{number}-0", f"m{number}v0", ADDRESSES[0]),
        Host(f"mosld-{number}-1", f"m{number}v1", ADDRESSES[1]),
    )
    for host in hosts:
        _ip("netns", "add", host.name)
    _ip("link", "add", hosts[0].cable, "netns", hosts[0].name, "type", "veth",
        "peer", "name", hosts[1].cable, "netns", hosts[1].name)  # fmt: skip
    for host in hosts:
        _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.cable)
        _ip("-n", host.name, "link", "set", host.cable, "up")
        _ip("-n", host.name, "link", "set", "lo", "up")
    return hosts


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    if shutil.which("ip") is None:
        pytest.skip("two machines are made with iproute2's ip, which is not installed")
    try:
        made = _connected()
    except OSError as refused:
        for rank in (0, 1):
            subprocess.run(["ip", "netns", "del", f"mosld-{os.getpid() % 100_000}-{rank}"], capture_output=True)
        pytest.skip(f"network namespaces may not be made here: {refused}")
    yield made
    for host in made:
        subprocess.run(["ip", "netns", "del", host.name], check=True)


def _start(hosts: tuple[Host, Host], port: int, *words: str) -> list[subprocess.Popen]:
    """torchrun on both machines, in sessions of their own so that each can be lost whole."""
    started = []
    for number, host in enumerate(hosts):
        command = ["ip", "netns", "exec", host.name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        command += ["--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:{port}"]
        # The first machine keeps the meeting point: torchrun's own guess goes by host names, which these two share.
        command += [
            "--rdzv-id=mosld",
            f"--rdzv-conf=is_host={1 - number}",
            f"--local-addr={host.address}",
            "-m",
            *words,
        ]
        own = {name: value for name, value in os.environ.items() if name not in ALONE}
        own |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        own["GLOO_SOCKET_IFNAME"] = host.cable
        process = subprocess.Popen(
            command, cwd=ROOT, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        started.append(process)
    return started


def _ended(processes: list[subprocess.Popen], seconds: float = 240) -> list[tuple[int, str]]:
    """Exit status and output of each; what does not end in time is killed, and fails the test."""
    results = []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=seconds)
            results.append((process.returncode, output))
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return results


def _run(hosts: tuple[Host, Host], port: int, *words: str) -> list[str]:
    """What both machines printed; words: the script, the folder it writes to, and more for it."""
    Path(words[1]).mkdir(exist_ok=True)
    outputs = []
    for status, output in _ended(_start(hosts, port, *words)):
        assert status == 0, output
        outputs.append(output)
    return outputs


def test_the_cable_is_the_only_way_between_them(hosts):
    """What runs here crosses a network: neither machine reaches the other's loopback."""
    probe = "import socket; socket.create_connection(('{}', 9), timeout=2)"
    for here, there in (hosts, hosts[::-1]):
        command = ["ip", "netns", "exec", here.name, sys.executable, "-c", probe.format(there.address)]
        said = subprocess.run(command, capture_output=True, text=True).stderr
        assert "ConnectionRefusedError" in said  # nobody listens there, and it answers
        outside = subprocess.run(
            ["ip", "netns", "exec", here.name, "ip", "route"], capture_output=True, text=True, check=True
        )
        assert outside.stdout.split()[:3] == ["10.213.77.0/24", "dev", here.cable] and "default" not in outside.stdout


def test_ddp_trains_what_one_machine_trains(hosts, tmp_path):
    _run(hosts, 29500, "tests.integration.processes.ddp", str(tmp_path / "two"))
    first, second = both(tmp_path / "two", "trained")
    assert_same(first, trained(tmp_path / "one", accumulation=2))
    assert_same(second, first, share=0)
    saved, expected = (load_file(tmp_path / name / FILE) for name in ("two/trainer/adapter", "one/adapter"))
    assert_same(saved, expected)


def test_fsdp2_trains_what_one_machine_trains(hosts, tmp_path):
    _run(hosts, 29501, "tests.integration.processes.fsdp", str(tmp_path / "two"))
    first, second = both(tmp_path / "two", "float32")
    model, gradients = alone()
    assert_same(first, gradients)
    assert_same(second, first, share=0)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE).step()
    model.save_pretrained(str(tmp_path / "one"))
    saved, expected = (load_file(tmp_path / name / FILE) for name in ("two/float32-after", "one"))
    assert_same(saved, expected)


def test_a_lost_machine_is_an_error_on_the_other_and_both_resume(hosts, tmp_path):
    script = "tests.integration.processes.machines"
    _run(hosts, 29502, script, str(tmp_path / "whole"), "6")
    cut = tmp_path / "cut"
    cut.mkdir()
    (first, said), (second, _) = _ended(_start(hosts, 29503, script, str(cut), "6", "3"))
    assert second == -signal.SIGKILL
    assert first > 0 and "rank 0 begins after nothing" in said, said
    assert not list(cut.glob("trained-*"))
    for output in _run(hosts, 29504, script, str(cut), "6"):
        assert any(f"begins after checkpoint-{step}\n" in output for step in (2, 3)), output
    for rank, state in enumerate(both(cut, "trained")):
        assert_same(state, both(tmp_path / "whole", "trained")[rank], share=0)
