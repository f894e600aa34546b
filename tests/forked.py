"""Python programs without the wait for torch: forked from a server that has imported it.

`run` and `Popen` are those of `subprocess`. For `[sys.executable, "-c", ...]` and
`[sys.executable, "-m", ...]` with a module of ours the process is forked from a server; it has its
own arguments, folder, environment and files, as if it had been started. What is not as in a fresh
process is which modules are imported, so tests of that use `subprocess` itself. An environment
that is read while Python or torch starts cannot be given afterwards: it has a server of its own
from the second call on. Any other command starts a process. What torch.compile makes does not run
in a forked process (the heap breaks in its first frame, torch 2.13): such tests start their own.

    test  --(command, its files, a pipe)-->  server  --fork-->  child
      ^                                         |
      +---------- pid, exit status -------------+
"""

from __future__ import annotations

import array
import atexit
import contextlib
import faulthandler
import gc
import importlib
import importlib.metadata
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
import weakref
from pathlib import Path
from typing import Any, Final, NoReturn

FORGE: Final = (  # what a command of ours imports, now or when it is first needed
    "torch",
    "torch._dynamo",
    "torch.utils.flop_counter",
    "safetensors.torch",
    "numpy.ctypeslib",
    "psutil",
    "structlog.stdlib",
    "tabulate",
    "forge_kernel.cli.run",
    "forge_kernel.runner",
    "forge_kernel.trained_run",
    "forge_kernel.training.session",
    "forge_kernel.training.set_up",
    "forge_kernel.training.guards.hang_watch",
    "forge_plugins.interchange.packed_ternary",
    "forge_plugins.mathematics.grokfast.filters",
    "forge_plugins.mathematics.losses.deferred_logits",
    "forge_plugins.mathematics.metrics.batch_size",
    "forge_plugins.mathematics.networks.mlp",
    "forge_plugins.mathematics.networks.modular_arithmetic",
    "forge_plugins.mathematics.optimizers.learning_rate_curves",
    "forge_plugins.mathematics.optimizers.plain_parameters",
    "forge_plugins.mathematics.quantization.conversion",
    "forge_plugins.mathematics.quantization.evaluation",
    "forge_plugins.mathematics.quantization.warmup",
    "forge_plugins.observers.system_stats",
    "forge_plugins.reports.page",
    "forge_plugins.reports.run_sections",
)
CLIENTS: Final = (  # what takes long; none that begins a thread, which no child would have
    *FORGE,
    "transformers",
    "transformers.generation",
    "transformers.models.llama.modeling_llama",
    "transformers.models.bitnet.modeling_bitnet",
    "transformers.integrations.bitnet",
)
AT_START: Final = (
    "PYTHON", "OMP_", "MKL", "ATEN", "ONEDNN", "DNNL", "TORCH", "TRITON", "LD_", "LANG", "LC_",
    "HF_", "TRANSFORMERS", "FORGE_CPU_",
)  # fmt: skip
LATER: Final = ("PYTHONIOENCODING", "TORCHINDUCTOR_CACHE_DIR")
OPTIONS: Final = frozenset(
    ("cwd", "env", "stdin", "stdout", "stderr", "text", "encoding", "errors", "bufsize")
)
_LIMIT: Final = 1 << 16  # bytes in a packet

PIPE, STDOUT, DEVNULL = subprocess.PIPE, subprocess.STDOUT, subprocess.DEVNULL
TimeoutExpired, CompletedProcess = subprocess.TimeoutExpired, subprocess.CompletedProcess


