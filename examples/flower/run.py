"""Starts a federation on this machine, runs it, and stops it all: a SuperLink, and for each client a node and a worker.

It listens on 127.0.0.1 alone, sends no telemetry, and installs nothing. What it starts ends with it. On machines of
their own the same commands run one by one: docs/guides/deployment.md.

Command: python examples/flower/run.py --workdir=runs/flower     the sine task, two clients
         python examples/flower/run.py --problem=hospitals --data=OUT --tls --authenticate
         python examples/flower/run.py --simulation     in Flower's simulation engine, which needs ray
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROBLEMS = ("sine", "hospitals")
HOSPITALS = 4
OURS = ("cold", "simulation", "tls")  # options that the run itself does not know
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=PROBLEMS, default="sine")
    parser.add_argument("--clients", type=int, default=2, help="of the sine task")
    parser.add_argument("--method", default="fipa", help="as in config.compare, such as fedavg")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--workdir", type=Path, default=Path("runs/flower"), help="of the server; a run in it goes on")
    parser.add_argument("--resume", default="yes", help="as of scripts/train.py: yes, anyway or no")
    parser.add_argument("--data", type=Path, default=Path(), help="where prepare.py has put the hospitals' files")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that a round waits for answers")
    parser.add_argument("--late", type=int, default=0, help="rounds after which an answer may still come in")
    parser.add_argument("--tls", action="store_true", help="encrypted, with a certificate made for this run")
    parser.add_argument("--authenticate", action="store_true", help="nodes that show a key; implies --tls")
    parser.add_argument("--cold", action="store_true", help="without workers: each message imports and compiles anew")
    parser.add_argument("--simulation", action="store_true", help="in Flower's simulation engine")
    return parser.parse_args(given)


class Machines:
    """The processes of a federation on this machine, in a folder of their own that goes when they do.

    Args:
      options: of the command line.
    """

    def __init__(self, options: argparse.Namespace):
        self.options, self.processes = options, {}
        self.folder = Path(tempfile.mkdtemp(prefix="fipa-"))
        self.options.tls = options.tls or options.authenticate
        self.port, self.bin = free_port(), Path(sys.executable).parent
        found = f"{self.bin}{os.pathsep}{os.environ.get('PATH', '')}"  # where Flower looks for its other programs
        self.environment = os.environ | QUIET | {"FLWR_HOME": str(self.folder / "home"), "PATH": found}

    def __enter__(self) -> "Machines":
        (self.folder / "home").mkdir()
        if self.options.tls:
            make_certificates(self.folder)
        try:
            self._start_link()
            if not self.options.simulation:
                for client in range(self.clients):
                    self.start_client(client)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for name in reversed([*self.processes]):
            self.stop(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, name: str, *command: str) -> None:
        """Starts a process, in a group of its own so that what it starts ends with it; its log is in the folder."""
        with (self.folder / f"{name}.log").open("a") as log:
            self.processes[name] = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )

    def stop(self, name: str, number: int = 15) -> None:
        """Ends a process and what it has started, and waits for it."""
        process = self.processes.pop(name)
        started = descendants(process.pid)  # some of them in sessions of their own
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pid, words in started.items():
            if command_of(pid) == words:  # and not another one that has its number by now
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)

    def start_client(self, client: int) -> None:
        """Starts a client's worker and node."""
        node_config = f"partition-id={client}"
        if not self.options.cold:
            path = self.folder / f"{client}.sock"
            node_config += f' socket="{path}"'
            own = [f"--client={client}", f"--socket={path}", f"--settings={json.dumps(self.settings)}"]
            self.start(f"worker-{client}", sys.executable, str(HERE / "worker.py"), *own)
        command = [str(self.bin / "flower-supernode"), "--superlink", f"127.0.0.1:{self.port}"]
        command += ["--port", str(free_port()), "--node-config", node_config]
        if self.options.authenticate:
            key = self.folder / f"node-{client}"
            if not key.exists():
                make_key(key)
                self.flwr("supernode", "register", f"{key}.pub", "here", "--name", f"client-{client}")
            command += ["--auth-supernode-private-key", str(key)]
        certificate = ["--root-certificates", str(self.folder / "ca.pem")]
        self.start(f"node-{client}", *command, *(certificate if self.options.tls else ["--insecure"]))

    @property
    def clients(self) -> int:
        """How many there are."""
        return self.options.clients if self.options.problem == "sine" else HOSPITALS

    @property
    def settings(self) -> dict:
        """Of the run, as pyproject.toml lists them."""
        names = (
            "problem",
            "clients",
            "method",
            "rounds",
            "workdir",
            "data",
            "timeout",
            "late",
            "authenticate",
            "resume",
        )
        values = {name: getattr(self.options, name) for name in names}
        return values | {name: str(values[name].absolute()) for name in ("workdir", "data")}

    def submit(self) -> str:
        """Gives the app to the SuperLink; returns the run's number."""
        config = " ".join(f"{name}={json.dumps(value)}" for name, value in self.settings.items())
        command = ["run", str(HERE), "here", "--run-config", config, "--format", "json"]
        if self.options.simulation:
            command += ["--federation-config", f"num-supernodes={self.clients}"]
        return json.loads(self.flwr(*command))["run-id"]

    def wait(self, run: str) -> str:
        """How a run has ended."""
        while True:
            state = json.loads(self.flwr("list", "here", "--run-id", str(run), "--format", "json"))["runs"][0]["status"]
            if state.startswith("finished"):
                return state
            time.sleep(2)

    def seconds_of_workers(self) -> list[float]:
        """How long the workers took for each answer."""
        logs = "".join(log.read_text() for log in self.folder.glob("worker-*.log"))
        return [float(seconds) for seconds in re.findall(r"answered by \d+ in ([\d.]+) seconds", logs)]

    def flwr(self, *command: str) -> str:
        """What a command of Flower prints."""
        done = subprocess.run(
            [str(self.bin / "flwr"), *command], env=self.environment, capture_output=True, text=True, timeout=120
        )
        if done.returncode:
            raise RuntimeError(f"flwr {' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def _start_link(self) -> None:
        """Starts the SuperLink, and says to Flower's commands where it is."""
        command = [str(self.bin / "flower-superlink"), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--disable-runtime-dependency-installation"]
        connection = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n'
        if self.options.tls:
            files = (("certfile", "server.pem"), ("keyfile", "server.key"), ("ca-certfile", "ca.pem"))
            command += [part for name, file in files for part in (f"--ssl-{name}", str(self.folder / file))]
            connection += f'root-certificates = "{self.folder / "ca.pem"}"\n'
        else:
            command, connection = [*command, "--insecure"], connection + "insecure = true\n"
        if self.options.simulation:
            command.append("--simulation")
        command += ["--enable-supernode-auth"] if self.options.authenticate else []
        (self.folder / "home" / "config.toml").write_text(connection)
        self.start("link", *command)
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if self.processes["link"].poll() is not None:
                break
            time.sleep(0.1)
        raise RuntimeError(f"the SuperLink does not answer:\n{(self.folder / 'link.log').read_text()}")


def command_of(pid: int) -> str:
    """The command line of a process; "" where there is none, or where the system does not tell."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def descendants(pid: int) -> dict[int, str]:
    """{number: command line} of all processes that a process has started, and they, where the system tells."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = stat.read_text().rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    found, left = {}, [pid]
    while left:
        new = children.get(left.pop(), [])
        found |= {one: command_of(one) for one in new}
        left += new
    return found


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def openssl(folder: Path, *command: str) -> None:
    """Runs openssl in a folder."""
    subprocess.run(["openssl", *command], cwd=folder, check=True, capture_output=True)


def make_certificates(folder: Path) -> None:
    """An authority's certificate, `ca.pem`, and the server's, for 127.0.0.1, good for a day."""
    (folder / "names").write_text("subjectAltName = DNS:localhost, IP:127.0.0.1\n")
    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-384", "-nodes")
    openssl(folder, *new, "-x509", "-days", "1", "-subj", "/CN=fipa", "-keyout", "ca.key", "-out", "ca.pem")
    openssl(folder, *new, "-subj", "/CN=localhost", "-keyout", "server.key", "-out", "server.csr")
    signed_by = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names", "-days", "1")
    openssl(folder, "x509", "-req", "-in", "server.csr", *signed_by, "-out", "server.pem")


def make_key(path: Path) -> None:
    """A node's private key, and its public one beside it, `.pub`, as ssh writes it."""
    command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(path)]
    subprocess.run(command, check=True, capture_output=True)


def main() -> None:
    """Runs a federation, and prints its rows."""
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends what was started, too
    with Machines(options) as machines:
        state = machines.wait(machines.submit())
        print(state)
        rows = options.workdir / "metrics.jsonl"
        if not state.endswith("completed") or not rows.exists():
            for log in sorted(machines.folder.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text()[-4000:]}")
            sys.exit(1)
        show([json.loads(line) for line in rows.read_text().splitlines()], machines.seconds_of_workers())


def show(rows: list[dict], workers: list[float]) -> None:
    """Prints each round's figures, and where the time of a round has gone, by medians without the first round."""
    for row in rows:
        figures = {name: round(value, 6) for name, value in row.items() if name.startswith("test_")}
        print(f"round {row['round']}, {row['seconds_answers']:.2f} s: {figures}")
    later = rows[1:] or rows
    server = statistics.median(row["seconds_read"] + row["seconds_aggregate"] for row in later)
    answers = statistics.median(row["seconds_answers"] for row in later)
    print(f"bytes of a round: {rows[-1]['bytes_down']} down, {rows[-1]['bytes_up']} up")
    print(f"seconds of a round: {answers:.2f} until all have answered, then {server:.3f} of the server")
    if workers:
        print(f"of these a worker takes {statistics.median(workers):.3f}, at most {max(workers):.3f}; Flower the rest")


if __name__ == "__main__":
    main()
