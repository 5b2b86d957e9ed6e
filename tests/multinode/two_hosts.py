"""Two hosts on one machine: network namespaces joined by a virtual cable, each with its name and its ssh daemon.

Nothing outside /etc/netns and the given folder is written: `ip netns exec` mounts /etc/netns/NAME/* over /etc/* for the
processes of one namespace only, which is where their hosts file and ssh configuration come from.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SSHD = "/usr/sbin/sshd"
HOSTS = ("nodea", "nodeb")
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def missing() -> str | None:
    """Why this machine cannot play two hosts, or None."""
    if os.geteuid() != 0:
        return "needs root (network namespaces)"
    tools = [name for name in (SSHD, "pdsh", "ip", "unshare", "ssh", "ssh-keygen") if shutil.which(name) is None]
    if tools:
        return f"needs {', '.join(tools)} (apt-get install openssh-server pdsh iproute2)"
    probe = subprocess.run(["unshare", "-n", "true"], capture_output=True, text=True, check=False)
    return f"cannot make network namespaces: {probe.stderr.strip()}" if probe.returncode else None


@dataclass
class TwoHosts:
    """The pair, alive between :meth:`start` and :meth:`stop`."""

    folder: Path
    """For keys, logs and configuration."""
    private_on_second: Path | None = None
    """A directory that is empty and private on the second host."""
    debian: bool = False
    """Each host's own name means 127.0.1.1 there, as Debian's installer writes it."""
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)
    suffix: str = field(default_factory=lambda: str(os.getpid()))

    @property
    def namespaces(self) -> tuple[str, str]:
        return f"salient-a-{self.suffix}", f"salient-b-{self.suffix}"

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd's own directory, normally made by its service
        for name in ("key", "host_key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))
        shutil.copy(self.folder / "key.pub", self.folder / "authorized_keys")
        for namespace in self.namespaces:
            _run("ip", "netns", "add", namespace)
            self._write_etc(namespace)
        self._connect()
        for index in range(2):
            self._start_sshd(index)
        for index, host in enumerate(HOSTS):
            self._wait_for(host, self.daemons[index])

    def _write_etc(self, namespace: str) -> None:
        etc = Path("/etc/netns") / namespace
        (etc / "ssh").mkdir(parents=True)
        own = HOSTS[self.namespaces.index(namespace)]
        names = "".join(
            f"{'127.0.1.1' if self.debian and host == own else address} {host}\n"
            for address, host in zip(ADDRESSES, HOSTS, strict=True)
        )
        (etc / "hosts").write_text("127.0.0.1 localhost\n" + names)
        (etc / "ssh" / "ssh_config").write_text(
            f"Host nodea nodeb\n  User root\n  IdentityFile {self.folder / 'key'}\n  StrictHostKeyChecking no\n"
            "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
        )

    def _connect(self) -> None:
        cables = (f"sva{self.suffix}"[:15], f"svb{self.suffix}"[:15])
        _run("ip", "link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for namespace, cable, address in zip(self.namespaces, cables, ADDRESSES, strict=True):
            _run("ip", "link", "set", cable, "netns", namespace, "name", "eth0")
            _run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run("ip", "-n", namespace, "link", "set", device, "up")

    def _start_sshd(self, index: int) -> None:
        settings = self.folder / f"sshd_{HOSTS[index]}.conf"
        settings.write_text(
            f"Port 22\nListenAddress 0.0.0.0\nHostKey {self.folder / 'host_key'}\n"
            f"AuthorizedKeysFile {self.folder / 'authorized_keys'}\nPermitRootLogin prohibit-password\n"
            "StrictModes no\nUsePAM no\nPidFile none\n"
        )
        script = f"exec {SSHD} -D -f {settings} -E {self.folder / f'sshd_{HOSTS[index]}.log'}"
        if index == 1 and self.private_on_second is not None:
            self.private_on_second.mkdir(parents=True, exist_ok=True)
            script = f"mount -t tmpfs none {shlex.quote(str(self.private_on_second))} && {script}"
        self.daemons.append(subprocess.Popen(self._inside(index, script)))

    def _inside(self, index: int, script: str) -> list[str]:
        """Command that runs ``script`` on host ``index``, with that host's name and mounts of its own."""
        script = f"hostname {HOSTS[index]} && {script}"
        return ["ip", "netns", "exec", self.namespaces[index], "unshare", "--uts", "--mount", "bash", "-c", script]

    def _wait_for(self, host: str, daemon: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 20
        while True:
            done = self.run(f"ssh -o ConnectTimeout=2 {host} hostname", timeout=10)
            if done.returncode == 0 and done.stdout.strip() == host:
                return
            assert daemon.poll() is None, f"sshd of {host} ended with status {daemon.returncode}: {done.stderr}"
            assert time.monotonic() < deadline, f"{host} does not answer over ssh: {done.stdout}{done.stderr}"
            time.sleep(0.1)

    def run(
        self, command: str, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command on the first host.

        Raises:
            AssertionError: at the time limit, with what it said; its processes are ended first.
        """
        process = subprocess.Popen(
            self._inside(0, command), cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            self.end_processes(keep_daemons=True)
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"still running after {timeout} s: {command}\n{out}\n{err}") from error
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def pids(self, index: int) -> list[int]:
        """Processes on one host."""
        done = subprocess.run(
            ["ip", "netns", "pids", self.namespaces[index]], capture_output=True, text=True, check=False
        )
        return [int(line) for line in done.stdout.split()]

    def end_processes(self, keep_daemons: bool = False) -> None:
        spared = {daemon.pid for daemon in self.daemons} if keep_daemons else set()
        for index in range(2):
            for pid in self.pids(index):
                if pid not in spared and pid != os.getpid():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """Undo everything, also after a start that failed half-way."""
        self.end_processes()
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait()
        for namespace in self.namespaces:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns") / namespace, ignore_errors=True)
        with contextlib.suppress(OSError):
            Path("/etc/netns").rmdir()


@contextlib.contextmanager
def two_hosts(folder: Path, private_on_second: Path | None = None, debian: bool = False) -> Iterator[TwoHosts]:
    """The pair for the length of a ``with`` block; always cleaned up."""
    hosts = TwoHosts(folder, private_on_second, debian)
    try:
        hosts.start()
        yield hosts
    finally:
        hosts.stop()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr.strip()}"