class Server:
    """What children are forked from.

    Args:
        environment: to start it with.
        modules: what it imports.
    """

    def __init__(self, environment: dict[str, str], modules: tuple[str, ...]) -> None:
        self.socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = (
            f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import forked; "
            f"forked.serve({other.fileno()}, {modules!r})"
        )
        # it leaves this process's children by a fork of its own: tests count those
        with subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=[other.fileno()], cwd="/", env=environment
        ):
            other.close()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Let it end, as it does when this process ends."""
        self.socket.close()

    def fork(self, request: dict[str, Any], files: list[int]) -> None:
        """Ask for a child; the last of the files is told its pid and how it ends."""
        message = json.dumps(request).encode()
        with self._lock:
            self.socket.sendmsg(
                [len(message).to_bytes(8, "big")],
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))],
            )
            for start in range(0, len(message), _LIMIT):
                self.socket.sendall(message[start : start + _LIMIT])


_SERVERS: dict[tuple[Any, ...], Server] = {}  # by process: a forked test has none yet
_SEEN: set[tuple[Any, ...]] = set()  # environments that were asked for once


def server(
    command: list[str], options: dict[str, Any], modules: tuple[str, ...] = FORGE
) -> Server | None:
    """Who can take a command over, started when first asked for; None: it is no such command."""
    if sys.platform != "linux" or options.keys() - OPTIONS or command[:1] != [sys.executable]:
        return None
    module = command[2] if command[1:2] == ["-m"] else ""
    if command[1:2] != ["-c"] and not module.startswith("forge_"):
        return None
    environment = dict(options.get("env") or os.environ)
    modules = CLIENTS if module.startswith("forge_plugins.clients.") else modules
    key = (os.getpid(), modules, _read_early(environment))
    if key not in _SERVERS:
        if modules is FORGE and key not in _SEEN and key[2] != _read_early(dict(os.environ)):
            _SEEN.add(key)
            return None
        _SERVERS[key] = Server(environment, modules)
        atexit.register(_SERVERS[key].close)
    return _SERVERS[key]


def _read_early(environment: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """What of an environment is read while Python or a module starts."""
    return tuple(sorted(
        (name, value)
        for name, value in environment.items()
        if name.startswith(AT_START) and name not in LATER
    ))  # fmt: skip


class Popen(subprocess.Popen[Any]):
    """As `subprocess.Popen`; the child is the server's, which has imported `modules`."""

    def __init__(self, command: Any, *, modules: tuple[str, ...] = FORGE, **options: Any) -> None:
        self._server = server(command, options, modules) if isinstance(command, list) else None
        self._status = -1
        super().__init__(command, **options)

    def _execute_child(self, *given: Any) -> None:
        if self._server is None:
            super()._execute_child(*given)  # type: ignore[misc]
            return
        args, cwd, env = given[0], given[5], given[6]
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = given[10:16]
        self._status, told = os.pipe()
        request = {
            "argv": [os.fspath(part) for part in args],
            "cwd": os.fspath(cwd) if cwd is not None else str(Path.cwd()),
            "env": dict(os.environ if env is None else env),
        }
        pipes = zip((p2cread, c2pwrite, errwrite), (0, 1, 2), strict=True)
        self._server.fork(request, [*(fd if fd != -1 else own for fd, own in pipes), told])
        os.close(told)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]
        self.pid = int(self._line())

    def _line(self) -> bytes:
        """The next line that the server tells."""
        found = b""
        while not found.endswith(b"\n"):
            if not (more := os.read(self._status, 1)):
                raise RuntimeError("the server of forked processes has ended")
            found += more
        return found

    def _ended(self, wait: float | None) -> int | None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._status, selectors.EVENT_READ)
            if not selector.select(wait):
                return None
        code = int(self._line())
        os.close(self._status)
        return code

    def _internal_poll(self, *given: Any, **named: Any) -> int | None:
        if self._server is None:
            return super()._internal_poll(*given, **named)  # type: ignore[misc,no-any-return]
        if self.returncode is None:
            self.returncode = self._ended(0)
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self._server is None:
            return super()._wait(timeout)  # type: ignore[misc,no-any-return]
        if self.returncode is None:
            self.returncode = self._ended(timeout)
            if self.returncode is None:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode


def run(
    command: Any,
    *,
    input: Any = None,
    capture_output: bool = False,
    check: bool = False,
    timeout: float | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """As `subprocess.run`."""
    if input is not None:
        options["stdin"] = subprocess.PIPE
    if capture_output:
        options["stdout"] = options["stderr"] = subprocess.PIPE
    with Popen(command, **options) as process:
        try:
            stdout, stderr = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
    if check:
        done.check_returncode()
    return done


def without_waiting(descriptor: Any) -> None:
    """As `os.fsync` of a disk that is as fast as memory: a file that is not open is still refused."""
    os.fstat(descriptor if isinstance(descriptor, int) else descriptor.fileno())


# -- the other side ----------------------------------------------------------------------------


def serve(number: int, modules: tuple[str, ...]) -> NoReturn:
    """Fork what is asked for until the client closes its end."""
    if os.fork():
        os._exit(0)
    for name in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if modules == FORGE:
        _prepare()
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False  # torch's libraries, 50 ms of CPU time: they end with the process
    os.fsync = without_waiting
    gc.freeze()  # a child's collector would copy every page that it walks
    requests = socket.socket(fileno=number)
    wake, woken = os.pipe()
    for end in (wake, woken):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the client's
    children: dict[int, int] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        selector.register(wake, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in selector.select()}
            if wake in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(wake, 4096)
                _tell_ended(children)
            if requests.fileno() in ready:
                head, data, _, _ = requests.recvmsg(8, socket.CMSG_SPACE(4 * 4))
                if not head:
                    os._exit(0)
                files = list(array.array("i", data[0][2]))
                size, message = int.from_bytes(head, "big"), b""
                while len(message) < size:
                    message += requests.recv(_LIMIT)
                pid = os.fork()
                if not pid:
                    signal.set_wakeup_fd(-1)
                    for end in (requests.fileno(), wake, woken, selector.fileno()):
                        os.close(end)
                    for pipe in children.values():
                        os.close(pipe)
                    _become(json.loads(message), files)
                os.write(files[3], b"%d\n" % pid)
                children[pid] = files.pop()
                for file in files:
                    os.close(file)


def _prepare() -> None:
    """What each child would do by itself, the same each time.

    The plugins are imported, settings are read, and the machine's speed is measured.
    """
    for group in ("forge_kernel.plugins", "forge_kernel.commands"):
        for entry in importlib.metadata.entry_points(group=group):
            if entry.module.startswith("forge_"):
                with contextlib.suppress(ImportError):
                    importlib.import_module(entry.module)
    with contextlib.suppress(ImportError):
        import torch

        from forge_kernel.planning.pipeline_file import load_pipeline
        from forge_kernel.planning.plan import plan
        from forge_plugins.mathematics.metrics.flops import product_peak

        plan(load_pipeline("smoke"))  # which reads the schemas of its plugins
        product_peak(torch.device("cpu"), torch.float32, torch.get_num_threads())


def _tell_ended(children: dict[int, int]) -> None:
    """Tell the client of each child that has ended."""
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        pipe = children.pop(pid)
        with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
            os.write(pipe, b"%d\n" % os.waitstatus_to_exitcode(status))
        os.close(pipe)


def _become(request: dict[str, Any], files: list[int]) -> NoReturn:
    """Be the program that was asked for, and end as it ends."""
    code = 1
    try:
        for file, own in zip(files[:3], (0, 1, 2), strict=True):
            os.dup2(file, own)
        for file in files:
            os.close(file)
        faulthandler.enable()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        encoding, _, errors = request["env"].get("PYTHONIOENCODING", "").partition(":")
        for name, (number, mode) in {
            "stdin": (0, "r"),
            "stdout": (1, "w"),
            "stderr": (2, "w"),
        }.items():
            line = name == "stderr" or os.isatty(number)
            how = "backslashreplace" if name == "stderr" else errors or getattr(sys, name).errors
            if encoding and not errors and name != "stderr":
                how = "strict"
            opened = open(  # noqa: SIM115
                number, mode, encoding=encoding or getattr(sys, name).encoding, errors=how,
                buffering=1 if line else -1, closefd=False,
            )  # fmt: skip
            setattr(sys, name, opened)
            setattr(sys, f"__{name}__", opened)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        argv = request["argv"]
        code = _exit_code(argv)
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:  # noqa: BLE001  as Python does when it cannot write the last
            code = 120
        os._exit(code)


def _exit_code(argv: list[str]) -> int:
    """Run a program, as Python's own start does; its exit code."""
    del sys.path[0]  # this file's folder
    sys.path[0] = ""
    sys.modules.pop("forked", None)
    try:
        if argv[1] == "-m":
            sys.path[0] = str(Path.cwd())
            sys.argv = ["-m", *argv[3:]]
            runpy.run_module(argv[2], run_name="__main__", alter_sys=True)
        else:
            sys.argv = ["-c", *argv[3:]]
            main = types.ModuleType("__main__")
            main.__dict__["__builtins__"] = __builtins__
            sys.modules["__main__"] = main
            exec(compile(argv[2], "<string>", "exec"), main.__dict__)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:  # noqa: BLE001  as an interpreter tells it
        traceback.print_exc()
        return 1
    return 0
